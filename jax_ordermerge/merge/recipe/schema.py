"""The schema of a merge recipe, mergekit's YAML and ours, read strictly; and the settings that its parameters are given by."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import pydantic
import yaml
from pydantic import Field, NonNegativeInt, PlainValidator, PositiveInt

from jax_ordermerge.config.merge import Dtype
from jax_ordermerge.config.section import Section
from jax_ordermerge.errors import UserError, did_you_mean

Scalar = bool | int | float | str
EVERYTHING = ("", "*")  # filters

# keys of mergekit, of its other commands and of its command line, with what to know of them
REFUSED = {
    "experts": "mixtures of experts are not made here",
    "gate_mode": "mixtures of experts are not made here",
    "experts_per_token": "mixtures of experts are not made here",
    "shared_experts": "mixtures of experts are not made here",
    "trust_remote_code": "code that comes with a model is never run",
    "allow_crimes": "models of different architectures are not merged",
    "override_architecture": "the architecture is that of config.json",
    "revision": "download the revision and give its directory",
    "residual_weight": "mergekit reads it and never uses it",
    "random_seed": "it is called seed",
}


class Setting(NamedTuple):
    """What a recipe says of one parameter in one place: a number, a gradient over the layers, or either by filters.

    Attributes:
        entries: `(filter, values)` in the order of the file; several values are a gradient.
    """

    entries: tuple[tuple[str, tuple[Scalar, ...]], ...]

    def at(self, name: str, position: float) -> Scalar | None:
        """Return the value for a tensor: that of the first filter which is part of its name; None where there is none.

        Args:
            name: Hugging Face name.
            position: of its layer, from 0 to 1; numbers of a gradient are interpolated, anything else is not.

        Example:
            >>> parse_setting([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]).at(
            ...     "layers.1.mlp.up_proj", 0.25
            ... )
            0.25
        """
        for pattern, values in self.entries:
            if pattern in EVERYTHING or pattern in name:
                return _interpolate(values, position)
        return None


Settings = dict[str, Setting]


def _interpolate(values: Sequence[Scalar], position: float) -> Scalar | None:
    if not values:
        return None
    at = round(
        position * (len(values) - 1), 9
    )  # layers that stand on a number get it, whatever the last bit of a quotient
    low = int(at)
    if len(values) == 1 or any(isinstance(one, bool | str) for one in values):
        return values[low]
    part, high = at - low, values[min(low + 1, len(values) - 1)]
    mixed = (1 - part) * float(values[low]) + part * float(high)
    whole = all(isinstance(one, int) for one in values) and mixed.is_integer()
    return int(mixed) if whole else mixed


def parse_setting(raw: Any) -> Setting:
    """Read the value of a parameter.

    Raises:
        ValueError: what is wrong with it.
    """
    if isinstance(raw, dict):
        raw = [raw]
    if not isinstance(raw, list):
        return Setting((("", (_scalar(raw),)),))
    filtered = [isinstance(one, dict) for one in raw]
    if not any(filtered):
        return Setting((("", tuple(map(_scalar, raw))),))
    if not all(filtered):
        raise ValueError("a list holds numbers, or entries {filter, value}, not both")
    return Setting(tuple(map(_entry, raw)))


def _entry(raw: Mapping[str, Any]) -> tuple[str, tuple[Scalar, ...]]:
    for key in raw:
        if key not in ("filter", "value"):
            raise ValueError(f"unknown key {key}{did_you_mean(str(key), ('filter', 'value'))}")
    if "value" not in raw:
        raise ValueError(f"the entry {dict(raw)} has no value")
    pattern, value = raw.get("filter"), raw["value"]
    if not isinstance(pattern, str | None):
        raise ValueError(f"filter {pattern!r} must be text, a part of a tensor's name")
    return pattern or "", tuple(map(_scalar, value)) if isinstance(value, list) else (
        _scalar(value),
    )


def _scalar(raw: Any) -> Scalar:
    if not isinstance(raw, bool | int | float | str):
        raise ValueError(f"{raw!r} is no number, text, true or false")
    if isinstance(raw, str):
        try:
            number = float(raw)  # YAML takes 1e-4 for text
        except ValueError:
            return raw
        raw = number
    if isinstance(raw, float) and not math.isfinite(raw):
        raise ValueError(f"{raw} is not finite")
    return raw


def _parse_settings(raw: Any) -> Settings:
    if not isinstance(raw, dict | None):
        raise ValueError("parameters are names with values")
    out = {}
    for name, value in (raw or {}).items():
        try:
            out[str(name)] = value if isinstance(value, Setting) else parse_setting(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return out


class Reference(NamedTuple):
    """A model, as a recipe names it: directory, hub name or member of a run, and an adapter."""

    name: str
    adapter: str | None = None

    def __str__(self) -> str:
        return self.name if self.adapter is None else f"{self.name}+{self.adapter}"


def _parse_reference(raw: Any) -> Reference:
    if isinstance(raw, Reference):
        return raw
    if isinstance(raw, str) and raw:
        return Reference(raw)
    if not isinstance(raw, dict):
        raise ValueError(
            f"{raw!r} is no model: expected a directory, a hub name, or model and lora with a path each"
        )
    for key in raw:
        if key not in ("model", "lora"):
            raise ValueError(_unknown(str(key), str(key), ("model", "lora")))
    if "model" not in raw:
        raise ValueError("model is missing beside lora")
    return Reference(
        _path(raw["model"]), _path(raw["lora"]) if raw.get("lora") is not None else None
    )


def _path(raw: Any) -> str:
    if isinstance(raw, str) and raw:
        return raw
    if not isinstance(raw, dict) or not isinstance(raw.get("path"), str):
        raise ValueError(f"{raw!r}: expected a path")
    for key, value in raw.items():
        if key != "path" and value is not None:
            raise ValueError(_unknown(str(key), str(key), ("path",)))
    return str(raw["path"])


Named = Annotated[Reference, PlainValidator(_parse_reference)]
Parameters = Annotated[Settings, PlainValidator(_parse_settings)]


class Entry(Section):
    """A model of the list `models`."""

    model: Named
    parameters: Parameters = Field(default_factory=dict)


class Layers(Entry):
    """A model of a slice: its layers from the first to before the second number."""

    layer_range: tuple[NonNegativeInt, NonNegativeInt]


class Slice(Section):
    """Layers of the merged model, merged from layers of the models."""

    sources: Annotated[list[Layers], Field(min_length=1)]
    base_model: Named | None = None
    parameters: Parameters = Field(default_factory=dict)


class Module(Section):
    """The one module of a decoder, written out."""

    models: Annotated[list[Entry], Field(min_length=1)] | None = None
    slices: Annotated[list[Slice], Field(min_length=1)] | None = None
    parameters: Parameters = Field(default_factory=dict)


class Token(Section):
    """Where the row of one token comes from."""

    source: Named
    force: bool = False


class Tokenizer(Section):
    """The vocabulary of the merged model: `union`, `base`, or a model."""

    source: Named = Reference("union")
    tokens: dict[str, Token] = Field(default_factory=dict)
    pad_to_multiple_of: PositiveInt = 1


class Recipe(Section):
    """A whole recipe."""

    merge_method: str
    base_model: Named | None = None
    models: Annotated[list[Entry], Field(min_length=1)] | None = None
    slices: Annotated[list[Slice], Field(min_length=1)] | None = None
    modules: dict[str, Module] | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Named | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    seed: int = 0
    rounding: Literal["nearest", "stochastic"] = "nearest"
    jax_ordermerge: str | None = Field(
        None,
        description="the version that wrote the file: what is beside a merge can be read again",
    )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("tokenizer and tokenizer_source say the same; give one of them")
        _exactly_one(self, ("models", "slices", "modules"), "the recipe")
        for name, module in (self.modules or {}).items():
            if name != "default" or len(self.modules or {}) > 1:
                raise ValueError(f"modules: {name}: a decoder has one module, called default")
            _exactly_one(module, ("models", "slices"), "modules.default")
        return self

    @property
    def module(self) -> Module:
        """What is merged, as a module, however it was written."""
        if self.modules is not None:
            return self.modules["default"]
        return Module(models=self.models, slices=self.slices)

    def references(self) -> Iterator[Reference]:
        """Yield the models that are merged, each once: in the order of the file, the base last where it is in no list."""
        module = self.module
        found = {entry.model: None for entry in module.models or ()}
        for one in module.slices or ():
            found.update({source.model: None for source in one.sources})
        yield from found
        if self.base_model is not None and self.base_model not in found:
            yield self.base_model


def _exactly_one(section: Section, keys: Sequence[str], where: str) -> None:
    given = [key for key in keys if getattr(section, key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"{where} has {' and '.join(given) or 'no models'}; give one of {', '.join(keys)}"
        )


# ------------------------------------------------------------------------------------------------------------------------ reading


def load(source: str | Path) -> dict[str, Any]:
    """Return the YAML of a file, or of text of more than one line.

    Raises:
        UserError: there is no such file, or it is no YAML of keys and values, or a key is given twice.
    """
    text = isinstance(source, str) and "\n" in source
    if not text and not Path(source).is_file():
        raise UserError(f"recipe {source} not found")
    where = "recipe" if text else str(source)
    try:
        raw = yaml.load(str(source) if text else Path(source).read_text(), _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(
            f"{where}: expected keys such as merge_method and models, got {type(raw).__name__}"
        )
    return raw


def parse(raw: Mapping[str, Any], where: str, parameters: Sequence[str] = ()) -> Recipe:
    """Check a recipe.

    Args:
        raw: what `load` returned.
        where: names it in an error.
        parameters: names of parameters of methods: what stands in the place of a key may be one.

    Raises:
        UserError: one line with the first thing that is wrong, and where.
    """
    try:
        return Recipe.model_validate(dict(raw))
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, parameters)}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _one_line(error: pydantic.ValidationError, parameters: Sequence[str]) -> str:
    # a misspelt key also makes its right name "missing": the misspelling is what to show
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    shown = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
    ).lstrip(".")
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        if key in parameters:
            return f"{shown} is a parameter; write it below parameters:"
        return _unknown(key, shown, _known_keys(first["loc"][:-1]))
    if first["type"] in ("value_error", "missing"):
        text = str(first["ctx"]["error"]) if first["type"] == "value_error" else "is missing"
        return f"{shown}{': ' if first['type'] == 'value_error' and shown else ' ' * bool(shown)}{text}"
    return f"{shown} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _unknown(key: str, shown: str, known: Sequence[str]) -> str:
    if key in REFUSED:
        return f"{shown} is not offered: {REFUSED[key]}"
    return f"unknown key {shown}{did_you_mean(key, known)}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    node: type[Section] | None = Recipe
    for part in location:
        if isinstance(part, str) and node is not None and part in node.model_fields:
            node = _section(node.model_fields[part].annotation)
    return list(node.model_fields) if node is not None else []


def _section(annotation: Any) -> type[Section] | None:
    """Return the section within an annotation such as `list[Slice] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(
        (found for one in get_args(annotation) if (found := _section(one)) is not None), None
    )
