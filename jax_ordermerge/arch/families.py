"""Model families: one row for each, with the flags in which it differs from Llama."""

import dataclasses
from typing import Final, Literal

from jax_ordermerge.json_types import JsonRow
from jax_ordermerge.registry import Registry

# What the config classes of transformers take where a file leaves a key out. A file of transformers
# may lack any key, and then means these: a window that is read as absent is another model.
DEFAULTS: Final[JsonRow] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as attention heads
    "head_dim": None,  # hidden_size / attention heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.02,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of decoder models by its `model_type` in `config.json`.

    Attributes:
        architecture: class of transformers that loads it.
        defaults: values of keys that a file lacks, where they differ from those of Llama.
        qkv_bias: whether q, k and v always have biases. Otherwise `attention_bias` says.
        qk_norm: whether q and k are normalized per head.
        window: which layers read `sliding_window`: none (the key is carried without a use), all,
            or those that `use_sliding_window`, `max_window_layers` and `layer_types` say.
        attention_bias, mlp_bias: whether the key of this name is read.
    """

    architecture: str
    defaults: JsonRow = dataclasses.field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["none", "all", "by_layer"] = "none"
    attention_bias: bool = False
    mlp_bias: bool = False


# Qwen2 has biases and Qwen3 has norms of q and k without any key in the file that says so.
FAMILIES = Registry[Family]("model family")

FAMILIES.register("llama", Family("LlamaForCausalLM", attention_bias=True, mlp_bias=True))
FAMILIES.register(
    "mistral",
    Family(
        "MistralForCausalLM",
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
        # The first Mistral attends to a window; later ones have null under the same key.
        window="all",
    ),
)
_QWEN: Final = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES.register(
    "qwen2", Family("Qwen2ForCausalLM", defaults=_QWEN, qkv_bias=True, window="by_layer")
)
FAMILIES.register(
    "qwen3",
    Family(
        "Qwen3ForCausalLM",
        # heads * 128 may differ from hidden_size
        defaults={**_QWEN, "head_dim": 128},
        qk_norm=True,
        window="by_layer",
        attention_bias=True,
    ),
)
