"""Rotary position parameters, from and to the keys of a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Final, Literal

from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow

RopeType = Literal["default", "linear", "llama3", "yarn"]
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
}
# The form of transformers 5, and the older one beside `rope_theta`.
_FORMS: Final = ("rope_parameters", "rope_scaling")
_ORIGINAL: Final = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position parameters.

    Attributes:
        theta: base of the frequencies.
        kind: default; linear (positions / factor); llama3 and yarn (a factor that depends on
            frequency).
        factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: as in
            transformers.
        attention_factor: of yarn, a factor of the rotated queries and of the rotated keys; None
            derives it from `factor`, `mscale` and `mscale_all_dim`.
        beta_fast, beta_slow: of yarn, turns within the original length above which a frequency is
            unchanged, and below which it is divided by `factor`.
        mscale, mscale_all_dim: of yarn, as in transformers.
        truncate: of yarn, whether the bounds between these two are rounded to dimensions.
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
        for name in _OPTIONAL.get(self.kind, ()):
            value = getattr(self, name)
            # Defaults are left out, so that a file that was read is written as it was.
            if value != getattr(defaults, name):
                values[name] = value
        return {"rope_type": self.kind, **values}


def from_hf(
    config: JsonRow,
    positions: int,
    *,
    path: str,
    theta: float = 10000.0,
    ignore: Collection[str] = (),
) -> Rope:
    """Read the rope of a `config.json`, in the form of transformers 4 or 5.

    Args:
        config: the parsed file.
        positions: its `max_position_embeddings`, which stand for the original ones where the rope
            does not give these.
        path: of the file, for messages.
        theta: of a file without one.
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
    # In any of three places: transformers 5 writes it among the rope's parameters.
    thetas = [source.get("rope_theta") for source in (*forms.values(), config)]
    distinct = {theta for theta in thetas if theta is not None}
    if len(distinct) > 1:
        raise UserError(
            f"{path}: rope_theta is {' and '.join(map(repr, sorted(distinct)))}; transformers 4 and"
            " 5 would take different ones: keep one"
        )
    if distinct:
        theta = _number(distinct.pop(), "rope_theta", path)
    ropes = [
        _parse(form, float(theta), positions, f"{path}: {key}", ignore)
        for key, form in forms.items()
    ]
    if len(set(ropes)) > 1:
        raise UserError(
            f"{path}: {' and '.join(forms)} describe different ropes; transformers 4 and 5 would"
            " take different ones: keep one"
        )
    rope = ropes[0] if ropes else Rope(theta=float(theta))
    outer = config.get(_ORIGINAL)
    # transformers 5 prefers the outer value, transformers 4 does not read it
    if outer not in (None, rope.original_max_position_embeddings) and _ORIGINAL in rope.to_hf():
        raise UserError(
            f"{path}: {_ORIGINAL} is {outer!r}, and {rope.original_max_position_embeddings} for the"
            " rope; transformers 4 and 5 would take different ones: keep one"
        )
    return rope


def _parse(
    form: JsonRow, theta: float, positions: int, where: str, ignore: Collection[str]
) -> Rope:
    kinds = {form[key] for key in ("rope_type", "type") if key in form} or {"default"}
    kind = kinds.pop()
    if kinds:
        raise UserError(f"{where} has rope_type and type, which differ; keep one")
    if kind not in _REQUIRED:
        raise UserError(
            f"{where}: rope type '{kind}' is not supported (supported: {', '.join(_REQUIRED)})"
        )
    if kind == "yarn" and theta <= 1:
        raise UserError(f"{where}: rope_theta = {theta:g}; expected more than 1 for type 'yarn'")
    required, optional = _REQUIRED[kind], _OPTIONAL.get(kind, ())
    # null is what transformers writes for a parameter that was not given
    values = {key: value for key, value in form.items() if value is not None or key == "truncate"}
    # A parameter that is not read may have been meant to change the frequencies, so it is refused.
    # A partial rotary factor of 1 rotates every dimension, which is what the model does.
    neutral = {"rope_theta", "rope_type", "type", "finetuned", *ignore}
    for key, value in values.items():
        if key not in neutral | {*required, *optional} and (key, value) != (
            "partial_rotary_factor",
            1,
        ):
            raise UserError(
                f"{where}: rope parameter {key} is not supported for type '{kind}'; if it changes"
                " nothing, remove it or name it in the keys to ignore"
            )
    # transformers takes `max_position_embeddings` where a rope does not say how long it was.
    if _ORIGINAL in required:
        values.setdefault(_ORIGINAL, positions)
    absent = [name for name in required if name not in values]
    if absent:
        raise UserError(f"{where}: rope type '{kind}' lacks {', '.join(absent)}")
    read = {name: values[name] for name in (*required, *optional) if name in values}
    for name, value in read.items():
        if name == "truncate":
            if not isinstance(value, bool | None):
                raise UserError(f"{where}: truncate = {value!r}; expected true or false")
            read[name] = bool(value)  # null is false, as in transformers
        elif name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") and not value:
            read[name] = getattr(Rope(), name)  # 0 is the default, as in transformers
        else:
            _number(value, name, where)
    return Rope(theta=theta, kind=kind, **read)


def _number(value: object, name: str, where: str) -> float:
    # true is 1 in Python, but no one means a number by it
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} = {value!r}; expected a number")
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{where}: {name} = {value!r}; expected a positive number")
    return value
