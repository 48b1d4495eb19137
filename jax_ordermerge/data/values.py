"""Values of rows in one form, whatever file they come from. Pure functions."""

import json
import math
from collections.abc import Mapping
from typing import Final

from jax_ordermerge.json_types import Json, JsonValue

# Beyond it a float has no fraction that could be lost, and integers have digits that floats lack.
_EXACT: Final = 2**53


def parse_json(text: str) -> JsonValue:
    """Return the value of a JSON text. NaN is null, and 3.0 is 3: see `plain`.

    Raises:
        ValueError: it is not JSON, an object has a key twice, or it is nested too deeply to parse.

    Example:
        >>> parse_json('{"a": NaN, "b": 3.0}')
        {'a': None, 'b': 3}
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'a' stands twice in one object
    """
    try:
        return json.loads(
            text,
            parse_constant=lambda name: None if name == "NaN" else float(name),
            parse_float=lambda digits: _whole(float(digits)),
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def plain(value: object) -> JsonValue:
    """Return a value of Arrow as JSON would have it.

    NaN is null: pandas writes it for an empty cell, and a template would print the text "nan".
    A float that is whole is an integer: Arrow makes 3.0 of 3 where another row has 2.5, and pandas
    where another row has nothing.

    Example:
        >>> plain({"a": float("nan"), "b": [3.0, 2.5]})
        {'a': None, 'b': [3, 2.5]}
    """
    if isinstance(value, float):
        return None if math.isnan(value) else _whole(value)
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value


def _whole(value: float) -> float | int:
    return int(value) if abs(value) < _EXACT and value.is_integer() else value


def _unique(pairs: list[tuple[str, JsonValue]]) -> Json:
    # The parser of Python keeps the last of two values, and other parsers the first.
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in unique if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return unique
