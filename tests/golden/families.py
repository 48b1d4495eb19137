"""Tiny models of every family, with weights and tokens that need no random numbers."""

import dataclasses

import numpy as np

from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig, Rope, tensor_table

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = Rope(
    theta=500.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
# as Qwen publishes it: everything but these three is derived
YARN = Rope(theta=500.0, kind="yarn", factor=4.0, original_max_position_embeddings=64)
_GEMMA = {
    **_SMALL,
    "num_kv_heads": 2,
    "head_dim": 12,
    "norm_placement": "both",
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
    "embedding_scale": None,
    "tie_embeddings": True,
}
FAMILIES = {
    "llama2": ModelConfig(**_SMALL),
    "llama2_tied": ModelConfig(**_SMALL, tie_embeddings=True),
    "llama_gqa_bias": ModelConfig(
        **_SMALL, num_kv_heads=2, qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "llama_linear_rope": ModelConfig(**_SMALL, rope=Rope(theta=1000.0, kind="linear", factor=2.5)),
    "llama31": ModelConfig(**_SMALL, num_kv_heads=2, rope=LLAMA3),
    "llama_head_dim": ModelConfig(**_SMALL, num_kv_heads=1, head_dim=12),
    "mistral_window": ModelConfig(family="mistral", **_SMALL, num_kv_heads=2, sliding_window=7),
    "qwen2": ModelConfig(
        family="qwen2", **_SMALL, num_kv_heads=2, qkv_bias=True, tie_embeddings=True
    ),
    "qwen3": ModelConfig(family="qwen3", **_SMALL, num_kv_heads=2, head_dim=16, qk_norm="per_head"),
    "qwen3_bias": ModelConfig(
        family="qwen3",
        **_SMALL,
        num_kv_heads=2,
        head_dim=16,
        qk_norm="per_head",
        qkv_bias=True,
        output_bias=True,
        tie_embeddings=True,
    ),
    "llama_yarn": ModelConfig(
        **_SMALL,
        head_dim=12,
        rope=dataclasses.replace(
            YARN, beta_fast=6.0, beta_slow=1.5, mscale=0.7, mscale_all_dim=0.3, truncate=False
        ),
    ),
    "mistral_yarn": ModelConfig(
        family="mistral",
        **_SMALL,
        num_kv_heads=2,
        sliding_window=15,
        rope=dataclasses.replace(YARN, attention_factor=1.5),
    ),
    "qwen2_yarn": ModelConfig(family="qwen2", **_SMALL, num_kv_heads=2, qkv_bias=True, rope=YARN),
    "qwen2_window": ModelConfig(
        family="qwen2",
        **_SMALL,
        num_kv_heads=2,
        qkv_bias=True,
        sliding_window=7,
        full_attention_layers=(0,),
    ),
    "qwen3_window": ModelConfig(
        family="qwen3",
        **_SMALL | {"num_layers": 4},
        num_kv_heads=2,
        head_dim=16,
        qk_norm="per_head",
        sliding_window=5,
        full_attention_layers=(1, 3),
        rope=YARN,
    ),
    "granite": ModelConfig(
        family="granite",
        **_SMALL,
        num_kv_heads=2,
        embedding_scale=3.0,
        residual_scale=0.7,
        attention_scale=0.2,
        logit_divisor=2.5,
        tie_embeddings=True,
    ),
    "smollm3": ModelConfig(
        family="smollm3",
        **_SMALL | {"num_layers": 3},
        num_kv_heads=2,
        no_rope_layers=(1,),
        tie_embeddings=True,
    ),
    "olmo2": ModelConfig(
        family="olmo2", **_SMALL, num_kv_heads=2, qk_norm="full", norm_placement="after"
    ),
    "olmo3": ModelConfig(
        family="olmo3",
        **_SMALL | {"num_layers": 3},
        num_kv_heads=2,
        qk_norm="full",
        norm_placement="after",
        sliding_window=5,
        full_attention_layers=(1,),
        rope=YARN,
        sliding_rope=Rope(theta=500.0),
    ),
    "gemma2": ModelConfig(
        family="gemma2",
        **_GEMMA,
        attention_scale=20**-0.5,
        sliding_window=7,
        full_attention_layers=(1,),
        attention_softcap=1.5,
        logit_softcap=2.0,
    ),
    "gemma3": ModelConfig(
        family="gemma3_text",
        **_GEMMA | {"num_layers": 3},
        qk_norm="per_head",
        attention_scale=9**-0.5,
        sliding_window=5,
        full_attention_layers=(2,),
        logit_softcap=3.0,
        rope=Rope(theta=5000.0, kind="linear", factor=8.0),
        sliding_rope=Rope(theta=300.0),
    ),
    "phi3": ModelConfig(
        family="phi3", **_SMALL, num_kv_heads=2, fused_projections=True, sliding_window=11
    ),
    # Half of the rows are longer than the original length: see `LENGTH`.
    "phi4_mini": ModelConfig(
        family="phi3",
        **_SMALL | {"hidden_size": 64},
        num_kv_heads=1,
        fused_projections=True,
        max_position_embeddings=80,
        tie_embeddings=True,
        rope=Rope(
            theta=500.0,
            kind="longrope",
            factor=4.0,
            original_max_position_embeddings=20,
            short_factor=(1.0, 1.1, 1.3, 1.6, 2.0, 2.5),
            long_factor=(1.2, 1.9, 3.0, 4.5, 7.0, 11.0),
            partial_rotary_factor=0.75,
        ),
    ),
}
LENGTH = 24


def weights(config: ModelConfig) -> tree.Tree:
    """Sines of indices: about 0.2 in size, biases non-zero, norms around 1 but not 1."""
    flat = {}
    for number, spec in enumerate(tensor_table(config)):
        index = np.arange(np.prod(spec.shape), dtype=np.float64)
        waves = np.sin(index * (1.7 + 0.13 * number) + number) * np.cos(
            index * index * 0.0031 + 0.5 * number
        )
        values = 1 + 0.3 * waves if spec.init == "ones" else 0.35 * waves
        flat[spec.path] = values.reshape(spec.shape).astype(np.float32)
    return tree.unflatten(flat)


def tokens(config: ModelConfig, length: int = LENGTH) -> np.ndarray:
    """int32[2, length]."""
    index = np.arange(2 * length).reshape(2, length)
    return ((index * index * 7 + index * 13 + 5) % config.vocab_size).astype(np.int32)
