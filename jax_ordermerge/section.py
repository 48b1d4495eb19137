"""A section of YAML with its checks: what is wrong with it is said in one line."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from jax_ordermerge.errors import UserError, did_you_mean


class Section(pydantic.BaseModel):
    """A section of the config. Frozen; unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=False)


SomeSection = TypeVar("SomeSection", bound=Section)


def parse(section: type[SomeSection], raw: Mapping[str, Any], where: str) -> SomeSection:
    """Validate the values of a section.

    Raises:
        UserError: one line that names the key, what was given and what was expected.

    Example:
        >>> class Size(Section):
        ...     rows: int = 1
        >>> parse(Size, {"rows": "2"}, "size").rows
        2
        >>> parse(Size, {"row": 2}, "size")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: size: unknown key row (did you mean 'rows'?)
    """
    try:
        return section.model_validate(dict(raw))
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, section)}") from error


def _one_line(error: pydantic.ValidationError, section: type[Section]) -> str:
    # a misspelt key also makes its right name "missing": the misspelling is what to show
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    shown = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"unknown key {shown}{did_you_mean(location[-1], _known_keys(section, first['loc'][:-1]))}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{shown} is missing"
    return f"{shown} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _known_keys(section: type[Section], location: Sequence[str | int]) -> list[str]:
    node: Any = section
    for part in location:
        if isinstance(part, int):
            continue
        node = node.model_fields[part].annotation
        args = getattr(node, "__args__", ())
        node = next((a for a in args if isinstance(a, type) and issubclass(a, Section)), node)
    return list(node.model_fields) if isinstance(node, type) and issubclass(node, Section) else []
