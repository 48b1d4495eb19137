"""Sections of YAML: strict validation, choices by `kind`, and error messages of one line."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, Protocol, TypeVar, get_args, get_origin

import pydantic
import yaml

from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import Json, JsonRow, JsonValue

Path = tuple[str | int, ...]
# Marks a field that may change when a run continues: `Annotated[int, FREE_TO_CHANGE]`. It decides
# where and when something is computed or written, never what.
FREE_TO_CHANGE: Final = "free to change"
# Keys that hold a path or a name, in configs and recipes. A directory may be called 007, yes or
# 2026-11-29, which YAML would make a number, a boolean and a date of. Those of the second set hold
# a list or a section in other places.
_TEXTS: Final = frozenset(
    ("output", "name", "base", "path", "shots_from", "compilation_cache", "wandb", "base_model")
)
TEXT_KEYS: Final = _TEXTS | {"train", "test", "data", "model", "lora"}
_NULLS: Final = ("", "~", "null", "Null", "NULL")
# What YAML makes of a text without quotes.
_IMPLICIT: Final = tuple(
    f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "merge", "timestamp", "value")
)
# By the types of pydantic's errors. Its own texts name Python's types and our classes, which are
# no words of YAML.
_EXPECTED: Final = {
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
    "dict_type": "a mapping, e.g. {key: value}",
    "tuple_type": "a list, e.g. [a, b]",
}


class Section(pydantic.BaseModel):
    """A section of the config. It is frozen and refuses unknown keys."""

    # Unknown keys are refused because an ignored setting would change an experiment silently. Types
    # are not pydantic's strict ones: YAML has no tuples, and it reads 1e-5 without a dot as text.
    # YAML writes infinity as .inf, and text such as 1e999 becomes it; no setting means anything
    # then.
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=False, allow_inf_nan=False
    )

    # not of fields: a field that decides between alternatives takes no validator of this kind
    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_truth_values(cls, values: object) -> object:
        """Refuse true and false, which YAML makes of yes and no, where numbers are expected."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                continue
            annotation = cls.model_fields[name].annotation
            types = _leaf_types(annotation)
            if not types & {int, float} or bool in types:
                continue
            entries = {name: value}
            if isinstance(value, dict) and _is_dict(annotation):  # else a section, which looks
                entries = {f"{name}.{key}": item for key, item in value.items()}
            for path, entry in entries.items():
                scalars = entry if isinstance(entry, list | tuple) else (entry,)
                # pydantic would take them as 1 and 0
                if any(isinstance(x, bool) for x in scalars):
                    raise _expected_number(path, entry)
        return values


def _is_dict(annotation: object) -> bool:
    """Return whether an annotation is a dict, or a dict or None."""
    return any(get_origin(x) is dict for x in (annotation, *get_args(annotation)))


def _leaf_types(annotation: object) -> set[object]:
    """Return the types in an annotation, those of unions, lists and dicts among them."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return {type(part) for part in parts}
    return set().union(*map(_leaf_types, parts)) if parts else {annotation}


# Frozen, because sections are shared by all stages, and some are keys of caches.
SectionType = TypeVar("SectionType", bound=Section)


def sections_in(annotation: object) -> list[type[Section]]:
    """Return the sections in an annotation: in unions, lists and `Annotated` as well."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


class UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, which refuses two equal keys and reads `TEXT_KEYS` as texts."""

    def compose_mapping_node(self, anchor: dict[str, yaml.Node]) -> yaml.MappingNode:
        # the nodes as written: a key merged by `<<` may be written again, to replace its value
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in TEXT_KEYS:
                _read_as_text(value)
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise DuplicateKeyError(
                    f"the key {key.value} is given twice, in lines {lines[key.value]} and {line};"
                    " remove one"
                )
            lines[str(key.value)] = line
        return node


def _read_as_text(node: yaml.Node) -> None:
    """Make a text of a scalar, or of each scalar of a list; null stays null."""
    for scalar in node.value if isinstance(node, yaml.SequenceNode) else (node,):
        if isinstance(scalar, yaml.ScalarNode) and scalar.tag in _IMPLICIT:
            scalar.tag = "tag:yaml.org,2002:str"


class DuplicateKeyError(ValueError):
    """The text of an error about two equal keys."""


def load_yaml(text: str, where: str) -> JsonValue:
    """Return what a YAML text holds; two equal keys in one mapping are an error.

    The YAML standard forbids them, but PyYAML lets the last one win. A setting above it would then
    be ignored without a word.

    Args:
        text: the YAML text.
        where: what the text is, for the error message, e.g. the name of a file.

    Raises:
        UserError: two keys are equal.
        yaml.YAMLError: the text is not YAML.

    Example:
        >>> load_yaml("seed: 0\\nname: a\\nseed: 1", "run.yaml")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: run.yaml: the key seed is given twice, in lines 1 and 3;
            remove one
    """
    try:
        return yaml.load(text, UniqueKeyLoader)  # it derives from the safe loader
    except DuplicateKeyError as error:
        raise UserError(f"{where}: {error}") from error


def read_value(text: str, where: str) -> JsonValue:
    """Return the YAML value of one `KEY=VALUE` of the command line.

    A comment is refused: what follows ` #` is part of the value that the user meant.

    Args:
        text: the value as written.
        where: the option, for the error message, e.g. `"--set seed=1"`.

    Raises:
        UserError: the text is not YAML, or a part of it would be ignored as a comment.

    Example:
        >>> read_value("[1, 0.5, 'run #2']", "--set a=...")
        [1, 0.5, 'run #2']
    """
    try:
        node = yaml.compose(text, UniqueKeyLoader)
        rest = text if node is None else text[node.end_mark.index :]
        if "#" in rest:
            ignored = rest.strip()
            raise UserError(
                f"{where}: YAML ignores '{ignored}' as a comment; put the value between quotes, as"
                f""" in '"{text}"'"""
            )
        return load_yaml(text, where)
    except DuplicateKeyError as error:
        raise UserError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: the value is not valid YAML: {text}") from error


def fixed_settings(section: Section) -> Json:
    """Return the settings that must stay the same when a run continues, as plain data.

    Example:
        >>> from typing import Annotated
        >>> class Run(Section):
        ...     seed: int = 0
        ...     log_every: Annotated[int, FREE_TO_CHANGE] = 10
        >>> fixed_settings(Run(log_every=5))
        {'seed': 0}
    """
    settings = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        # pydantic keeps what it does not know of an `Annotated` type in `metadata`
        if FREE_TO_CHANGE in field.metadata:
            settings.pop(name, None)  # None: a field may be excluded from dumps
        elif isinstance(value, Section):
            settings[name] = fixed_settings(value)
    return settings


class HasSettings(Protocol):
    """An entry of a registry that says which settings its kind takes."""

    @property
    def settings(self) -> type[Section]:
        """The section with the settings of the kind."""


def parse(section: type[SectionType], raw: JsonRow, where: str) -> SectionType:
    """Validate the values of a section.

    Args:
        section: its schema.
        raw: the values, as YAML gives them.
        where: what the values are, for the error message, e.g. the name of a file.

    Raises:
        UserError: one line that names the key, the given value and what is expected.

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
        # A validator raises ValueError (or UserError, which is one): pydantic catches it and adds
        # the path of the key. Any other type would leave without the path.
        return section.model_validate(dict(raw))
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, section)}") from error
    except UnicodeEncodeError as error:  # a name of a file may hold bytes that are no text
        raise UserError(f"{where}: {error.object!r} is not UTF-8; rename it") from error


@dataclasses.dataclass(frozen=True)
class Choice(pydantic.BeforeValidator):
    """The validator of a choice by `kind`, which also says what may be chosen.

    Attributes:
        kinds: returns the section of each kind, by its name. A function, since the entries of a
            registry may be registered later.
        default: the kind where the settings name none.
    """

    kinds: Callable[[], dict[str, type[Section]]] = dict
    default: str | None = None


def one_of(*sections: type[Section], noun: str, default: str | None = None) -> "Choice":
    """Return a validator for a closed choice: each section has its own literal `kind`.

    Args:
        sections: the alternatives; the default of their field `kind` names them.
        noun: what is chosen, for error messages.
        default: the kind where the settings name none.

    Example:
        >>> from typing import Annotated, Literal
        >>> class Circle(Section):
        ...     kind: Literal["circle"] = "circle"
        ...     radius: float = 1.0
        >>> class Figure(Section):
        ...     shape: Annotated[Circle, one_of(Circle, noun="shape")]
        >>> Figure(shape="circle").shape.radius
        1.0
        >>> parse(Figure, {"shape": {"kind": "circle", "side": 2}}, "figure")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: figure: unknown key shape.side (kind circle has: radius)
    """
    kinds = {str(section.model_fields["kind"].default): section for section in sections}
    return _by_kind(kinds, lambda kind: kinds[kind], noun, default)


def registered(
    registry: Mapping[str, HasSettings], noun: str, default: str | None = None
) -> "Choice":
    """Return a validator for an open choice: the entries of a registry bring their settings.

    Args:
        registry: from kind to entry. It is read when a value is validated, so that entries
            registered later count.
        noun, default: see `one_of`.
    """
    return _by_kind(registry, lambda kind: registry[kind].settings, noun, default)


# pydantic validates unions by a discriminator too, but it puts the tag into the path of an error
# (training.schedule.wsd.decay), which nobody writes, and it knows no alternatives that are
# registered later. So a choice is validated here, and pydantic receives the resulting section.
def _by_kind(
    kinds: Iterable[str], settings: Callable[[str], type[Section]], noun: str, default: str | None
) -> "Choice":
    def validate(value: object) -> object:
        raw = {"kind": value} if isinstance(value, str) else value
        if not isinstance(raw, dict):
            return raw  # a section already, or of a type that the field itself refuses
        # The default fills in for settings without a kind: {beta1: 0.8} adjusts the usual
        # optimizer.
        kind = raw.get("kind", default)
        if kind is None:
            raise _PathError(lambda path: f"{_dotted(path)}.kind is missing: {' or '.join(kinds)}")
        names = list(kinds)
        if kind not in names:
            key = "" if isinstance(value, str) else ".kind"
            near = did_you_mean(str(kind), names)
            raise _PathError(lambda path: f"{_dotted(path)}{key} = {kind!r}: unknown {noun}{near}")
        try:
            # `kind` is written into the section, too: a resolved config must not depend on the
            # default.
            return settings(kind).model_validate({"kind": kind, **raw})
        except pydantic.ValidationError as error:
            # `error` is unbound after the block, and the lambda is called later
            cause = error
            raise _PathError(lambda path: _one_line(cause, settings(kind), path, kind)) from error

    def sections() -> dict[str, type[Section]]:
        return {kind: settings(kind) for kind in kinds}

    return Choice(validate, kinds=sections, default=default)


class _PathError(ValueError):
    """An error in a choice or a section. Its text needs the path in the whole config."""

    def __init__(self, text: Callable[[Path], str]) -> None:
        super().__init__(text(()))
        self.text = text


def _expected_number(name: str, value: object) -> _PathError:
    return _PathError(lambda path: f"{_dotted((*path, name))} = {value!r}: expected a number")


def _one_line(
    error: pydantic.ValidationError, section: type[Section], path: Path = (), kind: str = ""
) -> str:
    # A misspelt key also makes its right name "missing", so the misspelling goes first.
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    path = (*path, *first["loc"])
    if first["type"] == "extra_forbidden":
        names = _field_names(section, first["loc"][:-1])
        if kind and len(first["loc"]) == 1:
            settings = ", ".join(name for name in names if name != "kind") or "no settings"
            return f"unknown key {_dotted(path)} (kind {kind} has: {settings})"
        near = did_you_mean(str(path[-1]), names)
        # Without sections, as settings of other trainers are: `lr` is training.learning_rate here.
        elsewhere = _paths_of(section, str(path[-1]))
        if len(elsewhere) == 1 and (len(path) == 1 or near.startswith(" (known")):
            near = f" (did you mean '{elsewhere[0]}'?)"
        return f"unknown key {_dotted(path)}{near}"
    if first["type"] == "value_error":
        cause = first["ctx"]["error"]
        if isinstance(cause, _PathError):
            return cause.text(path)
        return f"{_dotted(path)}: {cause}" if kind and path else str(cause)
    # pydantic says "Field required", which names no key
    if first["type"] == "missing":
        return f"{_dotted(path)} is missing"
    setting = f"{_dotted(path)} = {first['input']!r}"
    if first["type"] not in _EXPECTED:
        return f"{setting}: {first['msg'][0].lower()}{first['msg'][1:]}"
    expected = _EXPECTED[first["type"]]
    if first["type"] == "model_type":
        # the required keys alone, since a section has up to forty; a choice has a default kind
        required = {*_field_names(section, first["loc"], required=True)} - {"kind"}
        expected += f" with {', '.join(sorted(required))}" if required else ""
    return f"{setting}: expected {expected}"


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _paths_of(section: type[Section], name: str, prefix: str = "") -> list[str]:
    """Return the dotted paths of all settings of a name or with its initials, in a section."""
    paths = []
    for field in section.model_fields:
        initials = "".join(part[:1] for part in field.split("_")) if "_" in field else field
        if name in (field, initials):
            paths.append(f"{prefix}{field}")
        if (inner := _inner_section(section, field)) is not None:
            paths += _paths_of(inner, name, f"{prefix}{field}.")
    return paths


def _inner_section(section: type[Section], field: str) -> type[Section] | None:
    """Return the section that a field holds, as one of several alternatives or one of a list."""
    annotation: Any = section.model_fields[field].annotation
    # `Lora | None` and `tuple[Task, ...]` hold the section among their arguments
    options = (annotation, *getattr(annotation, "__args__", ()))
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def _field_names(section: type[Section], path: Path, *, required: bool = False) -> list[str]:
    """Return all keys, or the required ones, of the section at a path below another one."""
    node: type[Section] | None = section
    for part in path:
        # a number is the place in a list, whose elements have one schema
        if node is not None and not isinstance(part, int):
            node = _inner_section(node, part)
    if node is None:
        return []
    fields = node.model_fields.items()
    return [name for name, field in fields if field.is_required() or not required]


def override(raw: Json, item: str) -> None:
    """Change a nested dict as one `--set` says.

    Args:
        raw: is changed in place; sections that it lacks are added.
        item: `"section.key=value"` with a YAML value. A path or name (`TEXT_KEYS`) is taken as it
            is written, but for quotes, null, and lists and mappings where the key takes them. Where
            a bare name stands for a choice, a setting of the choice may follow:
            `"training.optimizer.beta1=0.8"`.

    Raises:
        UserError: the item is not of that form, or goes through a value that is no section.

    Example:
        >>> raw = {"training": {"epochs": 3, "optimizer": "lion"}}
        >>> for item in ("training.batch=8", "training.optimizer.beta1=0.8", "output=run #2"):
        ...     override(raw, item)
        >>> raw["training"], raw["output"]
        ({'epochs': 3, 'optimizer': {'kind': 'lion', 'beta1': 0.8}, 'batch': 8}, 'run #2')
    """
    # at the first "=": a value may hold others, as addresses do
    path, sign, text = item.partition("=")
    if not sign:
        raise UserError(
            f"--set {item}: expected section.key=value, e.g. --set training.learning_rate=1e-5"
        )
    name = path.strip().rpartition(".")[2]
    is_yaml = text in _NULLS or text.startswith(("'", '"'))
    if name not in _TEXTS:
        is_yaml |= name not in TEXT_KEYS or text.startswith(("[", "{"))
    if not is_yaml:
        set_value(raw, path.strip(), text, f"--set {item}")
        return
    # The same types as in a file. So `null` and `true` are values, and a list needs brackets.
    set_value(raw, path.strip(), read_value(text, f"--set {item}"), f"--set {item}")


def set_value(raw: Json, key: str, value: object, where: str) -> None:
    """Set one key of a nested dict; see `override`.

    Args:
        raw: is changed in place.
        key: its dotted path.
        value: its value.
        where: what asks for it, for the error message.

    Raises:
        UserError: the path goes through a value that is no section.
    """
    *parents, last = key.split(".")
    node = raw
    for name in parents:
        child = node.get(name)
        if isinstance(child, str):
            # the bare name of a choice; where it is none, validation refuses the key `kind`
            child = {"kind": child}
        if child is not None and not isinstance(child, dict):
            raise UserError(f"{where}: {name} is not a section")
        # a copy, because the caller may hold the inner dicts
        node[name] = dict(child or {})
        node = node[name]
    node[last] = value
