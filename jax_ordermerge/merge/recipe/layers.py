"""Which layers of which models a recipe merges."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.recipe.evaluator import Input, LayerRange
from jax_ordermerge.merge.recipe.schema import Recipe, Reference
from jax_ordermerge.merge.recipe.settings import Settings
from jax_ordermerge.merge.sources.storage import Source


class Inputs(NamedTuple):
    """The models of a recipe, opened or not.

    Attributes:
        indices: name in the recipe -> index.
        base: index of the base.
        labels: what the user called each model.
        num_layers: of each model; None where that is not known yet.
    """

    indices: Mapping[Reference, int]
    base: int | None
    labels: Sequence[str]
    num_layers: Sequence[int | None]


def layer_ranges(recipe: Recipe, models: Inputs) -> list[LayerRange]:
    """Return the layers of the merged model, and those that they are merged from.

    Where numbers of layers are not known, what depends on them is not checked.

    Raises:
        UserError: a slice has layers that a model has not, or lacks its base; or models differ in
            their number of layers, or one is given twice.
    """
    module = recipe.module
    outer = (module.parameters, recipe.parameters)
    if module.models is not None:
        inputs = [
            Input(models.indices[entry.model], 0, entry.parameters) for entry in module.models
        ]
        if models.base is not None and models.base not in {entry.source for entry in inputs}:
            # an unlisted base has no parameters of its own; see `Rule.base` for what it is
            inputs.append(Input(models.base, 0, {}, listed=False))
        lengths = [models.num_layers[entry.source] for entry in inputs]
        return [_layer_range(inputs, models.base, lengths, outer, models)]
    layers = []
    for number, part in enumerate(module.slices or ()):
        inputs, lengths = [], []
        for entry in part.sources:
            start, end = entry.layer_range
            source = models.indices[entry.model]
            count = models.num_layers[source]
            if start >= end or (count is not None and end > count):
                reason = f"which has {count} layers"
                if start >= end:
                    reason = "expected a first number below the second"
                raise UserError(
                    f"slices[{number}]: layer_range [{start}, {end}] of {entry.model}, {reason}"
                )
            inputs.append(Input(source, start, entry.parameters))
            lengths.append(end - start)
        base_model = recipe.base_model if part.base_model is None else part.base_model
        # without a layer_range of its own nobody knows which layers of the base belong to the slice
        used = {models.indices[entry.model] for entry in part.sources}
        if base_model is not None and models.indices.get(base_model) not in used:
            raise UserError(
                f"slices[{number}] lacks its base_model {base_model} among the sources; "
                "add it with its layer_range"
            )
        base = None if base_model is None else models.indices[base_model]
        layers.append(_layer_range(inputs, base, lengths, (part.parameters, *outer), models))
    return layers


def numbered_layers(
    field: Literal["full_attention_layers", "no_rope_layers"],
    layers: Sequence[LayerRange],
    sources: Sequence[Source],
) -> tuple[int, ...]:
    """Return a field of the merged model that lists layers: those made of such layers."""
    # of the base of a slice, or of its first model
    leads = (
        (sources[entry.source].config, entry.start + index)
        for part in layers
        for entry in [part.inputs[part.base or 0]]
        for index in range(part.length)
    )
    return tuple(
        layer for layer, (config, number) in enumerate(leads) if number in getattr(config, field)
    )


def _layer_range(
    inputs: Sequence[Input],
    base: int | None,
    lengths: Sequence[int | None],
    scopes: tuple[Settings, ...],
    models: Inputs,
) -> LayerRange:
    sources = [entry.source for entry in inputs]
    labels = [models.labels[source] for source in sources]
    for i, (source, label, length) in enumerate(zip(sources, labels, lengths, strict=True)):
        # By index and not by name: other spellings of a model have its index already.
        if source in sources[:i]:
            raise UserError(
                f"model {label} is given twice; give each once, with the sum of the weights"
            )
        if None not in lengths and length != lengths[0]:
            raise UserError(
                f"{label} gives {length} layers and {labels[0]} {lengths[0]};"
                " layers are merged one with one"
            )
    # 0 layers where they are not known yet: names and parameters are checked without them
    return LayerRange(
        tuple(inputs), None if base is None else sources.index(base), lengths[0] or 0, scopes
    )
