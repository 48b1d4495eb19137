"""A merge recipe becomes a plan, with every parameter a number for every tensor.

Scopes, filters and gradients are those of mergekit: the value of a parameter for a tensor is the
first one given by the model, its slice, the module, the recipe, or the method. See docs/recipes.md.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from jax_ordermerge import arch
from jax_ordermerge.checkpoint import sidecar_files
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import JsonRow, JsonValue
from jax_ordermerge.merge import unlisted
from jax_ordermerge.merge.plan import (
    Plan,
    config_notes,
    member_dtype_notes,
    resolve_dtype,
    with_stops_of,
)
from jax_ordermerge.merge.recipe import chat_templates, precheck, rules, schema, unlisted_planner
from jax_ordermerge.merge.recipe.evaluator import Evaluator, LayerRange, MergedTensor, filter_notes
from jax_ordermerge.merge.recipe.layers import Inputs, layer_ranges, numbered_layers
from jax_ordermerge.merge.recipe.models import Models, check_listed, open_models
from jax_ordermerge.merge.recipe.schema import Recipe
from jax_ordermerge.merge.sources.public_names import short_names
from jax_ordermerge.merge.sources.references import Resolve, open_any
from jax_ordermerge.merge.sources.storage import Source
from jax_ordermerge.merge.sources.vocabulary import RemappedVocabulary


def check_recipe(raw: JsonRow, where: str) -> Recipe:
    """Validate a recipe without opening its models, which may have to be downloaded.

    Args:
        raw: one of the recipes that `schema.load` returns.
        where: names the recipe in an error.

    Raises:
        UserError: one line with the first thing that is unknown, contradictory or not offered.
    """
    recipe = schema.parse(raw, where, rules.parameter_names())
    precheck.check(recipe, where)
    return recipe


def plan_recipe(
    recipe: str | Path | JsonRow,
    *,
    where: str | None = None,
    resolve: Resolve | None = None,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
) -> Plan:
    """Read a recipe and plan the merge.

    Args:
        recipe: a YAML file, a text with more than one line, or one of the recipes that
            `schema.load` returns.
        where: names the recipe in an error; by default the file.
        resolve: maps the name of a model to a directory; by default `convert.resolve`.
        ignore: unknown keys of `config.json` to ignore.
        allow_bin: read `.bin` files of PyTorch where a model has no safetensors.

    Raises:
        UserError: one line with the first thing that is unknown, contradictory or not offered.

    Example:
        >>> plan = plan_recipe('''
        ...     merge_method: linear
        ...     models: [{model: 'embedded:quickstart', parameters: {weight: [0.5, 1]}}]
        ... ''')
        >>> norms = [out for out in plan.outputs if out.name.endswith("input_layernorm.weight")]
        >>> [float(out.weights[0]) for out in norms]
        [0.5, 0.75, 1.0]
    """
    if not isinstance(recipe, Mapping):
        where = where or ("recipe" if "\n" in str(recipe) else str(recipe))
        recipe, *further = schema.load(recipe)
        if further:
            raise UserError(f"{where} has {1 + len(further)} recipes; they are planned one by one")
    raw, where = recipe, where or "recipe"
    settings = check_recipe(raw, where)
    rule = rules.find_rule(settings.merge_method)
    evaluator = Evaluator(settings.merge_method, rule)
    open_source = functools.partial(open_any, resolve=resolve, ignore=ignore, allow_bin=allow_bin)
    opened = open_models(settings, open_source)
    if any(map(unlisted.is_unlisted, opened.sources)):
        plan = unlisted_planner.plan_unlisted(settings, opened, evaluator, allow_bin=allow_bin)
        return dataclasses.replace(plan, recipe={**_shorten_paths(raw, settings), **plan.recipe})
    if settings.embedding is not None or settings.layers is not None:
        raise UserError(
            f"{where}: embedding and layers are for architectures that are not in the table;"
            " leave them out"
        )
    return _plan_listed(raw, settings, where, check_listed(settings, opened), evaluator)


def _plan_listed(
    raw: JsonRow, settings: Recipe, where: str, models: Models[Source], evaluator: Evaluator
) -> Plan:
    """Plan a merge of models in the tensor table."""
    labels = [source.label for source in models.sources]
    counts = [source.config.num_layers for source in models.sources]
    layers = layer_ranges(settings, Inputs(models.indices, models.base, labels, counts))
    notes = [*models.notes]
    notes += (note for part in layers for note in evaluator.check_names(part, labels))

    # of slices, each brings its layers with or without a window
    skip = ["full_attention_layers"] if settings.module.slices else []
    notes += config_notes(models.sources[models.base or 0], models.sources, skip)
    config = _merged_config(models, layers)
    tensors = _merged_tensors(config, layers)
    outputs = tuple(map(evaluator.output, tensors))
    notes += filter_notes(tensors, labels)

    merged = sorted({view.source for out in outputs for view in out.members})
    members = [models.sources[i] for i in merged]
    # The dtype of the members decides. A base in another dtype is rounded to it, with a note.
    dtype = resolve_dtype(settings.dtype, members)
    out_dtype = resolve_dtype(settings.out_dtype or dtype.name, [])
    precheck.check_rounding(settings, out_dtype.name, where)
    notes += _source_notes(settings, models.sources, merged, dtype)
    chat_template, prompt_format = _prompts(settings.chat_template, models, merged, notes)
    resolved = {"seed": settings.seed, "dtype": dtype.name, "out_dtype": out_dtype.name}
    return Plan(
        # the numbers of a rearranged vocabulary are those of other tokens
        with_stops_of(config, [m for m in members if not isinstance(m, RemappedVocabulary)]),
        models.sources,
        outputs,
        settings.seed,
        dtype,
        out_dtype,
        {**_shorten_paths(raw, settings), **resolved},
        stochastic=settings.rounding == "stochastic",
        tokenizer_from=models.sources[models.donor].directory,
        notes=tuple(dict.fromkeys(notes)),  # slices repeat them
        chat_template=chat_template,
        prompt_format=prompt_format,
        added_tokens=models.added_tokens,
    )


# --------------------------------------------------------------------------------------- tensors


def _merged_config(models: Models[Source], layers: Sequence[LayerRange]) -> arch.ModelConfig:
    donor = models.sources[models.donor].config
    return dataclasses.replace(
        # the base, or the first model where there is none; mergekit then takes a random one
        models.sources[models.base or 0].config,
        num_layers=sum(part.length for part in layers),
        full_attention_layers=numbered_layers("full_attention_layers", layers, models.sources),
        no_rope_layers=numbered_layers("no_rope_layers", layers, models.sources),
        # special tokens belong to the tokenizer
        bos_token_id=donor.bos_token_id,
        eos_token_ids=donor.eos_token_ids,
        pad_token_id=donor.pad_token_id,
    )


def _merged_tensors(config: arch.ModelConfig, layers: Sequence[LayerRange]) -> list[MergedTensor]:
    """Return every tensor of the merged model, with the tensors that it is merged from."""
    layer_of = [(part, index) for part in layers for index in range(part.length)]
    tensors = []
    for name, spec, layer in arch.hf_tensors(config):
        if layer is None:
            # as in mergekit: before the layers the first slice decides, after them the last, and
            # a gradient has its first value
            part = layers[0] if spec.kind == "embedding" else layers[-1]
            names, position = [name] * len(part.inputs), 0.0
        else:
            part, index = layer_of[layer]
            names = [spec.hf_name.format(entry.start + index) for entry in part.inputs]
            # within the slice, not within the model; one layer alone stands at the end
            position = index / (part.length - 1) if part.length > 1 else 1.0
        tensors.append(MergedTensor(name, spec.hf_shape, layer, part, names, position))
    return tensors


# ----------------------------------------------------------------------- tokenizer, notes, recipe


def _source_notes(
    recipe: Recipe, sources: Sequence[Source], merged: Sequence[int], dtype: np.dtype
) -> list[str]:
    notes = [*member_dtype_notes(recipe.dtype, dtype, [sources[i] for i in merged])]
    for index, source in enumerate(sources):
        dtypes = {source.info(name).dtype.name for name, _, _ in arch.hf_tensors(source.config)}
        if index not in merged and dtypes != {dtype.name}:
            listed = " and ".join(sorted(dtypes))
            notes.append(f"{source.label} is stored in {listed} and rounded to {dtype.name}")
        directory = source.directory
        if directory is None or not sidecar_files.has_tokenizer(directory):
            notes.append(f"{source.label} has no tokenizer files")
    return notes


def _prompts(
    setting: str | None, models: Models[Source], merged: Sequence[int], notes: list[str]
) -> tuple[str | None, PromptFormat]:
    """Return the text of the chat template, and how the models were asked where they agree."""
    # a base may be merged, too; what it was not trained on says nothing against the others
    trained = [i for i in merged if i != models.base] or merged
    members = [models.sources[i] for i in trained]
    formats = {member.prompt_format for member in members}
    # Members of one run agree. Where models were asked in different ways, none of them is that of
    # the merge.
    is_known = setting is None and len(formats) == 1
    donor = models.sources[models.donor]
    added = [entry["content"] for entry in models.added_tokens]
    template = chat_templates.choose(setting, models.sources, members, donor, added, notes)
    return template, formats.pop() if is_known else PromptFormat()


def _shorten_paths(raw: JsonValue, recipe: Recipe) -> JsonValue:
    """Return the recipe as it was written, with public names of its models instead of paths.

    The recipe is published with the merge, and paths of this machine say nothing to others.
    """
    # a text may name the model alone, the adapter alone, or both as MODEL+ADAPTER
    models = dict.fromkeys(
        name
        for reference in recipe.references()
        for name in (reference.name, reference.adapter, str(reference))
        if name is not None
    )
    short = short_names(models)

    # names may occur anywhere: in lists, as base_model, in tokenizer sources
    def replace(node: JsonValue) -> JsonValue:
        if isinstance(node, Mapping):
            return {key: replace(value) for key, value in node.items()}
        if isinstance(node, list):
            return [replace(value) for value in node]
        return short.get(node, node) if isinstance(node, str) else node

    return replace(raw)
