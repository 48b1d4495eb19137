"""What a model is: `ModelConfig` (from and to a Hugging Face config) and the tensor table.

Each tensor is declared once, in `tensor_table`. Initialization, shardings, conversion, counts, merge units and tests are derived
from it; a Hugging Face tensor name is written nowhere else.

Axis letters: `L` layer, `D` embed, `F` mlp, `N` heads, `K` kv heads, `H` head dim, `V` vocab.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from jax_ordermerge.errors import UserError, did_you_mean

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "llama3")

# Keys that name mathematics this project does not do, and the values at which they do nothing.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_decoder": (False, True, None),
    "logit_scale": (1, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "residual_multiplier": (1, None),
    "embedding_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "pruned_heads": ({}, None),
}
_READ = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "layer_types",
}
# Keys that say nothing about the forward pass (training, serving and bookkeeping).
_NEUTRAL = {
    "architectures",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "attention_dropout",
    "auto_map",
    "pretraining_tp",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "id2label",
    "label2id",
    "finetuning_task",
    "task_specific_params",
    "problem_type",
    "chunk_size_feed_forward",
    "tokenizer_class",
    "prefix",
    "unk_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "rope_interleaved",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "unsloth_version",
    "unsloth_fixed",
    "_attn_implementation_autoset",
    "attn_implementation",
    "use_bfloat16",
    "tf_legacy_loss",
    "cross_attention_hidden_size",
    "tie_encoder_decoder",
    "remove_invalid_values",
    "max_length",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "num_beams",
    "length_penalty",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "num_return_sequences",
}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position parameters: `kind` default, linear (positions / factor) or llama3 (frequency-dependent factor)."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the mathematics of one Llama-family model. Hashable, so it can be a static argument of `jax.jit`.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> config.head_dim, config.num_kv_heads, parameter_count(config)
        (4, 2, 1832)
    """

    family: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden_size / num_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    sliding_window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(
                f"model family '{self.family}' is not supported{did_you_mean(self.family, FAMILIES)}"
            )
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} kv heads; heads must be a multiple"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], ignore: Iterable[str] = ()) -> "ModelConfig":
        """Read the dict of a `config.json`.

        Args:
            config: the parsed file, written by any transformers from 4.3x to 5.x.
            ignore: keys to pass over although they are unknown.

        Raises:
            UserError: a key that changes the mathematics and is not supported, or an unknown key, is named.

        Example:
            >>> ModelConfig.from_hf({"model_type": "llama", "hidden_act": "gelu"})
            Traceback (most recent call last):
            ...
            jax_ordermerge.errors.UserError: config.json: hidden_act = 'gelu' is not supported (supported: 'silu', 'swish')
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"config.json: model_type = {family!r} is not supported (supported: {', '.join(FAMILIES)})"
            )
        _refuse_unsupported(config, family, set(ignore))
        missing = [
            k
            for k in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
            if k not in config
        ]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        heads = config["num_attention_heads"]
        bias = bool(config.get("attention_bias", False))
        eos = config.get("eos_token_id")
        return cls(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or _DEFAULT_KV_HEADS.get(family, heads),
            head_dim=config.get("head_dim")
            or (128 if family == "qwen3" else config["hidden_size"] // heads),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(config),
            sliding_window=config.get("sliding_window") if family == "mistral" else None,
            qkv_bias=bias or family == "qwen2",
            output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=()
            if eos is None
            else tuple(eos)
            if isinstance(eos, (list, tuple))
            else (eos,),
            pad_token_id=config.get("pad_token_id"),
            initializer_range=config.get("initializer_range", 0.02),
        )

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """Return a `config.json` dict that transformers 4 and 5, vLLM, SGLang and llama.cpp read the same way.

        Rope parameters are written both the old and the new way: a file with `rope_parameters` alone is silently misread by
        transformers 4.

        Args:
            dtype: the dtype of the tensors beside it, e.g. `"bfloat16"`.

        Example:
            >>> config = ModelConfig(
            ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
            ... )
            >>> ModelConfig.from_hf(config.to_hf("float32")) == config
            True
        """
        rope: dict[str, Any] = {"rope_type": self.rope.kind}
        if self.rope.kind != "default":
            rope["factor"] = self.rope.factor
        if self.rope.kind == "llama3":
            rope |= {
                "low_freq_factor": self.rope.low_freq_factor,
                "high_freq_factor": self.rope.high_freq_factor,
                "original_max_position_embeddings": self.rope.original_max_position_embeddings,
            }
        eos = self.eos_token_ids
        out: dict[str, Any] = {
            "architectures": [FAMILIES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.kind == "default" else rope,
            "rope_parameters": {**rope, "rope_theta": self.rope.theta},
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        if self.family in ("llama", "qwen3"):
            out["attention_bias"] = self.output_bias
        if self.family == "llama":
            out["mlp_bias"] = self.mlp_bias
        if self.family == "mistral":
            out["sliding_window"] = self.sliding_window
        if self.family in ("qwen2", "qwen3"):
            out["use_sliding_window"] = False
        return out


# Shapes of published models, for plans where their files are not at hand.
ARCHITECTURES = {
    "llama-2-7b": ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        max_position_embeddings=4096,
    ),
    "llama-2-13b": ModelConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        max_position_embeddings=4096,
    ),
    "llama-2-70b": ModelConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        max_position_embeddings=4096,
    ),
    "llama-3.1-8b": ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        max_position_embeddings=131072,
        rope=Rope(theta=500000.0, kind="llama3", factor=8.0, original_max_position_embeddings=8192),
    ),
}


def architecture_of(name: str) -> ModelConfig | None:
    """Return the architecture of a published model by its name, on the hub or in `ARCHITECTURES`; None where it is not known.

    Example:
        >>> architecture_of("meta-llama/Llama-2-7b-hf").num_layers, architecture_of("my/own-7b")
        (32, None)
    """
    short = name.split("/")[-1].lower()
    for ending in ("-hf", "-instruct", "-chat"):
        short = short.removesuffix(ending)
    return ARCHITECTURES.get(short)


def _refuse_unsupported(config: Mapping[str, Any], family: str, ignore: set[str]) -> None:
    for key, value in config.items():
        if key in ignore:
            continue
        if key in _MUST_BE:
            if value not in _MUST_BE[key]:
                shown = ", ".join(repr(v) for v in _MUST_BE[key] if v is not None) or "absent"
                raise UserError(
                    f"config.json: {key} = {value!r} is not supported (supported: {shown})"
                )
        elif key == "layer_types":
            if set(value or ()) - {"full_attention"}:
                raise UserError(
                    f"config.json: layer_types with {sorted(set(value) - {'full_attention'})} is not supported"
                )
        elif key not in _READ and key not in _NEUTRAL and value not in (None, False):
            raise UserError(
                f"config.json: unknown key {key} = {value!r}; if it does not change the model, name it in model.ignore_config_keys"
            )
    if family != "llama" and config.get("mlp_bias"):
        raise UserError(f"config.json: mlp_bias = True is not supported for {family}")


def _rope_from_hf(config: Mapping[str, Any]) -> Rope:
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    theta = new.get("rope_theta", config.get("rope_theta", 10000.0))
    scaling = new or old
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(
            f"config.json: rope type '{kind}' is not supported (supported: {', '.join(ROPE_TYPES)})"
        )
    known = {"rope_theta", "rope_type", "type"} | {f.name for f in dataclasses.fields(Rope)}
    for key, value in scaling.items():
        if key == "partial_rotary_factor" and value == 1:
            continue
        if key not in known:
            raise UserError(f"config.json: rope parameter {key} is not supported for type '{kind}'")
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }[kind]
    absent = [name for name in names if name not in scaling]
    if absent:
        raise UserError(f"config.json: rope type '{kind}' lacks {', '.join(absent)}")
    return Rope(theta=float(theta), kind=kind, **{name: scaling[name] for name in names})


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One entry of the tensor table.

    Attributes:
        path: `"layers/attention/q/weight"`, where the array lives in the parameter dict (see `tree.flatten`).
        shape: with the leading `L` axis when stacked.
        axes: a logical axis name for each dimension (`mesh.RULES`).
        init: initializer, `normal` (std `initializer_range`), `ones`, `zeros`, or `uniform` (in ±1/sqrt(last axis); adapters alone).
        hf_name: the Hugging Face name; `{}` stands for the layer number when stacked.
        kind: what merge filters and reports call it.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "ones", "zeros", "uniform"]
    hf_name: str
    kind: Literal["embedding", "norm", "attention", "mlp", "head"]

    @property
    def stacked(self) -> bool:
        """Whether the array holds all layers on a leading `L` axis."""
        return self.axes[0] == "layer"

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one Hugging Face tensor, which is the unit of merging."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def is_matrix(self) -> bool:
        """Whether it is neither a norm nor a bias."""
        return len(self.hf_shape) >= 2

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a matrix of a layer: neither norm, bias, embedding nor head."""
        return self.is_matrix and self.kind not in ("embedding", "head")

    def hf_names(self) -> tuple[str, ...]:
        """The Hugging Face names in layer order; one name when not stacked."""
        return (
            tuple(self.hf_name.format(i) for i in range(self.shape[0]))
            if self.stacked
            else (self.hf_name,)
        )


def tensor_table(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Declare every tensor of a model, in the order of the forward pass.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> spec = tensor_table(config)[2]
        >>> spec.path, spec.shape, spec.hf_names()[1]
        ('layers/attention/q/weight', (2, 8, 8), 'model.layers.1.self_attn.q_proj.weight')
    """
    L, D, F, V = config.num_layers, config.hidden_size, config.intermediate_size, config.vocab_size
    NH, KH, H = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.head_dim,
    )
    block = "model.layers.{}."
    specs = [
        TensorSpec(
            "embed/weight",
            (V, D),
            ("vocab", "embed"),
            "normal",
            "model.embed_tokens.weight",
            "embedding",
        )
    ]

    def norm(path: str, width: int, hf: str) -> None:
        specs.append(
            TensorSpec(
                f"layers/{path}/weight",
                (L, width),
                ("layer", "norm"),
                "ones",
                f"{block}{hf}.weight",
                "norm",
            )
        )

    def linear(
        path: str,
        hf: str,
        out: tuple[int, str],
        inp: tuple[int, str],
        bias: bool,
        kind: Literal["attention", "mlp"],
    ) -> None:
        axes = ("layer", out[1], inp[1])
        specs.append(
            TensorSpec(
                f"layers/{path}/weight",
                (L, out[0], inp[0]),
                axes,
                "normal",
                f"{block}{hf}.weight",
                kind,
            )
        )
        if bias:
            specs.append(
                TensorSpec(
                    f"layers/{path}/bias", (L, out[0]), axes[:2], "zeros", f"{block}{hf}.bias", kind
                )
            )

    norm("input_norm", D, "input_layernorm")
    linear(
        "attention/q", "self_attn.q_proj", (NH, "heads"), (D, "embed"), config.qkv_bias, "attention"
    )
    linear(
        "attention/k",
        "self_attn.k_proj",
        (KH, "kv_heads"),
        (D, "embed"),
        config.qkv_bias,
        "attention",
    )
    linear(
        "attention/v",
        "self_attn.v_proj",
        (KH, "kv_heads"),
        (D, "embed"),
        config.qkv_bias,
        "attention",
    )
    if config.qk_norm:
        norm("attention/q_norm", H, "self_attn.q_norm")
        norm("attention/k_norm", H, "self_attn.k_norm")
    linear(
        "attention/o",
        "self_attn.o_proj",
        (D, "embed"),
        (NH, "heads"),
        config.output_bias,
        "attention",
    )
    norm("post_norm", D, "post_attention_layernorm")
    linear("mlp/gate", "mlp.gate_proj", (F, "mlp"), (D, "embed"), config.mlp_bias, "mlp")
    linear("mlp/up", "mlp.up_proj", (F, "mlp"), (D, "embed"), config.mlp_bias, "mlp")
    linear("mlp/down", "mlp.down_proj", (D, "embed"), (F, "mlp"), config.mlp_bias, "mlp")
    specs.append(TensorSpec("norm/weight", (D,), ("norm",), "ones", "model.norm.weight", "norm"))
    if not config.tie_embeddings:
        specs.append(
            TensorSpec(
                "head/weight", (V, D), ("vocab", "embed"), "normal", "lm_head.weight", "head"
            )
        )
    return tuple(specs)


def hf_tensors(config: ModelConfig) -> Iterator[tuple[str, TensorSpec, int | None]]:
    """Yield `(hf_name, spec, layer)` for every Hugging Face tensor, layer by layer; `layer` is None when not stacked.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> [name for name, _, layer in hf_tensors(config) if layer is None]
        ['model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight']
    """
    table = tensor_table(config)
    first_stacked = next(i for i, spec in enumerate(table) if spec.stacked)
    yield from ((spec.hf_name, spec, None) for spec in table[:first_stacked])
    stacked = [spec for spec in table if spec.stacked]
    for layer in range(config.num_layers):
        yield from ((spec.hf_name.format(layer), spec, layer) for spec in stacked)
    yield from ((spec.hf_name, spec, None) for spec in table[first_stacked:] if not spec.stacked)


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters; a tied head is not counted twice.

    Example:
        >>> parameter_count(
        ...     ModelConfig(
        ...         vocab_size=32,
        ...         hidden_size=8,
        ...         intermediate_size=16,
        ...         num_layers=1,
        ...         num_heads=2,
        ...         tie_embeddings=True,
        ...     )
        ... )
        920
    """
    return sum(math.prod(spec.shape) for spec in tensor_table(config))
