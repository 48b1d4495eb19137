"""A recipe of models that are not in the tensor table becomes a plan; see `merge.unlisted`.

Scopes, filters and gradients are those of `planner`. The layers of a gradient are those of the
stack that a tensor is in (`arch.unlisted` says what a stack of layers is). Slices are of one stack,
and tensors outside of it are merged one with one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax_ordermerge.arch import UnlistedConfig
from jax_ordermerge.arch import unlisted as tensor_names
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import Json, JsonRow, JsonValue
from jax_ordermerge.merge import unlisted
from jax_ordermerge.merge.plan import Plan
from jax_ordermerge.merge.recipe import chat_templates, precheck
from jax_ordermerge.merge.recipe.evaluator import Evaluator, LayerRange, MergedTensor, filter_notes
from jax_ordermerge.merge.recipe.layers import Inputs, layer_ranges
from jax_ordermerge.merge.recipe.models import Models, unite_vocabularies
from jax_ordermerge.merge.recipe.schema import Recipe
from jax_ordermerge.merge.sources.storage import AnySource
from jax_ordermerge.merge.sources.unlisted import NamedVocabulary, Unlisted

# Words of a stack's name and of keys of a config that mean one part of a model.
_TEXT = {"decoder", "text", "language"}
_PARTS = ({"vision", "visual", "image"}, {"audio", "speech"}, _TEXT, {"encoder"}, {"single"})


def plan_unlisted(
    recipe: Recipe,
    opened: Models[AnySource],
    evaluator: Evaluator,
    *,
    allow_bin: bool = False,
) -> Plan:
    """Plan a recipe of which one model at least is not in the tensor table.

    Args:
        recipe: checked.
        opened: its models.
        evaluator: of the parameters of its method.
        allow_bin: read `.bin` files of PyTorch where a model has no safetensors.

    Returns:
        The plan. Its recipe has only what was resolved: seed and dtypes.

    Raises:
        UserError: one line with the first thing that does not go together.
    """
    stored = unlisted.open_unlisted(opened.sources, allow_bin=allow_bin)
    lead = stored[opened.base or 0]
    stack = None
    if recipe.module.slices is not None:
        stack = _sliced_stack(recipe, lead)
    elif recipe.layers is not None:
        raise UserError("layers names the stack that slices are of; the recipe has none")
    models = _with_vocabulary(recipe, opened, stored)
    for source in stored:
        if source is not lead:
            # alignment gives these one number of rows, in `models`; here they are as stored
            rows = recipe.embedding or (*lead.config.vocabulary, *source.config.vocabulary)
            unlisted.check_same(lead, source, stack, any_rows=rows)
    labels = [source.label for source in models.sources]
    counts = [_count_layers(source, stack) for source in stored]
    layers = layer_ranges(recipe, Inputs(models.indices, models.base, labels, counts))
    notes = [*models.notes]
    notes += (note for part in layers for note in evaluator.check_names(part, labels))
    if stack is None:
        tensors = [_merged_tensor(name, lead, layers[0], models.sources) for name in lead.names]
    else:
        embedding = None if recipe.embedding is None else recipe.embedding[0]
        tensors = _sliced_tensors(lead, layers, models.sources, stored, stack, embedding)
    notes += filter_notes(tensors, labels)
    outputs = unlisted.finish_outputs(
        map(evaluator.output, tensors),
        models.sources,
        dtype=recipe.dtype,
        out_dtype=recipe.out_dtype,
    )
    notes += unlisted.merge_notes(stored, lead, outputs, recipe.dtype)
    plan = unlisted.make_plan(
        lead, models.sources, outputs, {"seed": recipe.seed}, recipe.seed, notes
    )
    # of each tensor: a model in bfloat16 may have some in float32, and these cannot be rounded so
    for output in outputs:
        if not output.copied:
            precheck.check_rounding(recipe, plan.out_dtype_of(output).name, output.name)
    content = dict(plan.config.content) if isinstance(plan.config, UnlistedConfig) else {}
    if stack is not None:
        content = _sliced_content(content, stack, lead, _leads(layers, stored), notes)
    plan = dataclasses.replace(plan, notes=tuple(dict.fromkeys(notes)))
    return _with_tokenizer(plan, recipe, models, lead, content)


def _count_layers(source: Unlisted, stack: str | None) -> int:
    # any number will do where whole models are merged: names were compared
    return 1 if stack is None else source.stacks.get(stack, 0)


def _sliced_stack(recipe: Recipe, lead: Unlisted) -> str:
    """Return the stack of layers that the slices of a recipe are of."""
    listed = ", ".join(f"{prefix} ({count} layers)" for prefix, count in lead.stacks.items())
    if recipe.layers is not None:
        if recipe.layers not in lead.stacks:
            raise UserError(
                f"layers: {lead.label} has no stack {recipe.layers}"
                f"{did_you_mean(recipe.layers, lead.stacks)} (it has {listed or 'none'})"
            )
        return recipe.layers
    # not the longest of several: vision and text may have equally many layers
    if len(lead.stacks) != 1:
        raise UserError(
            f"slices: {lead.label} has {len(lead.stacks)} stacks of layers"
            f"{f': {listed}; name one with layers: NAME' if lead.stacks else ''}"
        )
    return next(iter(lead.stacks))


def _with_vocabulary(
    recipe: Recipe, opened: Models[AnySource], stored: Sequence[Unlisted]
) -> Models[AnySource]:
    """Return the models with one vocabulary, where their embeddings are known."""
    sources: Sequence[AnySource] = stored
    if recipe.embedding is not None:
        sources = [NamedVocabulary(source, recipe.embedding) for source in stored]
    models = opened._replace(sources=tuple(sources))
    # rows are matched by token only where all models agree which tensors have them
    names = {getattr(source.config, "vocabulary", ()) for source in sources}
    if len(names) == 1 and all(names):
        return unite_vocabularies(recipe, models)
    # without these keys whole embeddings are merged like any other tensor, if their shapes agree
    if recipe.tokenizer is not None or recipe.tokenizer_source is not None:
        raise UserError(
            "tokenizer: which tensors have one row per token is not known; name embedding and head"
            " with embedding: [NAME, NAME]"
        )
    return models


def _merged_tensor(
    name: str, lead: Unlisted, part: LayerRange, sources: Sequence[AnySource]
) -> MergedTensor:
    """Return a tensor that is merged with those of its name."""
    place = tensor_names.find_place(name, lead.stacks)
    shape = sources[part.inputs[0].source].info(name).shape
    names = [name] * len(part.inputs)
    if place is None:
        # as in `planner`: a gradient has its first value outside of the layers
        return MergedTensor(name, shape, None, part, names, 0.0)
    position = place.layer / (lead.stacks[place.stack] - 1)
    return MergedTensor(name, shape, place.layer, part, names, position)


def _sliced_tensors(
    lead: Unlisted,
    layers: Sequence[LayerRange],
    sources: Sequence[AnySource],
    stored: Sequence[Unlisted],
    stack: str,
    embedding: str | None,
) -> list[MergedTensor]:
    """Return every tensor of a model with the layers of slices in one stack.

    Args:
        lead: the model whose tensors outside of the stack name those of the result.
        layers: those of the result.
        sources: the models, with one vocabulary.
        stored: the models as they are stored, in the same order.
        stack: of the layers.
        embedding: named by the user, where its own name says nothing.
    """
    # as in `planner`: what is before the layers as in the first slice, all else as in the last
    tensors = [
        _merged_tensor(
            name,
            lead,
            layers[0 if name == embedding or tensor_names.is_input(name) else -1],
            sources,
        )
        for name in lead.names
        if tensor_names.find_place(name, [stack]) is None
    ]
    parts_of = [_parts_by_layer(source, stack) for source in stored]
    # layers are numbered anew, in the order of the slices
    number = 0
    for part in layers:
        for index in range(part.length):
            position = index / (part.length - 1) if part.length > 1 else 1.0
            for rest in _layer_parts(part, index, stored, parts_of):
                names = [f"{stack}.{entry.start + index}.{rest}" for entry in part.inputs]
                shape = sources[part.inputs[0].source].info(names[0]).shape
                name = f"{stack}.{number}.{rest}"
                tensors.append(MergedTensor(name, shape, number, part, names, position))
            number += 1
    return tensors


def _parts_by_layer(source: Unlisted, stack: str) -> dict[int, list[str]]:
    """Return the names in each layer of a stack, behind the number of the layer."""
    parts: dict[int, list[str]] = {}
    for name in source.names:
        place = tensor_names.find_place(name, [stack])
        if place is not None:
            parts.setdefault(place.layer, []).append(place.rest)
    return parts


def _layer_parts(
    part: LayerRange,
    index: int,
    stored: Sequence[Unlisted],
    parts_of: Sequence[Mapping[int, list[str]]],
) -> list[str]:
    """Return the names of the tensors in a layer, which all inputs must have."""
    # by layer: in a mixture of experts some layers may be dense, and have other tensors
    first, *partners = part.inputs
    parts = parts_of[first.source][first.start + index]
    for entry in partners:
        if different := sorted({*parts_of[entry.source][entry.start + index]} ^ {*parts}):
            raise UserError(
                f"layer {first.start + index} of {stored[first.source].label} and layer"
                f" {entry.start + index} of {stored[entry.source].label} have other tensors:"
                f" {different[0]} is in one of them"
            )
    return parts


class _Lead(NamedTuple):
    """The layer that a merged layer has its entries in a config from: of the base, or the first."""

    model: Unlisted
    layer: int


def _leads(layers: Sequence[LayerRange], stored: Sequence[Unlisted]) -> list[_Lead]:
    """Return the lead of each merged layer."""
    return [
        _Lead(stored[entry.source], entry.start + index)
        for part in layers
        for entry in [part.inputs[part.base or 0]]
        for index in range(part.length)
    ]


# ------------------------------------------------------------------------------------------ config


def _sliced_content(
    content: JsonRow, stack: str, lead: Unlisted, leads: Sequence[_Lead], notes: list[str]
) -> Json:
    """Return a config with the number of layers of slices, and its lists with an entry per layer.

    Args:
        content: the parsed `config.json` of `lead`.
        stack: the stack of layers.
        lead: the model whose config and other files the result has.
        leads: the layers that those of the result are from.
        notes: may get a note on keys that count layers and are left as they are.

    Raises:
        UserError: no key, or more than one, may be the number of layers; or a model lacks a list
            with an entry per layer that the config has.
    """
    count = lead.stacks[stack]
    if list(leads) == [(lead, layer) for layer in range(count)]:
        return dict(content)
    keys = _layer_keys(content, stack, count)
    # one model may count its layers under two names, as `n_layer` and `num_hidden_layers`
    is_only_stack = [*lead.stacks.values()].count(count) == 1
    sections = {key[:-1] for key in keys}
    # a guess would give a model that loads, with layers of random numbers
    if len(sections) != 1 or (len(keys) > 1 and not is_only_stack):
        listed = " and ".join(".".join(key) for key in keys) or "none"
        raise UserError(
            f"slices: {stack} would have other layers than before, and config.json has no one key"
            f" with their number, {count} (candidates: {listed})"
        )
    section = sections.pop()
    before = _section(content, section)
    counting = {key[-1] for key in keys}
    # Of Whisper and BART `num_hidden_layers` is that of the encoder. With as many layers in the
    # decoder no number says so.
    unclear = {
        name
        for name, value in before.items()
        if name in tensor_names.LAYER_KEYS
        and (value == count and name not in counting)
        and not any(_words((name,)) & words for words in _PARTS)
    }
    if is_only_stack:
        counting |= unclear
    per_layer = {
        name: [_layer_entry(entry, stack, section, name) for entry in leads]
        for name, value in before.items()
        if isinstance(value, list) and len(value) == count and "layer" in name
    }
    values = {**before, **per_layer, **dict.fromkeys(counting, len(leads))}
    # they name single layers, and which of these are where is not known
    unchanged = [
        name
        for name, value in before.items()
        if any(word in name for word in ("layer", "block", "first_k"))
        and name not in {*per_layer, *tensor_names.LAYER_KEYS} - (unclear - counting)
        # 0 and [] name no layer
        and ((type(value) is int and value > 0) or (isinstance(value, list) and value))
    ]
    if unchanged:
        notes.append(f"of config.json, {', '.join(unchanged)} are left as they were before slicing")
    return {**content, section[0]: values} if section else values


def _layer_entry(lead: _Lead, stack: str, section: tuple[str, ...], name: str) -> JsonValue:
    """Return the entry of a layer in a list of the config of its own model."""
    # the model may have more layers than that whose config the result has, and other kinds of them
    values = _section(lead.model.config.content, section).get(name)
    if not isinstance(values, list) or len(values) != lead.model.stacks[stack]:
        path = ".".join([*section, name])
        raise UserError(
            f"slices: config.json of {lead.model.label} has no {path} with an entry for each of its"
            f" {lead.model.stacks[stack]} layers, which the merged model needs"
        )
    return values[lead.layer]


def _layer_keys(content: JsonRow, stack: str, count: int) -> list[tuple[str, ...]]:
    """Return the keys of a config that may be the number of layers of a stack, as paths."""
    sections: list[tuple[str, ...]] = [()]
    sections += [(key,) for key, value in content.items() if isinstance(value, Mapping)]
    keys = [
        (*section, key)
        for section in sections
        for key, value in _section(content, section).items()
        if key in tensor_names.LAYER_KEYS and value == count
    ]
    stack_words = {*stack.replace("_", ".").split(".")}
    part = next((part for part in _PARTS if stack_words & part), None)
    # the key that names the part of the model, else the one that names none, else the text's:
    # `model.layers` of a vision-language model
    named = [key for key in keys if part and _words(key) & part]
    plain = [key for key in keys if not any(_words(key) & words for words in _PARTS)]
    return named or plain or [key for key in keys if not part and _words(key) & _TEXT]


def _section(content: JsonRow, section: tuple[str, ...]) -> JsonRow:
    return (content.get(section[0]) or {}) if section else content


def _words(key: Sequence[str]) -> set[str]:
    return {*"_".join(key).split("_")}


def _with_tokenizer(
    plan: Plan, recipe: Recipe, models: Models[AnySource], lead: Unlisted, content: Json
) -> Plan:
    """Return a plan with the tokenizer of the donor and the chat template of the recipe."""
    donor, notes = models.sources[models.donor], [*plan.notes]
    # of the aligned model, whose number of rows may differ from that of the file
    config = models.sources[models.base or 0].config
    if isinstance(config, UnlistedConfig) and config.vocabulary:
        rows = lead.info(config.vocabulary[0]).shape[0]
        before = content
        content = tensor_names.with_values(content, rows, config.vocab_size, ["vocab_size"])
        # a section may leave out what is the default of its class, and embeddings may be padded
        if config.vocab_size != rows and content == before:
            notes.append(
                f"{config.vocabulary[0]} has {config.vocab_size} rows in place of {rows}, and"
                f" {config.file} has no vocab_size of {rows} to change: set it where it belongs"
            )
    template = None
    # else the files of the tokenizer, which are copied, have their own
    if recipe.chat_template is not None:
        added = [entry["content"] for entry in models.added_tokens]
        template = chat_templates.choose(
            recipe.chat_template, models.sources, models.sources, donor, added, notes
        )
    return dataclasses.replace(
        plan,
        config=dataclasses.replace(lead.config, content=content),
        stochastic=recipe.rounding == "stochastic",
        tokenizer_from=donor.directory,
        chat_template=template,
        added_tokens=models.added_tokens,
        notes=tuple(dict.fromkeys(notes)),
    )
