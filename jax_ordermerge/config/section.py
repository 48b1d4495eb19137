"""A section of YAML with its checks: what is wrong with it is said in one line."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic
import yaml

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


def override(raw: dict[str, Any], item: str) -> None:
    """Change a nested dict as one `--set` says.

    Args:
        raw: is changed in place; sections that it lacks are made.
        item: `"section.key=value"` with a YAML value.

    Raises:
        UserError: the item is not of that form, or passes through what is no section.

    Example:
        >>> raw = {"training": {"epochs": 3}}
        >>> override(raw, "training.batch=8")
        >>> raw
        {'training': {'epochs': 3, 'batch': 8}}
    """
    path, sign, text = item.partition("=")
    if not sign:
        raise UserError(
            f"--set {item}: expected section.key=value, e.g. --set training.learning_rate=1e-5"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {item}: the value is not valid YAML: {text}") from error
    *parents, last = path.strip().split(".")
    node = raw
    for name in parents:
        child = node.get(name)
        if child is not None and not isinstance(child, dict):
            raise UserError(f"--set {item}: {name} is not a section")
        node[name] = dict(child or {})
        node = node[name]
    node[last] = value
