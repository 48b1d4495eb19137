"""Reading and writing config.json, and the tensor table."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.arch import (
    ARCHITECTURES,
    FAMILIES,
    Family,
    ModelConfig,
    Rope,
    architecture_of,
    hf_tensors,
    parameter_count,
    tensor_table,
)
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.errors import UserError
from jax_ordermerge.model import llama

TINY = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Of the safetensors on the hub, as its pages print them; a tied head counts once.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-0425-1b": 1_484_916_736,
    "olmo-2-1124-7b": 7_298_617_344,
    "olmo-2-1124-13b": 13_716_198_400,
    "olmo-2-0325-32b": 32_234_279_936,
    "olmo-3-1025-7b": 7_298_011_136,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-1125-32b": 32_233_522_176,
    "olmo-3-32b": 32_233_522_176,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3-medium-4k": 13_960_238_080,
    "phi-4": 14_659_507_200,
}


def test_published_parameter_counts():
    counts = {name: parameter_count(config) for name, config in ARCHITECTURES.items()}
    assert counts == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_transformers(name):
    torch, transformers = (
        pytest.importorskip(name, reason="needs the extra parity")
        for name in ("torch", "transformers")
    )
    # depth only repeats a layer, and takes transformers a second per size
    config = dataclasses.replace(ARCHITECTURES[name], num_layers=2)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config.to_hf("bfloat16"))
        )
    assert sum(p.numel() for p in theirs.parameters()) == parameter_count(config)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b"),
        ("ibm-granite/granite-3.3-2b-instruct", "granite-3.3-2b"),
        ("allenai/OLMo-2-1124-7B-Instruct", "olmo-2-1124-7b"),
        ("allenai/Olmo-3-32B-Think", "olmo-3-32b"),
    ],
)
def test_names_of_the_hub(name, size):
    assert architecture_of(name) == ARCHITECTURES[size]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "mscale": 1.0}}, "rope parameter mscale"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported for llama"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"wild_new_thing": 2}, "unknown key wild_new_thing"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "heads must be a multiple"),
    ],
)
def test_unsupported_mathematics_is_refused_by_name(change, message):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf({"model_type": "llama", **TINY, **change})
    assert message in str(caught.value)


def test_unknown_keys_can_be_ignored_on_request():
    assert (
        ModelConfig.from_hf({"model_type": "llama", **TINY, "wild": 2}, ignore=["wild"]).num_layers
        == 2
    )


def test_rope_is_read_the_old_and_the_new_way():
    old = ModelConfig.from_hf(
        {"model_type": "llama", **TINY, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
    )
    new = ModelConfig.from_hf(
        {"model_type": "llama", **TINY, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}
    )
    assert old == new
    assert old.rope == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    written = old.to_hf("bfloat16")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"]["factor"] == written["rope_parameters"]["factor"] == 8.0
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_config_round_trip(family):
    change = {"mistral": {"sliding_window": 5}}.get(family, {})
    config = ModelConfig.from_hf(
        {"model_type": family, **TINY, "eos_token_id": [1, 2], "num_key_value_heads": 1, **change}
    )
    assert ModelConfig.from_hf(config.to_hf("float32")) == config


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_table_covers_what_transformers_expects(family, tied):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_hf(
        {"model_type": family, **TINY, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    )
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config.to_hf("float32"))
        )
    expected = {
        name: tuple(p.shape)
        for name, p in theirs.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    assert {name: spec.hf_shape for name, spec, _ in hf_tensors(config)} == expected


def test_paths_and_names_are_unique():
    config = dataclasses.replace(
        ModelConfig.from_hf({"model_type": "qwen3", **TINY, "num_key_value_heads": 1}),
        qkv_bias=True,
    )
    table = tensor_table(config)
    assert len({spec.path for spec in table}) == len(table)
    names = [name for name, _, _ in hf_tensors(config)]
    assert len(set(names)) == len(names) == sum(len(spec.hf_names()) for spec in table)
    assert sum(math.prod(spec.hf_shape) for _, spec, _ in hf_tensors(config)) == parameter_count(
        config
    )


# --------------------------------------------------------------------------- a family from outside


@pytest.fixture
def toy_family():
    """A row of flags: biases of q, k and v as in Qwen2, norms of q and k as in Qwen3."""
    FAMILIES.register(
        "toy",
        Family(
            "ToyForCausalLM",
            defaults={"num_key_value_heads": 1},
            qkv_bias=True,
            qk_norm="per_head",
            window="all",
        ),
    )
    yield "toy"
    FAMILIES.unregister("toy")


def test_a_registered_family_is_initialized_exported_and_read_back(toy_family, tmp_path):
    config = ModelConfig.from_hf({"model_type": toy_family, **TINY, "sliding_window": 4})
    assert (config.num_kv_heads, config.qkv_bias, config.qk_norm) == (1, True, "per_head")
    raw = config.to_hf("float32")
    assert (raw["architectures"], raw["sliding_window"]) == (["ToyForCausalLM"], 4)
    assert ModelConfig.from_hf(raw) == config

    params = llama.init_params(config, seed=0)
    convert.export(params, config, tmp_path / "model", dtype=jnp.float32)
    read_config, read_params = convert.load_params(tmp_path / "model")
    assert read_config == config
    assert jax.tree.map(lambda x: x.shape, read_params) == jax.tree.map(lambda x: x.shape, params)
    for path, array in tree.flatten(params).items():
        np.testing.assert_array_equal(tree.flatten(read_params)[path], array, err_msg=path)

    tokens = jnp.arange(6).reshape(1, 6)
    hidden, _ = llama.hidden(
        config, params, tokens, jnp.arange(6)[None], jnp.ones_like(tokens), dtype="float32"
    )
    assert bool(jnp.isfinite(hidden).all())


def test_an_unknown_family_is_refused():
    with pytest.raises(UserError, match=r"unknown model family 'lama' \(did you mean 'llama'\?\)"):
        ModelConfig(
            family="lama",
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_layers=1,
            num_heads=2,
        )
