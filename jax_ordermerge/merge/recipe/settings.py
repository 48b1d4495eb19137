"""Values of parameters in a recipe: constants, gradients over layers, filters by tensor name."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from jax_ordermerge.errors import did_you_mean
from jax_ordermerge.json_types import JsonRow

Scalar = bool | int | float | str
_MATCH_ALL = ("", "*")  # filters


class Setting(NamedTuple):
    """The value of one parameter in one place of a recipe.

    Attributes:
        entries: `(filter, values)` in the order of the file; several values are a gradient.
    """

    entries: tuple[tuple[str, tuple[Scalar, ...]], ...]

    def at(self, name: str, position: float) -> Scalar | None:
        """Return the value for a tensor, None if no filter matches.

        Args:
            name: Hugging Face name; the first filter that is a part of it wins.
            position: of its layer, from 0 to 1. Numbers of a gradient are interpolated, text and
                switches are not.

        Example:
            >>> setting = parse_setting([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}])
            >>> setting.at("layers.1.mlp.up_proj", 0.25), setting.at("norm", 0.25)
            (0.25, 0.5)
        """
        entry = self.entry_for(name)
        return None if entry is None else _interpolate(self.entries[entry][1], position)

    def entry_for(self, name: str) -> int | None:
        """Return the number of the entry that a tensor has its value from, None if no filter fits.

        Example:
            >>> parse_setting([{"filter": "mlp", "value": 0}, {"value": 1}]).entry_for("norm")
            1
        """
        # As in mergekit: the first filter that fits, in the order of the file.
        for number, (pattern, _) in enumerate(self.entries):
            if pattern in _MATCH_ALL or pattern in name:
                return number
        return None

    def unused_filters(self, names: Collection[str]) -> list[str]:
        """Return the filters that no tensor has its value from.

        Args:
            names: of all tensors.

        Example:
            >>> entries = [{"filter": name, "value": 1} for name in ("mlp", "mlp.up", "atn")]
            >>> parse_setting(entries).unused_filters(["mlp.up.weight", "norm.weight"])
            ['mlp.up', 'atn']
        """
        used = {self.entry_for(name) for name in names}
        # an entry for all other tensors may be there for models that have them
        return [
            pattern
            for number, (pattern, _) in enumerate(self.entries)
            if number not in used and pattern not in _MATCH_ALL
        ]

    @property
    def constant(self) -> Scalar | None:
        """The value, if it is the same for all tensors; else None.

        Example:
            >>> parse_setting(0.5).constant, parse_setting([0, 1]).constant
            (0.5, None)
        """
        pattern, values = self.entries[0] if self.entries else ("", ())
        return values[0] if len(values) == 1 and pattern in _MATCH_ALL else None

    def values(self) -> list[Scalar]:
        """Return every value in the order of the file, whatever its filter.

        Example:
            >>> parse_setting([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]).values()
            [0, 1, 0.5]
        """
        return [value for _, values in self.entries for value in values]


Settings = dict[str, Setting]


def _interpolate(values: Sequence[Scalar], position: float) -> Scalar | None:
    if not values:
        return None
    # position is a quotient, e.g. 5 / 6: rounding makes a layer that is on a value get exactly it
    index = round(position * (len(values) - 1), 9)
    low = int(index)
    # There is nothing between two texts or switches: the one before the place holds.
    if len(values) == 1 or any(isinstance(value, bool | str) for value in values):
        return values[low]
    share, high = index - low, values[min(low + 1, len(values) - 1)]
    value = (1 - share) * float(values[low]) + share * float(high)
    # parameters such as `resample` and `max_iter` must stay integers
    are_integers = all(isinstance(value, int) for value in values)
    return int(value) if are_integers and value.is_integer() else value


def parse_setting(raw: object) -> Setting:
    """Parse the value of a parameter.

    Raises:
        ValueError: the value is not a scalar, a gradient, or a list of filters.
    """
    # one entry {filter, value} need not stand in a list
    if isinstance(raw, dict):
        raw = [raw]
    if not isinstance(raw, list):
        return Setting((("", (_parse_scalar(raw),)),))
    are_filters = [isinstance(item, dict) for item in raw]
    if not any(are_filters):
        return Setting((("", tuple(map(_parse_scalar, raw))),))
    if not all(are_filters):
        raise ValueError("a list holds numbers, or entries {filter, value}, not both")
    return Setting(tuple(map(_parse_entry, raw)))


def _parse_entry(raw: JsonRow) -> tuple[str, tuple[Scalar, ...]]:
    for key in raw:
        if key not in ("filter", "value"):
            raise ValueError(f"unknown key {key}{did_you_mean(str(key), ('filter', 'value'))}")
    if "value" not in raw:
        raise ValueError(f"the entry {dict(raw)} has no value")
    pattern, value = raw.get("filter"), raw["value"]
    if not isinstance(pattern, str | None):
        raise ValueError(f"filter {pattern!r} must be text, a part of a tensor's name")
    values = value if isinstance(value, list) else [value]
    # mergekit writes null for the filter that fits all tensors
    return pattern or "", tuple(map(_parse_scalar, values))


def _parse_scalar(raw: object) -> Scalar:
    if not isinstance(raw, bool | int | float | str):
        raise ValueError(f"{raw!r} is no number, text, true or false")
    if isinstance(raw, str):
        try:
            raw = float(raw)  # YAML 1.1 reads 1e-4, which has no point, as text
        except ValueError:
            return raw
    # NaN and infinities would pass every later comparison or spoil all tensors
    if isinstance(raw, float) and not math.isfinite(raw):
        raise ValueError(f"{raw} is not finite")
    return raw


def parse_settings(raw: object) -> Settings:
    """Parse a section `parameters`.

    Raises:
        ValueError: it is no mapping, or the value of a parameter is wrong; the parameter is named.
    """
    if not isinstance(raw, dict | None):
        raise ValueError("parameters are names with values")
    settings = {}
    for name, value in (raw or {}).items():
        try:
            settings[str(name)] = value if isinstance(value, Setting) else parse_setting(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return settings
