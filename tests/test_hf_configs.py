"""A `config.json` means to us what it means to transformers: absent keys, rope, windows."""

import itertools
import json

import numpy as np
import pytest

from jax_ordermerge.arch import FAMILIES, ModelConfig, rope_frequencies, rope_scale
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.errors import UserError

transformers = pytest.importorskip("transformers")

# Every key that is read, with a value that no family takes by default.
FULL = {
    "vocab_size": 96,
    "hidden_size": 4032,
    "intermediate_size": 48,
    "num_hidden_layers": 30,
    "num_attention_heads": 63,
    "num_key_value_heads": 21,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-4,
    "rope_theta": 700.0,
    "tie_word_embeddings": True,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
    "initializer_range": 0.5,
}
THIRDS = ["full_attention", "sliding_attention", "full_attention"] * 10
OWN = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 77},
    "qwen2": {"use_sliding_window": True, "sliding_window": 77, "max_window_layers": 11},
    "qwen3": {
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 77,
        "max_window_layers": 11,
    },
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 12,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078125,
        "logits_scaling": 16.0,
    },
    "smollm3": {
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layers": [0, 1, 1, 1, 1, 1] * 6,
        "no_rope_layer_interval": 7,
    },
    "olmo2": {"attention_bias": True},
    "olmo3": {"attention_bias": True, "sliding_window": 77, "layer_types": THIRDS},
    "gemma2": {
        "attention_bias": True,
        "sliding_window": 77,
        "layer_types": THIRDS,
        "query_pre_attn_scalar": 144,
        "attn_logit_softcapping": 40.0,
        "final_logit_softcapping": 20.0,
    },
    "gemma3_text": {
        "attention_bias": True,
        "sliding_window": 77,
        "sliding_window_pattern": 4,
        "rope_local_base_freq": 300.0,
        "query_pre_attn_scalar": 144,
        "final_logit_softcapping": 20.0,
    },
    "phi3": {"sliding_window": 77, "partial_rotary_factor": 0.5},
}
# What goes with the default of a size: 32 heads, and groups of equal size.
BESIDE = {
    "hidden_size": {"num_attention_heads": 64, "num_key_value_heads": 16},
    "num_attention_heads": {"hidden_size": 4096, "num_key_value_heads": 8},
    "num_hidden_layers": {"layer_types": None},
    "num_key_value_heads": {"hidden_size": 4096, "num_attention_heads": 64},
}
ALTERNATING = ["full_attention", "sliding_attention"] * 15


def theirs(raw):
    """The config of transformers, in our words."""
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    local = rope.get("sliding_attention", {}).get("rope_theta")
    local = None if config.model_type == "olmo3" else local  # see test_rope_configs.py
    rope = rope.get("full_attention", rope)
    types = getattr(config, "layer_types", None)
    if config.model_type in ("llama", "granite", "olmo2"):
        windows = [None] * config.num_hidden_layers
    elif types is None:
        windows = [config.sliding_window] * config.num_hidden_layers
    else:
        windows = [config.sliding_window if "sliding" in kind else None for kind in types]
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    has_rope = getattr(config, "no_rope_layers", ())[: config.num_hidden_layers]
    scale, scalar = (
        getattr(config, key, None) for key in ("attention_multiplier", "query_pre_attn_scalar")
    )
    if scalar not in (None, head_dim):
        scale = scalar**-0.5
    eos = config.eos_token_id
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "theta": rope["rope_theta"],
        "sliding_theta": local,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1),
        "windows": tuple(windows),
        "qkv_bias": config.model_type == "qwen2" or getattr(config, "attention_bias", False),
        "output_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "tie_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_token_id": config.pad_token_id,
        "initializer_range": config.initializer_range,
        "no_rope_layers": tuple(layer for layer, rope in enumerate(has_rope) if not rope),
        "embedding_scale": None if scalar else getattr(config, "embedding_multiplier", 1),
        "residual_scale": getattr(config, "residual_multiplier", 1),
        "attention_scale": scale,
        "logit_divisor": getattr(config, "logits_scaling", 1),
        "attention_softcap": getattr(config, "attn_logit_softcapping", None),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
    }


def ours(raw):
    config = ModelConfig.from_hf(raw)
    ropes = {
        "theta": config.rope.theta,
        "sliding_theta": config.sliding_rope and config.sliding_rope.theta,
        "partial_rotary_factor": config.rope.partial_rotary_factor,
    }
    return {name: getattr(config, name) for name in theirs(raw) if name not in ropes} | ropes


def full(family):
    return {"model_type": family, **FULL, **OWN[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_read(family):
    assert ours(full(family)) == theirs(full(family))


@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family in OWN for key in (*FULL, *OWN[family])]
)
def test_an_absent_key_means_what_transformers_takes(family, key):
    raw = full(family) | BESIDE.get(key, {})
    del raw[key]
    assert ours(raw) == theirs(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_one_key_is_the_default_model(family):
    assert ours({"model_type": family}) == theirs({"model_type": family})


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "num_key_value_heads"),
        ("llama", "head_dim"),
        ("mistral", "head_dim"),
        ("mistral", "sliding_window"),
        ("qwen2", "num_key_value_heads"),
        ("qwen2", "sliding_window"),
        ("qwen3", "eos_token_id"),
        ("llama", "bos_token_id"),
    ],
)
def test_null_is_not_absent(family, key):
    raw = {**full(family), key: None}
    assert ours(raw) == theirs(raw)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "change",
    [
        {"max_window_layers": 0},
        {"max_window_layers": 30},
        {"max_window_layers": 99},
        {"use_sliding_window": False},
        {"use_sliding_window": False, "layer_types": ["full_attention"] * 30},
        {"layer_types": None},
        {"layer_types": ALTERNATING},
        {"layer_types": ALTERNATING, "max_window_layers": 30},
    ],
)
def test_windows_by_layer(family, change):
    raw = {**full(family), **change}
    assert ours(raw) == theirs(raw)
    # and again from what we write, also for the releases that know `max_window_layers` alone
    written = ModelConfig.from_hf(raw).to_hf("float32")
    assert ours(written) == theirs(written) == ours(raw)
    if change.get("layer_types") != ALTERNATING:
        written.pop("layer_types", None)
        assert ours(written) == theirs(written) == ours(raw)


def test_llama_carries_a_window_without_using_it():
    assert ours({**full("llama"), "sliding_window": 7})["windows"] == (None,) * 30


# ---------------------------------------------------------------------------- rope

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
FORMS = {
    "type": lambda rope: {"rope_theta": 700.0, "rope_scaling": {"type": "yarn", **rope}},
    "rope_type": lambda rope: {"rope_theta": 700.0, "rope_scaling": {"rope_type": "yarn", **rope}},
    "both types": lambda rope: {
        "rope_theta": 700.0,
        "rope_scaling": {"rope_type": "yarn", "type": "yarn", **rope},
    },
    "rope_parameters": lambda rope: {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 700.0, **rope}
    },
    "both forms": lambda rope: {
        "rope_theta": 700.0,
        "rope_scaling": {"rope_type": "yarn", **rope},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 700.0, **rope},
    },
}
VARIANTS = [
    {},
    {"factor": 1.0},
    {"factor": 32},
    {"original_max_position_embeddings": 8},
    {"original_max_position_embeddings": 32768},
    {"original_max_position_embeddings": None},
    {"attention_factor": 0.5},
    {"attention_factor": None, "mscale": None},
    {"mscale": 0.707},
    {"mscale": 0.707, "mscale_all_dim": 1.2},
    {"mscale": 0.707, "mscale_all_dim": 0},
    {"mscale": 0.707, "mscale_all_dim": 1.2, "attention_factor": 2.0},
    {"beta_fast": 8},
    {"beta_slow": 3.5},
    {"beta_fast": 0, "beta_slow": None},
    {"beta_fast": 2.0, "beta_slow": 2.0},
    {"truncate": False},
    {"truncate": None},
    {"truncate": True, "beta_fast": 5, "beta_slow": 0.1},
    {"truncate": False, "beta_fast": 3.0, "beta_slow": 3.0},
]


def rotary(raw):
    """The frequencies and the scale of transformers for a config."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    embedding = type(model.model.rotary_emb)(config)
    return embedding.inv_freq.numpy(), float(embedding.attention_scaling)


def check_rotary(raw):
    config = ModelConfig.from_hf(raw)
    frequencies, scale = rotary(raw)
    np.testing.assert_allclose(
        rope_frequencies(config.rope, config.head_dim), frequencies, rtol=1e-6
    )
    assert rope_scale(config.rope) == pytest.approx(scale, rel=1e-12)


SMALL = FULL | {"num_hidden_layers": 1, "hidden_size": 63}


@pytest.mark.parametrize("change", VARIANTS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_yarn_turns_as_in_transformers(family, change):
    rope = YARN | change
    if rope["original_max_position_embeddings"] is None:
        del rope["original_max_position_embeddings"]  # max_position_embeddings stands for it
    raw = {"model_type": family, **SMALL}
    del raw["rope_theta"]
    raw |= FORMS["both forms"](rope)
    check_rotary(raw)
    written = ModelConfig.from_hf(raw).to_hf("float32")
    assert ModelConfig.from_hf(written) == ModelConfig.from_hf(raw)
    check_rotary(written)


@pytest.mark.parametrize("form", FORMS)
def test_yarn_is_spelled_in_several_ways(form):
    raw = {"model_type": "qwen2", **SMALL}
    del raw["rope_theta"]
    raw |= FORMS[form](YARN)
    check_rotary(raw)
    config = ModelConfig.from_hf(raw)
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("yarn", 700.0, 4.0)


def test_llama3_without_an_original_length_has_that_of_the_file():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    check_rotary({"model_type": "llama", **SMALL, "rope_scaling": rope})


@pytest.mark.parametrize(
    ("positions", "rope", "length"),
    [
        (512, {}, 512),
        # Qwen2.5 asks its users to add this and leave max_position_embeddings
        (512, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        (512, {"type": "yarn", "factor": 4.0}, 2048),
        # a file that counts the extended positions already
        (2048, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        (640, {"type": "yarn", "factor": 1.5, "original_max_position_embeddings": 512}, 768),
        (512, {"type": "linear", "factor": 2.0}, 1024),
        # Llama 3.1 counts the extended positions
        (
            512,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            512,
        ),
    ],
)
def test_the_context_is_the_extended_one(positions, rope, length):
    raw = {"model_type": "llama", **SMALL, "max_position_embeddings": positions}
    assert ModelConfig.from_hf({**raw, "rope_scaling": rope}).context_length == length


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        # YaRN added by hand to a file of transformers 5: which of the two is meant?
        (
            "qwen2",
            {
                "rope_scaling": {"type": "yarn", **YARN},
                "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
            },
            "rope_parameters and rope_scaling describe different ropes",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 700.0 and 1000000.0"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "rope_type": "linear", **YARN}},
            "rope_scaling has rope_type and type, which differ",
        ),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' lacks factor"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", **YARN, "attn_factor": 2.0}},
            "rope parameter attn_factor is not supported for type 'yarn'",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
            "rope parameter factor is not supported for type 'default'",
        ),
        ("llama", {"rope_scaling": "yarn"}, "rope_scaling = 'yarn'; expected an object"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", **YARN, "factor": "4"}},
            "factor = '4'; expected a number",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "factor = 0; expected a positive number",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 32},
            "original_max_position_embeddings is 32, and 64 for the rope",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 30 layers"),
        (
            "qwen2",
            {"use_sliding_window": False, "layer_types": ALTERNATING},
            "every layer of this qwen2 is full_attention",
        ),
        ("mistral", {"layer_types": ALTERNATING}, "every layer of this mistral is sliding"),
        ("llama", {"layer_types": ALTERNATING}, "every layer of this llama is full_attention"),
        ("qwen2", {"use_sliding_window": "false"}, "'false'; expected true or false"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1; expected true or false"),
        ("qwen2", {"layer_types": "full_attention"}, "'full_attention'; expected a list"),
        ("mistral", {"sliding_window": 2**31}, "expected a positive integer below 2^31, or null"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", **YARN, "truncate": "no"}},
            "truncate = 'no'; expected true or false",
        ),
        (
            "llama",
            {"rope_theta": 1, "rope_scaling": {"type": "yarn", **YARN}},
            "rope_theta = 1; expected more than 1 for type 'yarn'",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0; expected a positive integer"),
        ("mistral", {"sliding_window": 4.5}, "sliding_window = 4.5; expected a positive integer"),
        ("qwen2", {"max_window_layers": None}, "max_window_layers = None; expected an integer"),
        ("mistral", {"use_sliding_window": True}, "is not supported for mistral"),
        ("mistral", {"attention_bias": True}, "attention_bias = True is not supported for mistral"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000; expected at most"),
        ("llama", {"hidden_size": None}, "hidden_size = None; expected a positive integer"),
        ("llama", {"vocab_size": True}, "vocab_size = True; expected a positive integer"),
        ("llama", {"head_dim": 12.5}, "head_dim = 12.5; expected a positive integer"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'; expected a number"),
        ("qwen2", {"eos_token_id": "</s>"}, "eos_token_id = '</s>'; expected a token id, or null"),
    ],
)
def test_what_is_no_clear_model_is_refused(family, change, message):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf({**full(family), **change}, path="models/a/config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("models/a/config.json")


def write(directory, change):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(full("llama") | change))
    return directory


def test_unknown_keys_are_named_with_their_file_and_can_be_passed_over(tmp_path):
    directory = write(tmp_path / "a", {"wild": 2, "rope_kind": "x", "absent": None, "off": False})
    with pytest.raises(UserError) as caught:
        convert.load_config(directory)
    assert str(caught.value) == (
        f"{directory}/config.json: unknown keys wild = 2, rope_kind = 'x'; if the model does not"
        " depend on it, pass over it with model.ignore_config_keys in a config, or with"
        " --ignore-config-keys wild,rope_kind"
    )
    assert convert.load_config(directory, ["wild", "rope_kind"]).num_layers == 30


def test_a_key_that_the_model_reads_cannot_be_passed_over(tmp_path):
    directory = write(tmp_path / "a", {"wild": 2})
    with pytest.raises(UserError, match=r"a/config.json: hidden_size cannot be ignored"):
        convert.load_config(directory, ["wild", "hidden_size"])


@pytest.mark.parametrize(
    "notes",
    [
        # SmolLM2
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
        },
        {"neftune_noise_alpha": 5.0},
        {"model_max_length": 4096, "max_sequence_length": 2048},
        {"unsloth_version": "2025.1", "num_beam_groups": 1, "diversity_penalty": 0.0},
    ],
)
def test_notes_of_other_trainers_are_harmless(notes):
    assert ModelConfig.from_hf({**full("llama"), **notes}) == ModelConfig.from_hf(full("llama"))


def test_a_note_beside_the_rope_is_harmless():
    # Yarn-Llama-2-7b-64k
    rope = {"type": "yarn", **YARN}
    raw = {"model_type": "llama", **SMALL}
    noted = ModelConfig.from_hf({**raw, "rope_scaling": {**rope, "finetuned": True}})
    assert noted == ModelConfig.from_hf({**raw, "rope_scaling": rope})


def test_configs_of_one_model_are_equal():
    # one spelling each: merges and resumed runs compare configs
    raw = full("qwen2")
    types = ["full_attention"] * 11 + ["sliding_attention"] * 19
    variants = [raw, {**raw, "layer_types": types}, {**raw, "max_window_layers": 11}]
    for a, b in itertools.pairwise(map(ModelConfig.from_hf, variants)):
        assert a == b
    off = {**raw, "max_window_layers": 30}
    assert ModelConfig.from_hf(off) == ModelConfig.from_hf({**raw, "use_sliding_window": False})
