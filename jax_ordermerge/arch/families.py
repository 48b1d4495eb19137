"""Model families: one row for each, with the flags in which it differs from Llama."""

import dataclasses
from collections.abc import Mapping
from typing import Final, Literal

from jax_ordermerge.json_types import JsonRow
from jax_ordermerge.registry import Registry

QkNorm = Literal["none", "per_head", "full"]
NormPlacement = Literal["before", "after", "both"]

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
        qk_norm: whether q and k are normalized, per head or over all heads.
        norm_placement: whether the norms of a layer are before attention and MLP, after, or both.
        window: which layers read `sliding_window`: none (the key is carried without a use), all,
            those that `use_sliding_window`, `max_window_layers` and `layer_types` say
            (`by_layer`), or those that `layer_types` alone says (`by_type`).
        full_attention_interval: where `by_type` lacks `layer_types`: every layer of a number that
            it divides, counted from 1, sees all earlier tokens.
        attention_bias, mlp_bias: whether the key of this name is read.
        no_rope_layers: whether keys say which layers have no rope.
        rope_theta: theta of a file without one.
        numbers: keys of the file that hold a number, and the field of `ModelConfig` that each
            fills. `defaults` has their values in a file that lacks them.
    """

    architecture: str
    defaults: JsonRow = dataclasses.field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: QkNorm = "none"
    norm_placement: NormPlacement = "before"
    window: Literal["none", "all", "by_layer", "by_type"] = "none"
    full_attention_interval: int = 1
    attention_bias: bool = False
    mlp_bias: bool = False
    no_rope_layers: bool = False
    rope_theta: float = 10000.0
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """The keys of `config.json` that this family reads and others do not."""
        without_rope = {"no_rope_layers", "no_rope_layer_interval"}
        return frozenset(self.numbers) | (without_rope if self.no_rope_layers else set())


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
        qk_norm="per_head",
        window="by_layer",
        attention_bias=True,
    ),
)
FAMILIES.register(
    "granite",
    Family(
        "GraniteForCausalLM",
        # neutral numbers, but for the scores: 1 and not 1 / sqrt(head_dim)
        defaults={
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        numbers={
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention_scale",
            "logits_scaling": "logit_divisor",
        },
        attention_bias=True,
        mlp_bias=True,
    ),
)
FAMILIES.register(
    "smollm3",
    Family(
        "SmolLM3ForCausalLM",
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
        attention_bias=True,
        mlp_bias=True,
        no_rope_layers=True,
        rope_theta=2000000.0,
    ),
)
_OLMO: Final = {
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "pad_token_id": 1,
}
FAMILIES.register(
    "olmo2",
    Family(
        "Olmo2ForCausalLM",
        defaults=_OLMO,
        qk_norm="full",
        norm_placement="after",
        attention_bias=True,
    ),
)
