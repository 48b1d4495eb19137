"""Merge recipes: mergekit's YAML and ours become a plan, with every parameter a number for every tensor.

Scopes, filters and gradients are mergekit's: the value of a parameter is the first one given for the tensor by the model, its slice,
the module, the whole recipe, or the method. docs/recipes.md has the whole of it.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jax_ordermerge import arch
from jax_ordermerge.checkpoint import convert, safetensors, sidecar_files
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.plan import Plan, check_same, resolve_dtype
from jax_ordermerge.merge.recipe import methods, schema
from jax_ordermerge.merge.recipe.schema import Recipe, Reference, Settings
from jax_ordermerge.merge.recipe.values import Evaluator, Input, Place, Slice
from jax_ordermerge.merge.sources import vocabulary
from jax_ordermerge.merge.sources.references import Resolve, open_model
from jax_ordermerge.merge.sources.storage import Checkpoint, Source, Untied

__all__ = ["is_recipe", "open_model", "read"]


class _Models(NamedTuple):
    """The models of a recipe, brought together: by name, the vocabulary's donor, files of its tokenizer that change, and notes."""

    sources: tuple[Source, ...]
    numbers: Mapping[Reference, int]
    donor: int
    files: Mapping[str, str]
    notes: tuple[str, ...]


def is_recipe(path: str | Path) -> bool:
    """Return whether a YAML file is a merge recipe."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(raw, dict) and ("merge_method" in raw or "slices" in raw or "models" in raw)


def read(recipe: str | Path, *, resolve: Resolve = convert.resolve) -> Plan:
    """Read a recipe and plan what it says.

    Args:
        recipe: a YAML file, or text of more than one line.
        resolve: finds the directory of a model's name, by default as `convert.resolve`.

    Raises:
        UserError: one line with the first thing in it that is unknown, contradictory or not offered.

    Example:
        >>> made = read(
        ...     "merge_method: linear\\nmodels: [{model: 'embedded:quickstart', parameters: {weight: [0.5, 1]}}]"
        ... )
        >>> [
        ...     float(out.weights[0])
        ...     for out in made.outputs
        ...     if out.name.endswith("input_layernorm.weight")
        ... ]
        [0.5, 0.75, 1.0]
    """
    raw, where = schema.load(recipe), "recipe" if "\n" in str(recipe) else str(recipe)
    given = schema.parse(raw, where, methods.parameter_names())
    rule = methods.find(given.merge_method)
    models = _open(given, resolve)
    slices = _slices(given, models)
    if rule.needs_base and any(one.base is None for one in slices):
        raise UserError(f"{where}: merge_method {given.merge_method} needs base_model")
    names = Evaluator(given.merge_method, rule)
    notes = [*models.notes, *(note for one in slices for note in names.check(one, models.sources))]
    config = dataclasses.replace(
        models.sources[_base(given, models) or 0].config,
        num_layers=sum(one.length for one in slices),
        **{
            key: getattr(models.sources[models.donor].config, key)
            for key in ("bos_token_id", "eos_token_ids", "pad_token_id")
        },
    )
    outputs = tuple(names.output(place) for place in _places(config, slices))
    merged = sorted({view.source for out in outputs for view in out.members})
    dtype = resolve_dtype(given.dtype, [models.sources[number] for number in merged])
    out_dtype = resolve_dtype(given.out_dtype or dtype.name, [])
    if given.rounding == "stochastic" and out_dtype.name != "bfloat16":
        raise UserError(
            f"{where}: rounding: stochastic is for bfloat16, the output is {out_dtype.name}; leave it out"
        )
    notes += _source_notes(given, models.sources, merged, dtype.name)
    template, more = _chat_template(given.chat_template, models.sources)
    return Plan(
        config,
        models.sources,
        outputs,
        given.seed,
        dtype,
        out_dtype,
        {
            **_without_paths(raw, given),
            "seed": given.seed,
            "dtype": dtype.name,
            "out_dtype": out_dtype.name,
        },
        stochastic=given.rounding == "stochastic",
        tokenizer_from=models.sources[models.donor].directory,
        notes=tuple(dict.fromkeys([*notes, *more])),
        chat_template=template,
        tokenizer_files=models.files,
    )


# ------------------------------------------------------------------------------------------------------------------------- models


def _open(given: Recipe, resolve: Resolve) -> _Models:
    numbers = {reference: number for number, reference in enumerate(given.references())}
    sources: list[Source] = [open_model(one.name, one.adapter, resolve=resolve) for one in numbers]
    notes = []
    if len({one.config.tie_embeddings for one in sources}) > 1:
        tied = [one for one in sources if one.config.tie_embeddings]
        sources = [Untied(one) if one.config.tie_embeddings else one for one in sources]
        notes = [
            f"{one.label} ties its output head to its embedding: the head is the embedding there"
            for one in tied
        ]
    may_differ = {"vocab_size", *(["num_layers"] if given.module.slices else [])}
    for other in sources[1:]:
        check_same(sources[0], other, may_differ)
    opened = _Models(tuple(sources), numbers, 0, {}, tuple(notes))
    return _unite_vocabularies(given, opened._replace(donor=_base(given, opened) or 0))


def _base(given: Recipe, models: _Models) -> int | None:
    return None if given.base_model is None else models.numbers[given.base_model]


def _unite_vocabularies(given: Recipe, models: _Models) -> _Models:
    """Bring all models to one vocabulary, where that is asked for or where they differ in size."""
    wanted = given.tokenizer or schema.Tokenizer(source=given.tokenizer_source or Reference("base"))
    asked = given.tokenizer is not None or given.tokenizer_source is not None
    if not asked and len({one.config.vocab_size for one in models.sources}) == 1:
        return models
    first = donor = models.donor
    if str(wanted.source) not in ("union", "base"):
        donor = _among(wanted.source, "the tokenizer's source", models)
    aligned = vocabulary.align(
        models.sources,
        first=first,
        donor=donor,
        union=str(wanted.source) == "union",
        token_sources={
            token: vocabulary.TokenSource(
                _among(rule.source, f"the source of token {token!r}", models), rule.force
            )
            for token, rule in wanted.tokens.items()
        },
        multiple=wanted.pad_to_multiple_of,
    )
    return models._replace(
        sources=aligned.sources,
        donor=donor,
        files=aligned.files,
        notes=(*models.notes, *aligned.notes),
    )


def _among(reference: Reference, what: str, models: _Models) -> int:
    if reference not in models.numbers:
        known = ", ".join(map(str, models.numbers))
        raise UserError(
            f"{what} is {reference}, which is none of the models of the recipe ({known})"
        )
    return models.numbers[reference]


def _slices(given: Recipe, models: _Models) -> list[Slice]:
    module, base = given.module, _base(given, models)
    outer = (module.parameters, given.parameters)
    if module.models is not None:
        inputs = [
            Input(models.numbers[entry.model], 0, entry.parameters) for entry in module.models
        ]
        if base is not None and base not in {one.source for one in inputs}:
            inputs.append(Input(base, 0, {}, listed=False))
        return [
            _slice(
                inputs,
                base,
                [models.sources[one.source].config.num_layers for one in inputs],
                outer,
                models,
            )
        ]
    found = []
    for number, one in enumerate(module.slices or ()):
        inputs = [
            Input(models.numbers[entry.model], entry.layer_range[0], entry.parameters)
            for entry in one.sources
        ]
        for entry in one.sources:
            start, end = entry.layer_range
            layers = models.sources[models.numbers[entry.model]].config.num_layers
            if not start < end <= layers:
                raise UserError(
                    f"slices[{number}]: layer_range [{start}, {end}] of {entry.model}, which has the layers 0 to {layers}"
                )
        own = given.base_model if one.base_model is None else one.base_model
        if own is not None and own not in {entry.model for entry in one.sources}:
            raise UserError(
                f"slices[{number}] lacks its base_model {own} among the sources; add it with its layer_range"
            )
        lengths = [entry.layer_range[1] - entry.layer_range[0] for entry in one.sources]
        base = None if own is None else models.numbers[own]
        found.append(_slice(inputs, base, lengths, (one.parameters, *outer), models))
    return found


def _slice(
    inputs: Sequence[Input],
    base: int | None,
    lengths: Sequence[int],
    scopes: tuple[Settings, ...],
    models: _Models,
) -> Slice:
    numbers = [one.source for one in inputs]
    for place, number in enumerate(numbers):
        if number in numbers[:place]:
            raise UserError(
                f"model {models.sources[number].label} is given twice; give each once, with the sum of the weights"
            )
        if lengths[place] != lengths[0]:
            raise UserError(
                f"{models.sources[number].label} gives {lengths[place]} layers and {models.sources[numbers[0]].label} {lengths[0]};"
                " layers are merged one with one"
            )
    return Slice(tuple(inputs), None if base is None else numbers.index(base), lengths[0], scopes)


def _places(config: arch.ModelConfig, slices: Sequence[Slice]) -> list[Place]:
    """Return every tensor of the merged model, with where it comes from."""
    layers = [(one, index) for one in slices for index in range(one.length)]
    places = []
    for name, spec, layer in arch.hf_tensors(config):
        if layer is None:
            # before the layers as the first slice says, after them as the last; gradients begin there
            part = slices[0] if spec.kind == "embedding" else slices[-1]
            places.append(Place(name, spec.hf_shape, None, part, [name] * len(part.inputs), 0.0))
            continue
        part, index = layers[layer]
        position = index / (part.length - 1) if part.length > 1 else 1.0
        inputs = [spec.hf_name.format(one.start + index) for one in part.inputs]
        places.append(Place(name, spec.hf_shape, layer, part, inputs, position))
    return places


# ------------------------------------------------------------------------------------------------------------------- what is noted


def _source_notes(
    given: Recipe, sources: Sequence[Source], merged: Sequence[int], dtype: str
) -> list[str]:
    notes = []
    if given.dtype is None and any(_is_member(sources[number]) for number in merged):
        notes.append(
            f"members of a run are kept in {dtype} and merged in it; dtype: bfloat16 merges what the run exports"
        )
    for number, one in enumerate(sources):
        stored = {one.info(name).dtype.name for name, _, _ in arch.hf_tensors(one.config)}
        if number not in merged and stored != {dtype}:
            notes.append(
                f"{one.label} is stored in {' and '.join(sorted(stored))} and rounded to {dtype}"
            )
        if one.directory is None or not any(
            (one.directory / name).is_file() for name in sidecar_files.TOKENIZER_FILES
        ):
            notes.append(f"{one.label} has no tokenizer files")
    return notes


def _is_member(source: Source) -> bool:
    return isinstance(source, Checkpoint) and source.member is not None


def _chat_template(wanted: str | None, sources: Sequence[Source]) -> tuple[str | None, list[str]]:
    """Return the text of the template asked for, and notes."""
    if wanted is None or "{" in wanted:
        return wanted, []
    if wanted != "auto":
        raise UserError(
            f"chat_template '{wanted}' is not offered; give auto, or the text of a Jinja template"
        )
    found = [
        text
        for one in sources
        if one.directory is not None and (text := _template_of(one.directory)) is not None
    ]
    if not found:
        return None, ["no model has a chat template"]
    counted = collections.Counter(found)
    return max(counted, key=counted.__getitem__), []  # the first of the most common


def _template_of(directory: Path) -> str | None:
    beside, own = (
        directory / sidecar_files.CHAT_TEMPLATE,
        directory / sidecar_files.TOKENIZER_CONFIG,
    )
    if beside.is_file():
        return beside.read_text()
    template = safetensors.read_json(own).get("chat_template") if own.is_file() else None
    return template if isinstance(template, str) else None


def _without_paths(raw: Any, given: Recipe) -> Any:
    """Return the recipe as it was written, with the last part of a path in place of the path."""
    short: dict[str, str] = {}
    for reference in given.references():
        name, adapter = (None if part is None else _last_part(part) for part in reference)
        short |= {str(reference): str(Reference(str(name), adapter)), reference.name: str(name)}
        short |= {} if reference.adapter is None else {reference.adapter: str(adapter)}

    def walk(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return short.get(node, node) if isinstance(node, str) else node

    return walk(raw)


def _last_part(name: str) -> str:
    parts = [
        one if not one.startswith(("/", ".", "~")) and not Path(one).exists() else Path(one).name
        for one in name.split("+")
    ]
    return "+".join(parts)
