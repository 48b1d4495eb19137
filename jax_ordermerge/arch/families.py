"""Model families: one row for each, with the flags in which it differs from Llama."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal

from jax_ordermerge.arch.rope import RopeKeys
from jax_ordermerge.json_types import JsonRow, JsonValue
from jax_ordermerge.registry import Registry

QkNorm = Literal["none", "per_head", "full"]
NormPlacement = Literal["before", "after", "both"]
Activation = Literal["silu", "gelu_tanh"]

# How files spell the activations; what is written comes first.
ACTIVATIONS: Final[dict[Activation, tuple[str, ...]]] = {
    "silu": ("silu", "swish"),
    "gelu_tanh": ("gelu_pytorch_tanh",),
}

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
        models: published models of this type, for docs/models.md.
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
        activation_key: the key of the activation.
        rope: how its keys are read.
        sliding_rope: how those of the layers with a window are, where they have a rope of their
            own.
        interval_key: the key of `full_attention_interval`, if there is one.
        numbers: keys of the file that hold a number, and the field of `ModelConfig` that each
            fills. `defaults` has their values in a file that lacks them.
        fields: fields of `ModelConfig` that no key fills.
        must_be: further keys of its files, and their values without effect.
    """

    architecture: str
    models: str = ""
    defaults: JsonRow = dataclasses.field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: QkNorm = "none"
    norm_placement: NormPlacement = "before"
    window: Literal["none", "all", "by_layer", "by_type"] = "none"
    full_attention_interval: int = 1
    interval_key: str = ""
    attention_bias: bool = False
    mlp_bias: bool = False
    no_rope_layers: bool = False
    activation_key: str = "hidden_act"
    rope: RopeKeys = dataclasses.field(default_factory=RopeKeys)
    sliding_rope: RopeKeys | None = None
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    must_be: Mapping[str, tuple[JsonValue, ...]] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """The keys of `config.json` that this family reads and others do not."""
        keys = set(self.numbers)
        if self.no_rope_layers:
            keys |= {"no_rope_layers", "no_rope_layer_interval"}
        if self.rope.partial:
            keys.add("partial_rotary_factor")
        if self.sliding_rope is not None:
            keys.add(self.sliding_rope.theta_key)
        if self.interval_key:
            keys.add(self.interval_key)
        return frozenset(keys)


# Qwen2 has biases and Qwen3 has norms of q and k without any key in the file that says so.
FAMILIES = Registry[Family]("model family")

FAMILIES.register(
    "llama",
    Family(
        "LlamaForCausalLM",
        "Llama 2 to 3.3, SmolLM2, Yi, TinyLlama",
        attention_bias=True,
        mlp_bias=True,
    ),
)
FAMILIES.register(
    "mistral",
    Family(
        "MistralForCausalLM",
        "Mistral 7B, Nemo",
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
    "qwen2",
    Family(
        "Qwen2ForCausalLM",
        "Qwen 1.5 to 2.5, DeepSeek-R1-Distill-Qwen",
        defaults=_QWEN,
        qkv_bias=True,
        window="by_layer",
    ),
)
FAMILIES.register(
    "qwen3",
    Family(
        "Qwen3ForCausalLM",
        "Qwen3, dense",
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
        "Granite 3.0 to 3.3 and 4.1, dense",
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
        "SmolLM3",
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
        rope=RopeKeys(theta=2000000.0),
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
        "OLMo 2",
        defaults=_OLMO,
        qk_norm="full",
        norm_placement="after",
        attention_bias=True,
    ),
)
FAMILIES.register(
    "olmo3",
    Family(
        "Olmo3ForCausalLM",
        "OLMo 3",
        defaults=_OLMO,
        qk_norm="full",
        norm_placement="after",
        window="by_type",
        full_attention_interval=4,
        attention_bias=True,
        rope=RopeKeys(theta=500000.0),
        # YaRN is of the layers without a window alone; the base of the frequencies is shared
        sliding_rope=RopeKeys(theta=500000.0, theta_key="rope_theta", kinds={"default": "default"}),
    ),
)
_GEMMA: Final = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "query_pre_attn_scalar": 256,
}
# The scale of the embeddings is the root of their size, and the weights of norms count from 1.
_GEMMA_FIELDS: Final = {"activation": "gelu_tanh", "embedding_scale": None, "norm_offset": 1.0}
_GEMMA_MUST_BE: Final = {
    # transformers reads the first alone
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "use_bidirectional_attention": (False, None),
}
FAMILIES.register(
    "gemma2",
    Family(
        "Gemma2ForCausalLM",
        "Gemma 2",
        defaults={
            **_GEMMA,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norm_placement="both",
        window="by_type",
        full_attention_interval=2,
        attention_bias=True,
        activation_key="hidden_activation",
        numbers={
            "query_pre_attn_scalar": "attention_scale",
            "attn_logit_softcapping": "attention_softcap",
            "final_logit_softcapping": "logit_softcap",
        },
        fields=_GEMMA_FIELDS,
        must_be=_GEMMA_MUST_BE,
    ),
)
FAMILIES.register(
    "gemma3_text",
    Family(
        "Gemma3ForCausalLM",
        "Gemma 3 270M and 1B",
        defaults={
            **_GEMMA,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            # no caps as in Gemma 2: norms of q and k bound the scores
            "final_logit_softcapping": None,
        },
        qk_norm="per_head",
        norm_placement="both",
        window="by_type",
        full_attention_interval=6,
        # older files give the interval under this key; Gemma 2 has it in its code
        interval_key="sliding_window_pattern",
        attention_bias=True,
        activation_key="hidden_activation",
        # the factor of 8 from 4B on is between 128K, which the files count, and 16K
        rope=RopeKeys(theta=1000000.0, counts_extended=True),
        # one key in transformers 4
        sliding_rope=RopeKeys(theta_key="rope_local_base_freq", kinds={"default": "default"}),
        numbers={
            "query_pre_attn_scalar": "attention_scale",
            "final_logit_softcapping": "logit_softcap",
        },
        fields=_GEMMA_FIELDS,
        must_be=_GEMMA_MUST_BE,
    ),
)
FAMILIES.register(
    "phi3",
    Family(
        "Phi3ForCausalLM",
        "Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini",
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
            "sliding_window": None,
        },
        window="all",
        rope=RopeKeys(
            # older files call LongRoPE so
            kinds={
                "default": "default",
                "longrope": "longrope",
                "su": "longrope",
                "yarn": "longrope",
            },
            partial=True,
            original=4096,
        ),
        # q, k and v are one matrix in its files, as are gate and up: an adapter is of the whole
        fields={"fused_projections": True},
        # of Phi-4-mini, whose own code reads them
        must_be={"full_attn_mod": (1, None), "interpolate_factor": (1, None)},
    ),
)
