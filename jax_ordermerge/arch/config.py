"""`ModelConfig`: the shape and mathematics of a model, from and to a Hugging Face config."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Final

from jax_ordermerge.arch import rope as ropes
from jax_ordermerge.arch.families import DEFAULTS, FAMILIES, Family, NormPlacement, QkNorm
from jax_ordermerge.arch.hf_keys import check_keys
from jax_ordermerge.arch.rope import Rope
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow, JsonValue

_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_OPTIONAL_SIZES: Final = ("num_key_value_heads", "head_dim")
_NUMBERS: Final = ("rms_norm_eps", "initializer_range")
_FLAGS: Final = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
_TOKEN_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_FULL, _SLIDING = "full_attention", "sliding_attention"  # as `layer_types` spells them


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
    rope: Rope = dataclasses.field(default_factory=Rope)
    sliding_window: int | None = None
    # Layers that see all earlier tokens although there is a window. Numbers and not a flag per
    # layer: a model of some other depth keeps them.
    full_attention_layers: tuple[int, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = "none"
    norm_placement: NormPlacement = "before"
    no_rope_layers: tuple[int, ...] = ()
    # Factors of the embeddings, of what a block adds to the residual stream, and of the scores of
    # attention (None: 1 / sqrt(head_dim)); the divisor of the logits.
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_divisor: float = 1.0
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
        # One spelling of each model, because configs are compared: no window where no layer has it.
        windowed = set(range(self.num_layers)) - set(self.full_attention_layers)
        window = self.sliding_window if windowed else None
        full = () if window is None else set(range(self.num_layers)) - windowed
        object.__setattr__(self, "sliding_window", window)
        object.__setattr__(self, "full_attention_layers", tuple(sorted(full)))
        without_rope = set(self.no_rope_layers) & set(range(self.num_layers))
        object.__setattr__(self, "no_rope_layers", tuple(sorted(without_rope)))
        if self.attention_scale == self.head_dim**-0.5:
            object.__setattr__(self, "attention_scale", None)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer: how many keys back a query sees; None is all.

        Example:
            >>> config = ModelConfig(
            ...     vocab_size=32,
            ...     hidden_size=8,
            ...     intermediate_size=16,
            ...     num_layers=3,
            ...     num_heads=2,
            ...     sliding_window=4,
            ...     full_attention_layers=(0,),
            ... )
            >>> config.windows
            (None, 4, 4)
        """
        full = self.full_attention_layers
        return tuple(
            None if layer in full else self.sliding_window for layer in range(self.num_layers)
        )

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """The rope of each layer; None is none."""
        without = self.no_rope_layers
        return tuple(None if layer in without else self.rope for layer in range(self.num_layers))

    @property
    def context_length(self) -> int:
        """How many positions the model reads: those of its files, extended by its rope."""
        return self.rope.extend(self.max_position_embeddings)

    @classmethod
    def from_hf(
        cls, config: JsonRow, ignore: Iterable[str] = (), path: str = "config.json"
    ) -> "ModelConfig":
        """Read the dict of a `config.json`. A key that it lacks means what transformers takes.

        Args:
            config: the parsed file, written by any transformers from 4.3x to 5.x.
            ignore: keys to ignore although they are unknown.
            path: of the file, for messages.

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
                f"{path}: model_type = {name!r} is not supported (supported: {', '.join(FAMILIES)})"
            )
        family, ignore = FAMILIES[name], frozenset(ignore)
        # Before any value is read: an unsupported option must not be hidden by a missing key.
        check_keys(config, ignore, path, family.keys)
        values = {**DEFAULTS, **family.defaults, **config}
        _check_values(values, family, path)
        _check_flags(values, family, path)
        window, full_attention_layers = _windows(values, family, path)
        bias = bool(values["attention_bias"]) and family.attention_bias
        return cls(
            family=name,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            num_kv_heads=values["num_key_value_heads"] or 0,
            head_dim=values["head_dim"] or 0,
            max_position_embeddings=values["max_position_embeddings"],
            rms_norm_eps=values["rms_norm_eps"],
            rope=ropes.from_hf(
                config,
                values["max_position_embeddings"],
                path=path,
                theta=family.rope_theta,
                ignore=ignore,
            ),
            sliding_window=window,
            full_attention_layers=full_attention_layers,
            qkv_bias=bias or family.qkv_bias,
            # `attention_bias` covers all four matrices. The fixed biases of Qwen2 are of q, k and v
            # alone.
            output_bias=bias,
            mlp_bias=bool(values["mlp_bias"]),
            qk_norm=family.qk_norm,
            norm_placement=family.norm_placement,
            no_rope_layers=_no_rope_layers(values, path) if family.no_rope_layers else (),
            **{field: values[key] for key, field in family.numbers.items()},
            tie_embeddings=bool(values["tie_word_embeddings"]),
            bos_token_id=values["bos_token_id"],
            eos_token_ids=_ids(values["eos_token_id"]),
            pad_token_id=values["pad_token_id"],
            initializer_range=values["initializer_range"],
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

    def to_hf(self, dtype: str) -> Json:
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
        rope, eos = self.rope.to_hf(), self.eos_token_ids
        # Keys that a family of transformers does not know are left out of its file.
        optional: Json = {}
        if family.attention_bias:
            optional["attention_bias"] = self.output_bias
        if family.mlp_bias:
            optional["mlp_bias"] = self.mlp_bias
        if family.no_rope_layers:
            # transformers marks the layers that have a rope
            optional["no_rope_layers"] = [int(rope is not None) for rope in self.layer_ropes]
        for key, field in family.numbers.items():
            optional[key] = getattr(self, field)
            if field == "attention_scale" and self.attention_scale is None:
                optional[key] = self.head_dim**-0.5
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
            **optional,
            **self._windows_to_hf(family),
        }

    def _windows_to_hf(self, family: Family) -> Json:
        window, windows = self.sliding_window, self.windows
        if family.window == "none":
            return {}
        if family.window == "all":
            return {"sliding_window": window}
        types = [_FULL if window is None else _SLIDING for window in windows]
        if family.window == "by_type":
            # transformers reads the window also where no layer has it
            window = DEFAULTS["sliding_window"] if window is None else window
            return {"sliding_window": window, "layer_types": types}
        if window is None:
            return {"use_sliding_window": False}
        return {
            "use_sliding_window": True,
            "sliding_window": window,
            # the form of transformers before 4.53, which has no `layer_types`
            "max_window_layers": windows.index(window),
            "layer_types": types,
        }


def _ids(value: JsonValue) -> tuple[JsonValue, ...]:
    # Hugging Face writes one id as an int and several as a list.
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_values(values: JsonRow, family: Family, path: str) -> None:
    """Refuse values of another JSON type, which would fail far from the file."""
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        value = values[key]
        # `type` and not `isinstance`: true is no size
        is_size = type(value) is int and value > 0
        if not is_size and not (key in _OPTIONAL_SIZES and value is None):
            raise UserError(f"{path}: {key} = {value!r}; expected a positive integer")
    for key in _NUMBERS:
        if type(values[key]) not in (int, float) or not values[key] >= 0:
            raise UserError(f"{path}: {key} = {values[key]!r}; expected a number")
    for key in family.numbers:
        if type(values[key]) not in (int, float) or not 0 < values[key] < math.inf:
            raise UserError(f"{path}: {key} = {values[key]!r}; expected a positive number")
    for key in _FLAGS:
        # the text "false" is true in Python
        if not isinstance(values[key], bool | None):
            raise UserError(f"{path}: {key} = {values[key]!r}; expected true or false")
    for key in _TOKEN_IDS:
        if any(type(value) is not int for value in _ids(values[key])):
            raise UserError(f"{path}: {key} = {values[key]!r}; expected a token id, or null")


def _no_rope_layers(values: JsonRow, path: str) -> tuple[int, ...]:
    """Return the layers without rope: those with a 0 in `no_rope_layers`."""
    layers: int = values["num_hidden_layers"]
    has_rope, interval = values.get("no_rope_layers"), values.get("no_rope_layer_interval")
    if has_rope is None:
        interval = 4 if interval is None else interval
        if type(interval) is not int or interval < 1:
            raise UserError(
                f"{path}: no_rope_layer_interval = {interval!r}; expected a positive integer"
            )
        return tuple(range(interval - 1, layers, interval))
    flags = isinstance(has_rope, list | tuple) and all(flag in (0, 1) for flag in has_rope)
    if not flags or len(has_rope) < layers:
        raise UserError(
            f"{path}: no_rope_layers = {has_rope!r}; expected a list of {layers} flags, one per"
            " layer: 1 with a rope, 0 without"
        )
    return tuple(layer for layer in range(layers) if not has_rope[layer])


def _check_flags(values: JsonRow, family: Family, path: str) -> None:
    """Refuse options that are set but not read by a family."""
    unread = {
        # the fixed biases of Qwen2 are what `attention_bias` asks for
        "attention_bias": not (family.attention_bias or family.qkv_bias),
        "mlp_bias": not family.mlp_bias,
        "use_sliding_window": family.window != "by_layer",
    }
    for key, is_unread in unread.items():
        if values[key] and is_unread:
            raise UserError(
                f"{path}: {key} = {values[key]!r} is not supported for {values['model_type']}"
            )


def _windows(values: JsonRow, family: Family, path: str) -> tuple[int | None, tuple[int, ...]]:
    """Return the window, and the layers that see all earlier tokens in spite of it."""
    layers, window, types = (
        values[key] for key in ("num_hidden_layers", "sliding_window", "layer_types")
    )
    by_layer, by_type = family.window == "by_layer", family.window == "by_type"
    if family.window == "none" or (by_layer and not values["use_sliding_window"]):
        window = None
    # positions are int32
    if window is not None and not (type(window) is int and 0 < window < 2**31):
        raise UserError(
            f"{path}: sliding_window = {window!r}; expected a positive integer below 2^31, or null"
        )
    if types is not None and not isinstance(types, list | tuple):
        raise UserError(f"{path}: layer_types = {types!r}; expected a list")
    if types is not None:
        unsupported = sorted({str(kind) for kind in types} - {_FULL, _SLIDING})
        if unsupported:
            raise UserError(f"{path}: layer_types with {unsupported} is not supported")
        if len(types) != layers:
            raise UserError(f"{path}: layer_types has {len(types)} entries for {layers} layers")
    if by_type and types is None:
        every = family.full_attention_interval
        types = [_SLIDING if (layer + 1) % every else _FULL for layer in range(layers)]
    # what the other keys say; `layer_types` decides only in families that read it
    if types is None or not (by_layer or by_type) or window is None:
        first = values["max_window_layers"] if by_layer and window is not None else 0
        if type(first) is not int:
            raise UserError(f"{path}: max_window_layers = {first!r}; expected an integer")
        resolved = [
            _FULL if window is None or layer < first else _SLIDING for layer in range(layers)
        ]
        if types is not None and list(types) != resolved:
            raise UserError(
                f"{path}: layer_types asks for {' and '.join(sorted(set(types)))}, but by the other"
                f" keys every layer of this {values['model_type']} is {resolved[0]}"
            )
        types = resolved
    return window, tuple(layer for layer, kind in enumerate(types) if kind == _FULL)
