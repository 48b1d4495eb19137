"""The files of published models: every key is known, and means what it means to transformers.

Written by hand after the files on the hub, with all their keys; lists of LongRoPE are shortened to
simple numbers.
"""

import pytest

from jax_ordermerge.arch import ModelConfig
from tests.test_hf_configs import ours, theirs

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
GRANITE = COMMON | {
    "architectures": ["GraniteForCausalLM"],
    "attention_dropout": 0.1,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "logits_scaling": 8.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "transformers_version": "4.49.0",
    "vocab_size": 49159,
}
SMOLLM3 = COMMON | {
    "architectures": ["SmolLM3ForCausalLM"],
    "bos_token_id": None,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "transformers_version": "4.54.0.dev0",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
OLMO2 = COMMON | {
    "_attn_implementation_autoset": True,
    "architectures": ["Olmo2ForCausalLM"],
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "transformers_version": "4.49.0",
    "vocab_size": 100352,
}
OLMO3 = {key: value for key, value in OLMO2.items() if key != "_attn_implementation_autoset"} | {
    "architectures": ["Olmo3ForCausalLM"],
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "sliding_window": 4096,
    "transformers_version": "4.57.0",
    "vocab_size": 100278,
}
GEMMA2 = COMMON | {
    "_attn_implementation": "eager",
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "transformers_version": "4.42.0.dev0",
    "vocab_size": 256000,
}
GEMMA3 = COMMON | {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
PHI3 = COMMON | {
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "transformers_version": "4.40.2",
    "vocab_size": 32064,
}
LONG = {
    "type": "longrope",
    "short_factor": [1 + pair / 32 for pair in range(48)],
    "long_factor": [1.0 + pair for pair in range(48)],
}
FILES = {
    "granite-3.3-2b-instruct": (GRANITE, 131072),
    "SmolLM3-3B": (SMOLLM3, 65536),
    # as its card asks users to, for longer texts
    "SmolLM3-3B with YaRN": (
        SMOLLM3
        | {
            "rope_scaling": {
                "factor": 2.0,
                "original_max_position_embeddings": 65536,
                "rope_type": "yarn",
            }
        },
        131072,
    ),
    "OLMo-2-0325-32B-Instruct": (OLMO2, 4096),
    "Olmo-3-32B-Think": (OLMO3, 65536),
    "gemma-2-27b-it": (GEMMA2, 8192),
    "gemma-3-270m-it": (GEMMA3, 32768),
    "gemma-3-1b-it": (
        {key: value for key, value in GEMMA3.items() if key != "layer_types"}
        | {"num_hidden_layers": 26, "sliding_window_pattern": 6, "rope_local_base_freq": 10000},
        32768,
    ),
    # the text model of a file with images, as others publish it: 131072 positions are the extended
    "gemma-3-4b-it-text": (
        GEMMA3
        | {
            "max_position_embeddings": 131072,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "unsloth_fixed": True,
            "unsloth_version": "2025.9.1",
            "model_name": "unsloth/gemma-3-4b-it",
        },
        131072,
    ),
    "Phi-3-mini-4k-instruct": (PHI3, 4096),
    "Phi-3.5-mini-instruct": (
        PHI3 | {"max_position_embeddings": 131072, "rope_scaling": LONG, "sliding_window": 262144},
        131072,
    ),
    "phi-4": (
        PHI3
        | {
            "hidden_size": 5120,
            "max_position_embeddings": 16384,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "original_max_position_embeddings": 16384,
            "rope_theta": 250000,
            "sliding_window": None,
        },
        16384,
    ),
    "Phi-4-mini-instruct": (
        PHI3
        | {
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.75,
            "rope_scaling": LONG,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
        131072,
    ),
}


def check(raw):
    """Compare with transformers; ropes by type of layer of OLMo 3 in test_rope_configs.py."""
    apart = {"sliding_theta": None} if raw["model_type"] == "olmo3" else {}
    assert ours(raw) | apart == theirs(raw) | apart


@pytest.mark.parametrize("name", FILES)
def test_files_of_published_models_are_read(name):
    raw, context = FILES[name]
    check(raw)
    config = ModelConfig.from_hf(raw)
    assert config.context_length == context
    written = config.to_hf("bfloat16")
    assert ModelConfig.from_hf(written) == config
    check(written)
