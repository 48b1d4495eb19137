"""The reference of config keys, read from the schema: what each key is, its unit and default.

The schema is the one home. A field says its meaning (`description`), its unit and what it goes with
(`json_schema_extra`) and an example (`examples`) where its default shows none.
"""

import dataclasses
import json
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from jax_ordermerge import console
from jax_ordermerge.config.data import DataSource
from jax_ordermerge.config.experiment import Config
from jax_ordermerge.config.section import FREE_TO_CHANGE, Choice, Section, sections_in
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import JsonValue

_TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}
_BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the config, in words.

    Attributes:
        path: dotted, e.g. `training.learning_rate`. `[]` stands for an entry of a list.
        type: what it takes.
        unit: of a number; "" of anything else.
        default: as YAML; "required" where there is none.
        meaning: what it does.
        goes_with: what else it needs, or excludes; the kind that has it.
        example: its value as YAML.
        is_free: whether it may change when a run continues.
        is_section: whether other keys lie below it.
    """

    path: str
    type: str
    unit: str
    default: str
    meaning: str
    goes_with: str
    example: str
    is_free: bool
    is_section: bool


def list_keys() -> list[Key]:
    """Return all keys in the order of the schema, each section before what lies in it.

    Example:
        >>> next(key for key in list_keys() if key.path == "data.max_length").unit
        'tokens'
    """
    return list(_section_keys(Config, ""))


def describe(path: str | None = None) -> str:
    """Return the reference of a key and of what lies below it, as text for a terminal.

    Args:
        path: dotted; None lists all keys with their defaults. `merge.methods.seed` is
            `merge.methods[].seed`.

    Raises:
        UserError: there is no such key.

    Example:
        >>> print(describe("training.epochs"))
        training.epochs: integer above 0 (epochs)
          how often each member sees every training example
          default: 3
        >>> describe("lr")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: unknown key lr (did you mean 'training.learning_rate'?)
    """
    keys = _keys_at(path)
    if path is not None:
        return "\n".join(_text(key) for key in keys)
    width = max(len(key.path) for key in keys)
    return "\n".join(f"{key.path:{width}}  {key.default}".rstrip() for key in keys)


def describe_json(path: str | None = None) -> str:
    """Return the same as JSON: a list with a mapping for each key.

    Raises:
        UserError: there is no such key.

    Example:
        >>> json.loads(describe_json("training.epochs"))[0]["unit"]
        'epochs'
    """
    return console.to_json([dataclasses.asdict(key) for key in _keys_at(path)])


def _keys_at(path: str | None) -> list[Key]:
    """Return the keys at and below a path."""
    keys = list_keys()
    if path is None:
        return keys
    name = path.replace("[]", "")
    names = [key.path.replace("[]", "") for key in keys]
    if name not in names:
        # as in errors of configs: the last part, or its initials, without the section
        last = name.rpartition(".")[2]
        ends = {full.rpartition(".")[2]: full for full in reversed(names)}
        initials = {"".join(part[:1] for part in end.split("_")): ends[end] for end in ends}
        near = ends.get(last) or (len(last) > 1 and initials.get(last))
        raise UserError(
            f"unknown key {path}"
            + (f" (did you mean '{near}'?)" if near else did_you_mean(name, names))
        )
    return [key for key, n in zip(keys, names, strict=True) if f"{n}.".startswith(f"{name}.")]


def _text(key: Key) -> str:
    lines = [f"{key.path}: {key.type}" + (f" ({key.unit})" if key.unit else "")]
    lines += [f"  {key.meaning}"] if key.meaning else []
    lines += [f"  default: {key.default}"] if key.default else []
    lines += [f"  goes with: {key.goes_with}"] if key.goes_with else []
    lines += [f"  example: {key.example}"] if key.example not in ("", key.default) else []
    return "\n".join(lines)


def _section_keys(
    section: type[Section], prefix: str, goes_with: str = "", *, is_free: bool = False
) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        if name == "kind":  # the key above lists the kinds
            continue
        path = f"{prefix}{name}"
        free = is_free or FREE_TO_CHANGE in field.metadata
        choice = _find_choice(field)
        inner = _inner(field)
        yield _key(path, field, choice, goes_with, is_free=free, is_section=bool(choice or inner))
        if path == "data.test":  # as data.train
            continue
        below = f"{path}[]." if _is_list(field) else f"{path}."
        if choice is not None:
            yield from _choice_keys(choice, below, goes_with, is_free=free)
        elif inner is not None:
            yield from _section_keys(inner, below, goes_with, is_free=free)


def _choice_keys(choice: Choice, prefix: str, goes_with: str, *, is_free: bool) -> Iterator[Key]:
    """Return the keys of all kinds; a key that several kinds have in the same way comes once."""
    kinds: dict[Key, list[str]] = {}
    for kind, section in choice.kinds().items():
        for key in _section_keys(section, prefix, is_free=is_free):
            kinds.setdefault(key, []).append(kind)
    for key, names in kinds.items():
        every = len(names) == len(choice.kinds())
        parts = [goes_with, "" if every else f"kind {', '.join(names)}", key.goes_with]
        yield dataclasses.replace(key, goes_with="; ".join(filter(None, parts)))


def _key(
    path: str,
    field: FieldInfo,
    choice: Choice | None,
    goes_with: str,
    *,
    is_free: bool,
    is_section: bool,
) -> Key:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    inner = _inner(field)
    # of a section what its class says in the first paragraph
    summary = (inner.__doc__ or "").split("\n\n")[0] if inner else ""
    if choice is not None:
        accepted = f"one of {', '.join(choice.kinds())}, by name or as a section with `kind`"
        if _is_list(field):
            accepted = f"list of sections; `kind`: {', '.join(choice.kinds())}"
    elif inner is not None and inner is not DataSource:
        accepted = "list of sections" if _is_list(field) else "section"
    else:
        accepted = _type(field)
    default = _default(field, choice)
    examples = field.examples or []
    return Key(
        path,
        accepted + (", or null" if is_section and type(None) in get_args(field.annotation) else ""),
        str(extra.get("unit", "")),
        default,
        " ".join((field.description or summary).split()).removesuffix("."),
        "; ".join(filter(None, (goes_with, str(extra.get("with", ""))))),
        to_yaml(examples[0]) if examples else default,
        is_free,
        is_section,
    )


def _default(field: FieldInfo, choice: Choice | None) -> str:
    if field.is_required():
        return "required"
    if choice is not None and choice.default and not _is_list(field):
        return choice.default
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Section):
        return ""  # the keys below say it
    if isinstance(value, tuple) and any(isinstance(entry, Section) for entry in value):
        # by what is chosen in each entry; the whole entries are in the config of a run
        return f"[{', '.join(dict.fromkeys(entry.method for entry in value))}]"
    return to_yaml(value)


def to_yaml(value: object) -> str:
    """Return a value as one line of YAML."""
    plain = _plain(value)
    if isinstance(plain, str) and (plain != plain.strip() or "\n" in plain):
        return json.dumps(plain, ensure_ascii=False)  # it is YAML, too, and one line
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _plain(value: object) -> JsonValue:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, int | float | str | None):
        return value
    return str(value)


def _is_list(field: FieldInfo) -> bool:
    """Return whether a field takes a list, alone or beside something else."""
    return any(
        get_origin(part) is tuple for part in (field.annotation, *get_args(field.annotation))
    )


def _find_choice(field: FieldInfo) -> Choice | None:
    """Return the choice in the annotation of a field, which may lie below a list or None."""

    def metadata(annotation: Any) -> Iterator[object]:
        yield from getattr(annotation, "__metadata__", ())
        for part in get_args(annotation):
            yield from metadata(part)

    marks = (*field.metadata, *metadata(field.annotation))
    return next((mark for mark in marks if isinstance(mark, Choice)), None)


def _inner(field: FieldInfo) -> type[Section] | None:
    """Return the section in the annotation of a field."""
    return next(iter(sections_in(field.annotation)), None)


def _type(field: FieldInfo) -> str:
    if _inner(field) is DataSource:
        return "path or name, a mapping with path, or a list of these"
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: Any = ()) -> str:
    """Return an annotation in words: `PositiveInt | None` is "integer above 0, or null"."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if hasattr(annotation, "__metadata__"):
        return _words(annotation.__origin__, (*annotation.__metadata__, *metadata))
    if origin in (Union, types.UnionType):
        words = [_words(part, metadata) for part in parts if part is not type(None)]
        joined = ", or ".join(dict.fromkeys(words))
        return f"{joined}, or null" if type(None) in parts else joined
    if origin is tuple:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return "mapping"
    if annotation is Any:
        return "value; in a search also a list of choices, or a range"
    name = _TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return " ".join((name, *_bounds(metadata)))


def _bounds(metadata: Any) -> list[str]:
    bounds = []
    for mark in metadata:
        for inner in (mark, *getattr(mark, "metadata", ())):
            bounds += [
                text.format(getattr(inner, name))
                for name, text in _BOUNDS.items()
                if getattr(inner, name, None) is not None
            ]
    return list(dict.fromkeys(bounds))
