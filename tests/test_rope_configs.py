"""Keys of newer families: a `config.json` means what it means to transformers, or is refused."""

import json
import math

import numpy as np
import pytest

from jax_ordermerge.arch import ModelConfig, parameter_count, rope_frequencies, rope_scale
from jax_ordermerge.errors import UserError

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PHI = {
    "model_type": "phi3",
    **SIZES,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 64,
    "rope_theta": 700.0,
    "partial_rotary_factor": 0.75,
}
FACTORS = {
    "short_factor": [1.0, 1.25, 1.5, 2, 3, 4.5],
    "long_factor": [1.5, 2.5, 4.0, 7, 12, 20.0],
}
GEMMA = {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "sliding_window": 8}


def theirs(raw):
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "longrope", **FACTORS}},
        {"rope_scaling": {"rope_type": "longrope", **FACTORS}},
        {"rope_scaling": {"type": "su", **FACTORS}},
        {"rope_scaling": {"type": "yarn", **FACTORS}},
        {"rope_scaling": {"type": "longrope", **FACTORS, "attention_factor": 1.7}},
        {"rope_scaling": {"type": "longrope", **FACTORS, "factor": 8.0}},
        {"rope_parameters": {"rope_type": "longrope", **FACTORS}},
        {"rope_scaling": {"type": "longrope", **FACTORS}, "max_position_embeddings": 64},
        {"rope_scaling": {"type": "longrope", **FACTORS}, "max_position_embeddings": 32},
    ],
    ids=str,
)
def test_longrope_turns_as_in_transformers(change):
    pytest.importorskip("torch", reason="needs the extra parity")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = PHI | change
    config = ModelConfig.from_hf(raw)
    written = config.to_hf("float32")
    assert ModelConfig.from_hf(written) == config
    # transformers 5 translates `su` too late to read its own file of then
    readable = (raw, written) if change.get("rope_scaling", {}).get("type") != "su" else (written,)
    for source in readable:
        for length in (64, 65):
            frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](theirs(source), seq_len=length)
            ours = rope_frequencies(config.rope, config.head_dim, is_long=length > 64)
            np.testing.assert_allclose(ours, frequencies.numpy(), rtol=1e-6)
            assert rope_scale(config.rope) == pytest.approx(scale, rel=1e-12)
    # transformers 4 takes these three keys and no others
    extra = {"attention_factor"} & change.get("rope_scaling", {}).keys()
    assert written["rope_scaling"].keys() == {"type", "short_factor", "long_factor", *extra}
    assert written["original_max_position_embeddings"] == 64
    assert written["partial_rotary_factor"] == 0.75


def test_phi_without_longrope_is_written_as_it_was_read():
    raw = {**PHI, "original_max_position_embeddings": 512, "partial_rotary_factor": 1.0}
    written = ModelConfig.from_hf(raw).to_hf("float32")
    assert {key: written[key] for key in raw} == raw
    assert written["rope_scaling"] is None


LINEAR = {"rope_type": "linear", "factor": 8.0}
# transformers 4, transformers 5, and defaults
RAW = {
    "old": {"rope_theta": 900.0, "rope_local_base_freq": 50.0, "rope_scaling": LINEAR},
    "new": {
        "rope_parameters": {
            "full_attention": {**LINEAR, "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    },
    "plain": {},
    "one": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 900.0}}},
}


@pytest.mark.parametrize("form", RAW)
def test_gemma_3_has_a_rope_per_type_of_layer(form):
    raw = {**GEMMA, "sliding_window_pattern": 3, **RAW[form]}
    config = ModelConfig.from_hf(raw)
    assert config.windows == (8, 8, None)
    written = config.to_hf("float32")
    assert ModelConfig.from_hf(written) == config
    for source in (raw, written):
        parameters = theirs(source).rope_parameters
        for kind, rope in (("full", config.rope), ("sliding", config.sliding_rope)):
            expected = parameters[f"{kind}_attention"]
            assert rope.theta == expected["rope_theta"]
            assert rope.kind == expected["rope_type"]
            assert rope.factor == expected.get("factor", 1.0)
    assert config.layer_ropes == (config.sliding_rope, config.sliding_rope, config.rope)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_a_file_of_a_model_without_windows_is_read_back(family):
    """As slices of layers without one make it: the extended rope is not of layers with a window."""
    types = {"layer_types": ["full_attention"] * 3}
    config = ModelConfig.from_hf({**GEMMA, **types, "model_type": family, "rope_scaling": LINEAR})
    assert config.layer_ropes == (config.rope,) * 3
    written = config.to_hf("float32")
    assert ModelConfig.from_hf(written) == config
    assert theirs(written).rope_parameters["full_attention"]["rope_type"] == "linear"


YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
OLMO = {"model_type": "olmo3", **SIZES, "num_hidden_layers": 8, "sliding_window": 8}
OLMO_ROPES = {
    # as published; transformers 5 takes this base, whatever it is, for layers with a window
    "old": {"rope_theta": 500000.0, "rope_scaling": YARN},
    "new": {
        "rope_parameters": {
            "full_attention": {**YARN, "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
        }
    },
    "plain": {},
}


@pytest.mark.parametrize("form", OLMO_ROPES)
def test_yarn_of_olmo_3_is_of_the_layers_without_a_window(form):
    raw = {**OLMO, **OLMO_ROPES[form]}
    config = ModelConfig.from_hf(raw)
    assert config.full_attention_layers == (3, 7)
    sliding = config.sliding_rope or config.rope
    assert config.layer_ropes == (sliding, sliding, sliding, config.rope) * 2
    written = config.to_hf("float32")
    assert ModelConfig.from_hf(written) == config
    assert "rope_local_base_freq" not in written
    for source in (raw, written):
        parameters = theirs(source).rope_parameters
        for kind, rope in (("full", config.rope), ("sliding", sliding)):
            expected = parameters[f"{kind}_attention"]
            assert rope.theta == expected["rope_theta"]
            assert rope.kind == expected["rope_type"]
            assert rope.attention_factor == expected.get("attention_factor")


SMOLLM = {"model_type": "smollm3", **SIZES}
GRANITE = {"model_type": "granite", **SIZES}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**SMOLLM, "no_rope_layers": [1, 0]}, "= [1, 0]; expected a list of 3 flags, one per"),
        ({**SMOLLM, "no_rope_layers": [1, 0, 2]}, "expected a list of 3 flags, one per layer"),
        ({**SMOLLM, "no_rope_layer_interval": 0}, "= 0; expected a positive integer"),
        ({**SMOLLM, "use_sliding_window": True}, "use_sliding_window = True is not supported for"),
        ({**GRANITE, "logits_scaling": 0}, "logits_scaling = 0; expected a positive number"),
        ({**GRANITE, "residual_multiplier": None}, "= None; expected a positive number"),
        ({**GRANITE, "num_local_experts": 8}, "num_local_experts = 8 is not supported"),
        ({**GRANITE, "no_rope_layers": [1, 1, 1]}, "unknown key no_rope_layers = [1, 1, 1]"),
        ({**OLMO, "clip_qkv": 8.0}, "unknown key clip_qkv = 8.0"),
        ({**OLMO, "mlp_bias": True}, "mlp_bias = True is not supported for olmo3"),
        (
            {**OLMO, "sliding_window": None, "layer_types": ["sliding_attention"] * 8},
            "sliding_window = None, but layers of this olmo3 have a window",
        ),
        (
            {**OLMO, "rope_parameters": {"sliding_attention": {**YARN}}},
            "rope type 'yarn' is not supported (supported: default)",
        ),
        (
            {"model_type": "llama", **SIZES, "logits_scaling": 8.0},
            "logits_scaling = 8.0 is not supported (supported: 1)",
        ),
        (
            {**PHI, "rope_scaling": {"type": "longrope", **FACTORS, "long_factor": [1.0] * 5}},
            "longrope has 5 factors for 6 pairs of dimensions",
        ),
        (
            {**PHI, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6}},
            "rope type 'longrope' lacks long_factor",
        ),
        (
            {**PHI, "rope_scaling": {"type": "longrope", **FACTORS, "long_factor": [0.0] * 6}},
            "long_factor = 0.0; expected a positive number",
        ),
        (
            {**PHI, "rope_scaling": {"type": "longrope", **FACTORS, "short_factor": 2.0}},
            "short_factor = 2.0; expected a list of numbers",
        ),
        (
            {**PHI, "rope_scaling": {"type": "longrope", **FACTORS, "factor": 4.0}},
            "factor = 4.0, and max_position_embeddings are 8 times",
        ),
        ({**PHI, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not"),
        (
            {**PHI, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5 and 0.75; transformers 4 and 5",
        ),
        ({**PHI, "partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5; expected at most 1"),
        ({**PHI, "full_attn_mod": 2}, "full_attn_mod = 2 is not supported"),
        ({**PHI, "hidden_act": "gelu_pytorch_tanh"}, "hidden_act = 'gelu_pytorch_tanh' is not"),
        ({**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({**GEMMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not"),
        ({**GEMMA, "final_logit_softcapping": 0}, "= 0; expected a positive number, or null"),
        ({**GEMMA, "query_pre_attn_scalar": 2.5}, "scalar = 2.5; expected a whole number"),
        (
            {**GEMMA, "sliding_window": None},
            "sliding_window = None, but layers of this gemma3_text",
        ),
        ({**GEMMA, "sliding_window_pattern": 0.5}, "= 0.5; expected a positive integer"),
        ({**GEMMA, "hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported"),
        (
            {**GEMMA, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
            "expected the parameters under full_attention and sliding_attention",
        ),
        (
            {**GEMMA, "rope_parameters": {"sliding_attention": {**LINEAR, "rope_theta": 9.0}}},
            "rope type 'linear' is not supported (supported: default)",
        ),
        (
            {**GEMMA, "rope_theta": 5.0, **RAW["one"]},
            "rope_theta is 5.0 and 900.0; transformers 4 and 5 would take different ones",
        ),
    ],
    ids=str,
)
def test_what_is_no_clear_model_is_refused(raw, message):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf(raw)
    assert message in str(caught.value)


def test_yarn_takes_its_factor_from_the_lengths():
    """DeepSeek has null for the factor."""
    raw = {
        "model_type": "llama",
        **SIZES,
        "max_position_embeddings": 512,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 64,
        },
    }
    rope = ModelConfig.from_hf(raw).rope
    assert rope.factor == 8.0
    assert rope_scale(rope) == pytest.approx(0.1 * math.log(8) + 1)
    pytest.importorskip("torch", reason="needs the extra parity")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs(raw))
    np.testing.assert_allclose(rope_frequencies(rope, 16), frequencies.numpy(), rtol=1e-6)
    assert rope_scale(rope) == pytest.approx(scale)


def test_the_file_of_phi_4_mini_is_read():
    """All keys that it has, but for the numbers of its factors."""
    raw = {
        **PHI,
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    config = ModelConfig.from_hf(raw)
    assert parameter_count(config) == 3_836_021_760  # of its safetensors on the hub
    assert (config.context_length, config.rope.factor) == (131072, 32.0)
