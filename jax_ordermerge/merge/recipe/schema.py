"""The schema of a merge recipe: the YAML of mergekit, and ours. Unknown keys are errors."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import pydantic
import yaml
from pydantic import BeforeValidator, Field, NonNegativeInt, PlainValidator, PositiveInt

from jax_ordermerge.config.merge import Dtype
from jax_ordermerge.config.section import DuplicateKeyError, Section, UniqueKeyLoader
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import Json, JsonRow, JsonValue
from jax_ordermerge.merge.recipe.settings import Settings, parse_settings

# Keys of which a recipe has at least one, and the config of an experiment has none.
KEYS = ("merge_method", "slices", "models")
# Keys of mergekit, of its other commands and of its command line, each with a reason or a remedy.
# Refused by name and not as unknown keys: who brings a recipe of mergekit learns what to do.
_NOT_OFFERED = {
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


class Reference(NamedTuple):
    """A model as a recipe names it: a directory, hub name or member of a run, and an adapter."""

    name: str
    adapter: str | None = None

    def __str__(self) -> str:
        return self.name if self.adapter is None else f"{self.name}+{self.adapter}"


def _parse_reference(raw: object) -> Reference:
    # from code and not from a file, as in `Tokenizer(source=Reference(...))`
    if isinstance(raw, Reference):
        return raw
    if isinstance(raw, str) and raw:
        return Reference(raw)
    if not isinstance(raw, dict):
        raise ValueError(
            f"{raw!r} is no model: expected a directory, a hub name, or model and lora "
            "with a path each"
        )
    for key in raw:
        if key not in ("model", "lora"):
            raise ValueError(_unknown_key(str(key), str(key), ("model", "lora")))
    if "model" not in raw:
        raise ValueError("model is missing beside lora")
    adapter = raw.get("lora")
    return Reference(_parse_path(raw["model"]), None if adapter is None else _parse_path(adapter))


def _parse_path(raw: object) -> str:
    if isinstance(raw, str) and raw:
        return raw
    if not isinstance(raw, dict) or not isinstance(raw.get("path"), str):
        raise ValueError(f"{raw!r}: expected a path")
    for key, value in raw.items():
        if key != "path" and value is not None:
            raise ValueError(_unknown_key(str(key), str(key), ("path",)))
    return str(raw["path"])


# plain: the two forms, text and a mapping, are parsed in one place, with errors in our words
ModelName = Annotated[Reference, PlainValidator(_parse_reference)]
# one name need not stand in a list
Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda raw: [raw] if isinstance(raw, str) else raw)
]
Parameters = Annotated[Settings, PlainValidator(parse_settings)]


class Entry(Section):
    """A model of the list `models`."""

    model: ModelName
    parameters: Parameters = Field(default_factory=dict)


class SliceEntry(Entry):
    """A model of a slice: its layers from the first number to before the second."""

    layer_range: tuple[NonNegativeInt, NonNegativeInt]


class Slice(Section):
    """Consecutive layers of the merged model, and the layers that they are merged from."""

    sources: Annotated[list[SliceEntry], Field(min_length=1)]
    base_model: ModelName | None = None
    parameters: Parameters = Field(default_factory=dict)


class Module(Section):
    """What is merged: models, or slices of models."""

    models: Annotated[list[Entry], Field(min_length=1)] | None = None
    slices: Annotated[list[Slice], Field(min_length=1)] | None = None
    parameters: Parameters = Field(default_factory=dict)


class ZeroRow(Section):
    """A row of zeros."""

    kind: Literal["zero"]


class TokenRow(Section):
    """The row of a token of a model, by its text or its number."""

    kind: Literal["model_token"]
    model: ModelName
    token: str | None = None
    token_id: NonNegativeInt | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> "TokenRow":
        if (self.token is None) == (self.token_id is None):
            raise ValueError("model_token takes one of token and token_id")
        return self


def _parse_row(raw: object) -> Reference | ZeroRow | TokenRow:
    if isinstance(raw, dict) and "kind" in raw:
        kinds: dict[object, type[ZeroRow | TokenRow]] = {"zero": ZeroRow, "model_token": TokenRow}
        if raw["kind"] not in kinds:
            raise ValueError(f"kind {raw['kind']!r}: expected zero or model_token")
        return kinds[raw["kind"]].model_validate(raw)
    return _parse_reference(raw)


class Token(Section):
    """Where the row of one token comes from: a model, the row of another token, or zeros."""

    source: Annotated[Reference | ZeroRow | TokenRow, PlainValidator(_parse_row)]
    # also in models that have a row of their own for the token
    force: bool = False


class Tokenizer(Section):
    """The vocabulary of the merged model: `union`, `base`, or a model."""

    # The default of mergekit where a recipe has a section `tokenizer` at all.
    source: ModelName = Reference("union")
    tokens: dict[str, Token] = Field(default_factory=dict)
    pad_to_multiple_of: PositiveInt = 1


class Recipe(Module):
    """A recipe. It has models or slices as a module has, or one module with them."""

    merge_method: str
    name: str | None = Field(
        None, description="by which later recipes of the file name the result; title of the card"
    )
    base_model: ModelName | None = None
    modules: dict[str, Module] | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    # mergekit's older form of `tokenizer: {source: ...}`
    tokenizer_source: ModelName | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    # of architectures that are not in the table
    embedding: Names | None = Field(
        None, min_length=1, description="the tensors with one row per token: embedding and head"
    )
    layers: str | None = Field(
        None, description="the stack of layers that slices are of, as `inspect` names it"
    )
    seed: int = 0
    rounding: Literal["nearest", "stochastic"] = "nearest"
    # Read and ignored: a merge writes its version into the recipe beside it.
    jax_ordermerge: str | None = Field(
        None,
        description="version that wrote the file, so that the recipe beside a merge is valid again",
    )

    @pydantic.model_validator(mode="after")
    def _check_structure(self) -> "Recipe":
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("tokenizer and tokenizer_source say the same; give one of them")
        _require_one(self, ("models", "slices", "modules"), "the recipe")
        for name, module in (self.modules or {}).items():
            if name != "default" or len(self.modules or {}) > 1:
                raise ValueError(f"modules: {name}: a decoder has one module, called default")
            _require_one(module, ("models", "slices"), "modules.default")
        return self

    @property
    def module(self) -> Module:
        """What is merged, in whichever form it was written."""
        return self if self.modules is None else self.modules["default"]

    def references(self) -> list[Reference]:
        """Return the models, each once: in the order of the file, an unlisted base last."""
        references = [entry.model for entry in self.module.models or ()]
        for part in self.module.slices or ():
            references += [source.model for source in part.sources]
        if self.base_model is not None:
            references.append(self.base_model)
        # Each once, in order. Not a set: random choices name members by position, and the order of
        # a set of texts changes from process to process, as results of mergekit do.
        return list(dict.fromkeys(references))


def _require_one(section: Section, keys: Sequence[str], where: str) -> None:
    present = [key for key in keys if getattr(section, key) is not None]
    if len(present) != 1:
        raise ValueError(
            f"{where} has {' and '.join(present) or 'no models'}; give one of {', '.join(keys)}"
        )


# --------------------------------------------------------------------------------------- reading


def is_recipe(path: str | Path) -> bool:
    """Return whether a YAML file is a merge recipe and not the config of an experiment.

    Raises:
        UserError: the file is not valid YAML.
    """
    documents = _read_documents(path)
    return (
        any(isinstance(raw, dict) and not raw.keys().isdisjoint(KEYS) for raw in documents)
        # a config of an experiment is one document
        or len(documents) > 1
    )


def load(source: str | Path) -> list[Json]:
    """Load the recipes of a file, or of a text with more than one line: mostly one.

    A file of several YAML documents merges in stages: each but the last has a `name`, by which
    later ones refer to its result.

    Raises:
        UserError: there is no such file, its content is not YAML with keys and values, a key is
            given twice, or a stage has no name or that of another.
    """
    is_text = isinstance(source, str) and "\n" in source
    if not is_text and not Path(source).is_file():
        raise UserError(f"recipe {source} not found")
    where = "recipe" if is_text else str(source)
    documents = _read_documents(source)
    for raw in documents:
        if not isinstance(raw, dict):
            raise UserError(
                f"{where}: expected keys such as merge_method and models, got {type(raw).__name__}"
            )
    # YAML reads `name: 1` as a number. References are texts, so such a name is refused below.
    names = [raw.get("name") for raw in documents]
    for number, name in enumerate(names[:-1], 1):
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{where}: recipe {number} of {len(names)} has no name, so no later one could refer"
                " to its result; give it a key name"
            )
        # before the first stage is merged: later ones would look for a model and an adapter
        if sign := next((sign for sign in "+@" if sign in name), None):
            raise UserError(
                f"{where}: the name {name} has a {sign}, by which no later recipe could refer to"
                " it; leave it out"
            )
        # Later names only: each pair is compared once, and the last recipe may have a name, too.
        if name in names[number:]:
            raise UserError(f"{where}: two recipes have the name {name}")
    return documents


def _read_documents(source: str | Path) -> list[JsonValue]:
    """Return the YAML documents of a file or text, without keys that only hold anchors."""
    is_text = isinstance(source, str) and "\n" in source
    where = "recipe" if is_text else str(source)
    try:
        text = str(source) if is_text else Path(source).read_text()
        # the loader is a safe one: no tag of a recipe constructs an object
        nodes = list(yaml.compose_all(text, UniqueKeyLoader))
        documents = list(yaml.load_all(text, UniqueKeyLoader))
    except DuplicateKeyError as error:
        raise UserError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    # `---` at the end of a file begins a document of nothing
    while documents and documents[-1] is None:
        documents.pop()
    for raw, node in zip(documents, nodes, strict=False):
        for key in _anchor_keys(node) if isinstance(node, yaml.MappingNode) else ():
            if key not in Recipe.model_fields:
                raw.pop(key, None)
    return documents or [None]


def _anchor_keys(document: yaml.MappingNode) -> list[str]:
    """Return the top-level keys below which a node is defined that another key refers to."""
    nodes_of = {key.value: dict(_nodes_by_id(value)) for key, value in document.value}
    return [
        key.value
        for key, value in document.value
        for referring, nodes in nodes_of.items()
        if referring != key.value
        # an alias is the node that it refers to, and stands where that node stands
        and any(
            key.start_mark.index <= node.start_mark.index < value.end_mark.index
            for number, node in nodes.items()
            if number in nodes_of[key.value]
        )
    ]


def _nodes_by_id(node: yaml.Node) -> Iterator[tuple[int, yaml.Node]]:
    """Yield a node and all below it; an alias is the node it refers to."""
    yield id(node), node
    children: Iterable[yaml.Node] = ()
    if isinstance(node, yaml.MappingNode):
        children = itertools.chain.from_iterable(node.value)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    for child in children:
        yield from _nodes_by_id(child)


def parse(raw: JsonRow, where: str, parameters: Sequence[str] = ()) -> Recipe:
    """Validate a recipe.

    Args:
        raw: from `load`.
        where: names the recipe in an error.
        parameters: names of the parameters of methods, to recognize one in the place of a key.

    Raises:
        UserError: one line with the first thing that is wrong, and where.
    """
    try:
        return Recipe.model_validate(dict(raw))
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_describe(error, parameters)}") from error


def _describe(error: pydantic.ValidationError, parameters: Sequence[str]) -> str:
    # a misspelt key also makes the right one "missing": report the misspelling
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]]
    path = "".join(steps).lstrip(".")
    match first["type"]:
        case "extra_forbidden":
            key = str(first["loc"][-1])
            if key in parameters:
                return f"{path} is a parameter; write it below parameters:"
            return _unknown_key(key, path, _valid_keys(first["loc"][:-1]))
        case "value_error":
            return f"{path}: {first['ctx']['error']}" if path else str(first["ctx"]["error"])
        case "missing":
            return f"{path} is missing"
    return f"{path} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _unknown_key(key: str, path: str, valid: Sequence[str]) -> str:
    if key in _NOT_OFFERED:
        return f"{path} is not offered: {_NOT_OFFERED[key]}"
    return f"unknown key {path}{did_you_mean(key, valid)}"


def _valid_keys(location: Sequence[str | int]) -> list[str]:
    section: type[Section] | None = Recipe
    # numbers are positions in lists, which do not change the section
    for step in location:
        if isinstance(step, str) and section is not None and step in section.model_fields:
            section = _section_in(section.model_fields[step].annotation)
    return list(section.model_fields) if section is not None else []


def _section_in(annotation: object) -> type[Section] | None:
    """Return the section within an annotation such as `list[Slice] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
