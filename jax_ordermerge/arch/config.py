"""`ModelConfig`: the shape and mathematics of a model, from and to a Hugging Face config."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from jax_ordermerge.arch.families import FAMILIES
from jax_ordermerge.arch.hf_keys import check_keys
from jax_ordermerge.errors import UserError

RopeType = Literal["default", "linear", "llama3"]
# The parameters that each type of rope needs, besides theta.
_ROPE_PARAMETERS: Final[dict[RopeType, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
# No default is safe for these: a wrong size would only show when the tensors are read.
_REQUIRED: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position parameters.

    Attributes:
        theta: base of the frequencies.
        kind: default; linear (positions / factor); llama3 (a factor that depends on frequency).
        factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: as in
            transformers.
    """

    theta: float = 10000.0
    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and mathematics of a decoder model.

    It is hashable, so it can be a static argument of `jax.jit`.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> config.head_dim, config.num_kv_heads
        (4, 2)
    """

    family: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    # 0 and not None: `__post_init__` fills both in, so readers always see an int.
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
    # A tuple, because a list would make the config unhashable; chat models have several.
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        FAMILIES[self.family]  # refuses an unknown family
        # `object.__setattr__`, because the dataclass is frozen
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        # Grouped-query attention reshapes heads to [kv heads, group], which needs equal groups.
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} kv heads;"
                " heads must be a multiple"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], ignore: Iterable[str] = ()) -> "ModelConfig":
        """Read the dict of a `config.json`.

        Args:
            config: the parsed file, written by any transformers from 4.3x to 5.x.
            ignore: keys to ignore although they are unknown.

        Raises:
            UserError: a key is unknown, or changes the model in a way that is not supported.

        Example:
            >>> ModelConfig.from_hf({"model_type": "llama", "hidden_act": "gelu"})
            Traceback (most recent call last):
            ...
            jax_ordermerge.errors.UserError: config.json: hidden_act = 'gelu' is not supported
            (supported: 'silu', 'swish')
        """
        name = config.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            raise UserError(
                f"config.json: model_type = {name!r} is not supported"
                f" (supported: {', '.join(FAMILIES)})"
            )
        family = FAMILIES[name]
        # Before any value is read: an unsupported option must not be hidden by a missing key.
        check_keys(config, frozenset(ignore))
        # `mlp_bias` is a known key, so `check_keys` lets it pass; only Llama acts on it.
        if config.get("mlp_bias") and not family.mlp_bias:
            raise UserError(f"config.json: mlp_bias = True is not supported for {name}")
        missing = [key for key in _REQUIRED if key not in config]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        bias = bool(config.get("attention_bias", False))
        eos = config.get("eos_token_id")
        # Hugging Face writes one id as an int and several as a list.
        eos_ids = () if eos is None else eos if isinstance(eos, list | tuple) else (eos,)
        return cls(
            family=name,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            # `or` and not a default of `get`: a file may hold an explicit null.
            num_kv_heads=config.get("num_key_value_heads") or family.default_kv_heads or 0,
            head_dim=config.get("head_dim") or family.default_head_dim or 0,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(config),
            # Qwen2 files have a sliding_window too; `use_sliding_window: false` turns it off
            sliding_window=config.get("sliding_window") if family.sliding_window else None,
            qkv_bias=bias or family.qkv_bias,
            # `attention_bias` covers all four matrices. The fixed biases of Qwen2 are of q, k and v
            # alone.
            output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(eos_ids),
            pad_token_id=config.get("pad_token_id"),
            initializer_range=config.get("initializer_range", 0.02),
        )

    def with_ends(self, ends: Iterable[int]) -> "ModelConfig":
        """Return this config with further end-of-sequence tokens before its own.

        Some readers know one end only and take the first. So ends that a fine-tune has learned go
        before those of its base, unless the base has all of them.

        Example:
            >>> config = ModelConfig(
            ...     vocab_size=32,
            ...     hidden_size=8,
            ...     intermediate_size=16,
            ...     num_layers=2,
            ...     num_heads=2,
            ...     eos_token_ids=(1, 2),
            ... )
            >>> config.with_ends([2]).eos_token_ids, config.with_ends([2, 5]).eos_token_ids
            ((1, 2), (2, 5, 1))
        """
        ends = tuple(ends)
        if set(ends) <= set(self.eos_token_ids):
            return self
        return dataclasses.replace(
            self, eos_token_ids=tuple(dict.fromkeys((*ends, *self.eos_token_ids)))
        )

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """Return a `config.json` that transformers 4 and 5, vLLM, SGLang and llama.cpp read alike.

        Args:
            dtype: dtype of the tensors beside the file, e.g. `"bfloat16"`.

        Example:
            >>> config = ModelConfig(
            ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
            ... )
            >>> ModelConfig.from_hf(config.to_hf("float32")) == config
            True
        """
        family = FAMILIES[self.family]
        rope: dict[str, Any] = {"rope_type": self.rope.kind}
        rope |= {name: getattr(self.rope, name) for name in _ROPE_PARAMETERS[self.rope.kind]}
        eos = self.eos_token_ids
        # Keys that a family of transformers does not know are left out of its file.
        optional = {
            "attention_bias": self.output_bias,
            "mlp_bias": self.mlp_bias,
            "sliding_window": self.sliding_window,
            "use_sliding_window": False,
        }
        return {
            "architectures": [family.architecture],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            # Always written: where it is absent, readers assume hidden_size / heads, wrong for
            # Qwen3.
            "head_dim": self.head_dim,
            # The only activation that `check_keys` lets through; `swish` is another name of it.
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            # Rope is written in both forms: transformers 4 silently misreads a file that has
            # `rope_parameters` alone.
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.kind == "default" else rope,
            "rope_parameters": {**rope, "rope_theta": self.rope.theta},
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            # transformers 5 reads `dtype`, transformers 4 reads `torch_dtype`.
            "dtype": dtype,
            "torch_dtype": dtype,
        } | {key: optional[key] for key in family.written_keys}


def _rope_from_hf(config: Mapping[str, Any]) -> Rope:
    # `rope_parameters` is the form of transformers 5, `rope_scaling` and `rope_theta` the older one
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    theta = new.get("rope_theta", config.get("rope_theta", 10000.0))
    # One form alone, never a mixture: files such as those of `to_hf` hold both.
    scaling = new or old
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROPE_PARAMETERS:
        raise UserError(
            f"config.json: rope type '{kind}' is not supported"
            f" (supported: {', '.join(_ROPE_PARAMETERS)})"
        )
    # A parameter that is not read would change the frequencies, so it is refused. A partial rotary
    # factor of 1 rotates every dimension, which is what the model does.
    readable = {"rope_theta", "rope_type", "type"} | {f.name for f in dataclasses.fields(Rope)}
    for key, value in scaling.items():
        if key not in readable and (key, value) != ("partial_rotary_factor", 1):
            raise UserError(f"config.json: rope parameter {key} is not supported for type '{kind}'")
    names = _ROPE_PARAMETERS[kind]
    absent = [name for name in names if name not in scaling]
    if absent:
        raise UserError(f"config.json: rope type '{kind}' lacks {', '.join(absent)}")
    return Rope(theta=float(theta), kind=kind, **{name: scaling[name] for name in names})


# Shapes of published models, for plans without their files.
_LLAMA_2 = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    max_position_embeddings=4096,
)
ARCHITECTURES: Final = {
    "llama-2-7b": _LLAMA_2,
    # `replace` copies what `__post_init__` filled in: `head_dim` stays 128, which is right for all
    # of these, but `num_kv_heads` would stay 32 and has to be given.
    "llama-2-13b": dataclasses.replace(
        _LLAMA_2,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
    ),
    "llama-2-70b": dataclasses.replace(
        _LLAMA_2,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
    ),
    "llama-3.1-8b": dataclasses.replace(
        _LLAMA_2,
        vocab_size=128256,
        intermediate_size=14336,
        num_kv_heads=8,
        max_position_embeddings=131072,
        rope=Rope(theta=500000.0, kind="llama3", factor=8.0),
    ),
}


def architecture_of(name: str) -> ModelConfig | None:
    """Return the architecture of a published model by its name on the hub, or None.

    Example:
        >>> architecture_of("meta-llama/Llama-2-7b-hf").num_layers, architecture_of("my/own-7b")
        (32, None)
    """
    # Fine-tuned variants of the publisher have the shape of their base.
    short = name.split("/")[-1].lower()
    for ending in ("-hf", "-instruct", "-chat"):
        short = short.removesuffix(ending)
    return ARCHITECTURES.get(short)
