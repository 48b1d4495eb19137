"""Model families: one row for each, with the flags in which it differs from Llama."""

import dataclasses

from jax_ordermerge.registry import Registry


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of decoder models by its `model_type` in `config.json`.

    Attributes:
        architecture: class of transformers that loads it.
        default_kv_heads: `num_key_value_heads` where the file has none; None is all heads.
        default_head_dim: `head_dim` where the file has none; None is hidden_size / heads.
        qkv_bias: whether q, k and v always have biases. Otherwise `attention_bias` says.
        qk_norm: whether q and k are normalized per head.
        sliding_window: whether `sliding_window` is read. Other families carry the key without
            using it.
        mlp_bias: whether `mlp_bias` is read.
        written_keys: optional keys that its `config.json` has.
    """

    architecture: str
    default_kv_heads: int | None = None
    default_head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: bool = False
    mlp_bias: bool = False
    written_keys: tuple[str, ...] = ()


# The defaults are those of transformers for files that leave a key out. Qwen2 has biases and Qwen3
# has norms of q and k without any key in the file that says so.
FAMILIES = Registry[Family]("model family")

FAMILIES.register(
    "llama",
    Family("LlamaForCausalLM", mlp_bias=True, written_keys=("attention_bias", "mlp_bias")),
)
FAMILIES.register(
    "mistral",
    Family(
        "MistralForCausalLM",
        default_kv_heads=8,
        # The first Mistral attends to a window; later ones have null under the same key.
        sliding_window=True,
        written_keys=("sliding_window",),
    ),
)
FAMILIES.register(
    "qwen2",
    Family(
        "Qwen2ForCausalLM",
        default_kv_heads=32,
        qkv_bias=True,
        written_keys=("use_sliding_window",),
    ),
)
FAMILIES.register(
    "qwen3",
    Family(
        "Qwen3ForCausalLM",
        default_kv_heads=32,
        # 128 in every size, so heads * head_dim may differ from hidden_size
        default_head_dim=128,
        qk_norm=True,
        written_keys=("attention_bias", "use_sliding_window"),
    ),
)
