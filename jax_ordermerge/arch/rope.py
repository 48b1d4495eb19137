"""Rotary position parameters, from and to the keys of a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Final, Literal

from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow, JsonValue

RopeType = Literal["default", "linear", "llama3", "yarn", "longrope"]
# The parameters that each type of rope needs, besides theta.
_REQUIRED: Final[dict[RopeType, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
# Those that it reads where a file has them.
_OPTIONAL: Final[dict[RopeType, tuple[str, ...]]] = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("attention_factor",),
}
# The form of transformers 5, and the older one beside `rope_theta`.
_FORMS: Final = ("rope_parameters", "rope_scaling")
_ORIGINAL: Final = "original_max_position_embeddings"
# Types of layers, as `layer_types` and `rope_parameters` spell them: without and with a window.
LAYER_TYPES: Final = ("full_attention", "sliding_attention")
_PARTIAL: Final = "partial_rotary_factor"
# A factor per pair of dimensions.
_LISTS: Final = ("short_factor", "long_factor")


@dataclasses.dataclass(frozen=True)
class RopeKeys:
    """How a family of models reads the rope of a `config.json`.

    Attributes:
        theta: base of the frequencies in a file that has none.
        theta_key: the outer key of it.
        kinds: names of the types of rope that the family reads, and the type that each stands for.
        partial: whether `partial_rotary_factor` is read.
        original: the outer `original_max_position_embeddings` of a file without it.
        counts_extended: whether `max_position_embeddings` of a file counts the positions that its
            rope extends the model to, whatever the type of the rope.
    """

    theta: float = 10000.0
    theta_key: str = "rope_theta"
    kinds: Mapping[str, RopeType] = dataclasses.field(
        default_factory=lambda: {kind: kind for kind in _REQUIRED}
    )
    partial: bool = False
    original: int | None = None
    counts_extended: bool = False


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position parameters.

    Attributes:
        theta: base of the frequencies.
        kind: default; linear (positions / factor); llama3 and yarn (a factor that depends on
            frequency); longrope (a factor per frequency, and others for long documents).
        factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: as in
            transformers; the factor of longrope is that between the two lengths of the file.
        attention_factor: of yarn and longrope, a factor of the rotated queries and of the rotated
            keys; None derives it from `factor`, `mscale` and `mscale_all_dim`.
        beta_fast, beta_slow: of yarn, turns within the original length above which a frequency is
            unchanged, and below which it is divided by `factor`.
        mscale, mscale_all_dim: of yarn, as in transformers.
        truncate: of yarn, whether the bounds between these two are rounded to dimensions.
        short_factor, long_factor: of longrope, what each frequency is divided by in documents of at
            most `original_max_position_embeddings` tokens, and in longer ones.
        partial_rotary_factor: which part of the dimensions of a head turns; those behind do not.
    """

    theta: float = 10000.0
    kind: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0

    def turning(self, head_dim: int) -> int:
        """Return how many dimensions of a head turn.

        Example:
            >>> Rope(partial_rotary_factor=0.75).turning(128)
            96
        """
        return int(head_dim * self.partial_rotary_factor)

    def extend(self, positions: int) -> int:
        """Return how many positions a model with this rope reads.

        `max_position_embeddings` counts them where the rope is the default one. Linear and yarn
        extend a model by a factor, and most files keep the number of before. vLLM multiplies the
        same way.

        Args:
            positions: `max_position_embeddings`.

        Example:
            >>> rope = Rope(kind="yarn", factor=4.0, original_max_position_embeddings=32768)
            >>> rope.extend(32768), rope.extend(131072), Rope().extend(2048)
            (131072, 131072, 2048)
        """
        if self.kind == "linear":
            return max(positions, int(positions * self.factor))
        if self.kind == "yarn":
            # a file may hold the extended number already
            return max(positions, int(self.original_max_position_embeddings * self.factor))
        return positions

    def to_hf(self) -> Json:
        """Return the parameters of this type of rope, without theta.

        Example:
            >>> Rope(kind="yarn", factor=4.0, truncate=False).to_hf()
            {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8192, \
'truncate': False}
        """
        defaults = Rope()
        values = {name: getattr(self, name) for name in _REQUIRED[self.kind]}
        for name in (*_OPTIONAL.get(self.kind, ()), _PARTIAL):
            value = getattr(self, name)
            # Defaults are left out, so that a file that was read is written as it was.
            if value != getattr(defaults, name):
                values[name] = value
        for name in _LISTS:
            if name in values:
                values[name] = list(values[name])
        return {"rope_type": self.kind, **values}


def from_hf(
    config: JsonRow,
    positions: int,
    *,
    path: str,
    keys: RopeKeys = RopeKeys(),
    ignore: Collection[str] = (),
) -> Rope:
    """Read the rope of a `config.json`, in the form of transformers 4 or 5.

    Args:
        config: the parsed file.
        positions: its `max_position_embeddings`, which stand for the original ones where the rope
            does not give these.
        path: of the file, for messages.
        keys: what the family of the model reads.
        ignore: parameters to ignore although the type of rope does not read them.

    Raises:
        UserError: the type is not supported, a parameter is absent, unknown or out of range, or the
            file says two things.

    Example:
        >>> from_hf({"rope_scaling": {"type": "linear", "factor": 2.0}}, 2048, path="config.json")
        Rope(theta=10000.0, kind='linear', factor=2.0, ...)
    """
    forms = {key: config[key] for key in _FORMS if config.get(key)}
    for key, form in forms.items():
        if not isinstance(form, Mapping):
            raise UserError(f"{path}: {key} = {form!r}; expected an object such as rope_type: yarn")
    # In any of three places: transformers 5 writes them among the rope's parameters.
    sources = *forms.values(), config
    theta = _agreed("rope_theta", sources, path) or keys.theta
    outer = config.get(_ORIGINAL, keys.original)
    read: Json = {"theta": float(theta)}
    if keys.partial:
        partial = read[_PARTIAL] = _agreed(_PARTIAL, sources, path) or Rope.partial_rotary_factor
        if partial > 1:
            raise UserError(f"{path}: {_PARTIAL} = {partial!r}; expected at most 1")
    ropes = [
        Rope(**read, **_parse(form, read, (positions, outer), keys, f"{path}: {key}", ignore))
        for key, form in forms.items()
    ]
    if len(set(ropes)) > 1:
        raise UserError(
            f"{path}: {' and '.join(forms)} describe different ropes; transformers 4 and 5 would"
            " take different ones: keep one"
        )
    rope = ropes[0] if ropes else Rope(**read)
    # transformers 5 prefers the outer value, transformers 4 reads it for longrope alone
    if outer not in (None, rope.original_max_position_embeddings) and _ORIGINAL in rope.to_hf():
        raise UserError(
            f"{path}: {_ORIGINAL} is {outer!r}, and {rope.original_max_position_embeddings} for the"
            " rope; transformers 4 and 5 would take different ones: keep one"
        )
    return rope


def pair_from_hf(
    config: JsonRow,
    positions: int,
    *,
    path: str,
    keys: RopeKeys,
    sliding_keys: RopeKeys,
    ignore: Collection[str] = (),
) -> tuple[Rope, Rope]:
    """Read the ropes of the layers without and with a window.

    transformers 5 has them under `rope_parameters` by type of layer. In transformers 4 the older
    keys are of the layers without a window, and the others have a key for their base alone.

    Args:
        config, positions, path, keys, ignore: as in `from_hf`.
        sliding_keys: what the family reads of the layers with a window.

    Raises:
        UserError: as `from_hf`.

    Example:
        >>> config = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
        >>> ropes = pair_from_hf(
        ...     config,
        ...     512,
        ...     path="config.json",
        ...     keys=RopeKeys(),
        ...     sliding_keys=RopeKeys(theta_key="rope_local_base_freq"),
        ... )
        >>> [rope.theta for rope in ropes]
        [1000000.0, 10000.0]
    """
    by_type = config.get("rope_parameters") or {}
    if not isinstance(by_type, Mapping) or by_type.keys() - set(LAYER_TYPES):
        raise UserError(
            f"{path}: rope_parameters = {by_type!r}; expected the parameters under"
            f" {' and '.join(LAYER_TYPES)}"
        )
    full, sliding = (by_type.get(kind) for kind in LAYER_TYPES)
    local = {"rope_theta": config.get(sliding_keys.theta_key), "rope_parameters": sliding}
    return (
        from_hf(
            {**config, "rope_parameters": full}, positions, path=path, keys=keys, ignore=ignore
        ),
        from_hf(local, positions, path=f"{path}: windows", keys=sliding_keys, ignore=ignore),
    )


def to_hf(
    rope: Rope,
    sliding_rope: Rope | None,
    keys: RopeKeys,
    positions: int,
    sliding_keys: RopeKeys | None = None,
) -> Json:
    """Return the keys of a `config.json` that describe ropes, in the forms of transformers 4 and 5.

    Both forms, because transformers 4 silently misreads a file that has `rope_parameters` alone.

    Args:
        rope: the parameters.
        sliding_rope: those of layers with a window, in families that have them apart.
        keys: what the family reads.
        positions: `max_position_embeddings`.
        sliding_keys: what the family reads of the layers with a window.

    Example:
        >>> to_hf(Rope(), None, RopeKeys(), 2048)["rope_parameters"]
        {'rope_type': 'default', 'rope_theta': 10000.0}
    """
    scaling, parameters = rope.to_hf(), {**rope.to_hf(), "rope_theta": rope.theta}
    result: Json = {"rope_theta": rope.theta, "rope_scaling": None, "rope_parameters": parameters}
    if sliding_rope is not None:
        sliding = {**sliding_rope.to_hf(), "rope_theta": sliding_rope.theta}
        # in OLMo 3 both ropes read one key, which is there already
        result.setdefault((sliding_keys or keys).theta_key, sliding_rope.theta)
        result["rope_parameters"] = dict(zip(LAYER_TYPES, (parameters, sliding), strict=True))
    if keys.partial:
        result[_PARTIAL] = rope.partial_rotary_factor
    if rope.kind == "longrope":
        # transformers 4 refuses a scaling of Phi-3 with further keys, or another name of the type
        drop = ("rope_type", _ORIGINAL, _PARTIAL)
        scaling = {"type": "longrope"} | {k: v for k, v in scaling.items() if k not in drop}
        result[_ORIGINAL] = rope.original_max_position_embeddings
    elif keys.original is not None:
        result[_ORIGINAL] = positions
    if rope.kind != "default":
        result["rope_scaling"] = scaling
    return result


def _agreed(name: str, sources: Iterable[JsonRow], path: str) -> float | None:
    """Return the number under a name, or None where no source has it."""
    distinct = {value for source in sources if (value := source.get(name)) is not None}
    if len(distinct) > 1:
        raise UserError(
            f"{path}: {name} is {' and '.join(map(repr, sorted(distinct)))}; transformers 4 and"
            " 5 would take different ones: keep one"
        )
    return _number(distinct.pop(), name, path) if distinct else None


def _parse(
    form: JsonRow,
    read: JsonRow,
    lengths: tuple[int, int | None],
    keys: RopeKeys,
    where: str,
    ignore: Collection[str],
) -> Json:
    """Return the kind of a rope and its parameters, as fields of `Rope`.

    Args:
        form: the parameters in the file.
        read: fields that are read already.
        lengths: `max_position_embeddings`, and the outer original one or None.
        keys, where, ignore: see `from_hf`.
    """
    names = {form[key] for key in ("rope_type", "type") if key in form} or {"default"}
    name = names.pop()
    if names:
        raise UserError(f"{where} has rope_type and type, which differ; keep one")
    if name not in keys.kinds:
        raise UserError(
            f"{where}: rope type '{name}' is not supported (supported: {', '.join(keys.kinds)})"
        )
    kind = keys.kinds[name]
    # its ramp divides by the logarithm of theta
    if kind == "yarn" and read["theta"] <= 1:
        raise UserError(
            f"{where}: rope_theta = {read['theta']:g}; expected more than 1 for type 'yarn'"
        )
    required, optional = _REQUIRED[kind], _OPTIONAL.get(kind, ())
    # null is what transformers writes for a parameter that was not given
    values = {key: value for key, value in form.items() if value is not None or key == "truncate"}
    # A parameter that is not read may have been meant to change the frequencies, so it is refused.
    # A partial rotary factor of 1 rotates every dimension, which is what the model does.
    neutral = {"rope_theta", "rope_type", "type", "finetuned", *read, *ignore}
    if kind == "longrope":
        # derived from the two lengths, and compared with them below
        neutral.add("factor")
    for key, value in values.items():
        if key not in neutral | {*required, *optional} and (key, value) != (_PARTIAL, 1):
            raise UserError(
                f"{where}: rope parameter {key} is not supported for type '{kind}'; if it changes"
                " nothing, remove it or name it in the keys to ignore"
            )
    positions, outer = lengths
    if _ORIGINAL in required:
        # transformers takes `max_position_embeddings` where a rope does not say how long it was;
        # releases agree to take the outer value for longrope alone
        values.setdefault(_ORIGINAL, outer if kind == "longrope" and outer else positions)
    if kind == "yarn" and "factor" in form and form["factor"] is None:
        original = _number(values[_ORIGINAL], _ORIGINAL, where)
        values["factor"] = positions / original  # as DeepSeek has it
    absent = [name for name in required if name not in values]
    if absent:
        raise UserError(f"{where}: rope type '{kind}' lacks {', '.join(absent)}")
    parsed = {
        name: _value(name, values[name], where) for name in (*required, *optional) if name in values
    }
    if kind == "longrope":
        # not written, as it follows from the lengths
        factor = parsed["factor"] = positions / parsed[_ORIGINAL]
        if values.get("factor", factor) != factor:
            raise UserError(
                f"{where}: factor = {values['factor']!r}, and max_position_embeddings are"
                f" {factor:g} times {_ORIGINAL}; transformers 4 and 5 would take different ones:"
                " remove factor"
            )
    return {"kind": kind, **parsed}


def _value(name: str, value: JsonValue, where: str) -> JsonValue:
    """Return the value of a parameter as `Rope` has it."""
    if name == "truncate":
        if not isinstance(value, bool | None):
            raise UserError(f"{where}: truncate = {value!r}; expected true or false")
        return bool(value)  # null is false, as in transformers
    if name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") and not value:
        return getattr(Rope(), name)  # 0 is the default, as in transformers
    if name in _LISTS:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: {name} = {value!r}; expected a list of numbers")
        # a tuple, because a list would make the config unhashable
        return tuple(float(_number(entry, name, where)) for entry in value)
    return _number(value, name, where)


def _number(value: object, name: str, where: str) -> float:
    # true is 1 in Python, but no one means a number by it
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} = {value!r}; expected a number")
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{where}: {name} = {value!r}; expected a positive number")
    return value
