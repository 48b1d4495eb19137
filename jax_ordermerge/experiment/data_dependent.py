"""Merges by methods that need data beside the models: Fisher information, or validation losses."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jax_ordermerge.data import pack
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import waves
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.merge import population
from jax_ordermerge.merge.methods import table
from jax_ordermerge.registry import Registry
from jax_ordermerge.search.candidates import Population
from jax_ordermerge.train import fisher, objective
from jax_ordermerge.tree import Tree, member

Loss = Callable[[Tree], float]
Result = tuple[Tree, Json]  # the merge, and its parameters for the record
Supplier = Callable[[RunContext, Json, Tree, Tree | None, Loss], Result]

SUPPLIERS = Registry[Supplier]("kind of data that merge methods need")


def merge_with_data(ctx: RunContext, settings: Json, ingredients: Population, loss: Loss) -> Result:
    """Merge the population, with the data that the method needs.

    Args:
        ctx: the run.
        settings: method, seed, weights and parameters of the merge.
        ingredients: the population, in the dtype that is merged.
        loss: of a model on the validation examples.

    Returns:
        The merge, and the parameters for the record: those given, and what the data decided.
    """
    method = table.METHODS[settings["method"]]
    if method.needs is None:
        return ingredients.merge(**settings), settings["parameters"]
    checked = table.check_parameters(settings["method"], settings["parameters"])
    used_base = ingredients.base if method.needs_base(checked) else None
    return SUPPLIERS[method.needs](ctx, settings, ingredients.members, used_base, loss)


def _merge(ctx: RunContext, settings: Json, members: Tree, base: Tree | None) -> Tree:
    return population.merge(members, base, ctx.model, dtype=ctx.export_dtype, **settings)


def _merge_with_fisher(
    ctx: RunContext, settings: Json, members: Tree, base: Tree | None, loss: Loss
) -> Result:
    """Merge the members, in float32, followed by the diagonals of their Fisher matrices."""
    # not the members in the dtype that is merged: the information belongs to unrounded parameters
    members = waves.restore(ctx)
    train = ctx.splits["train"]
    diagonals = fisher.diagonal(
        objective.build(ctx.training, ctx.model),
        members,
        train,
        count=ctx.config.merge.fisher_examples,
        lengths=pack.bucket_lengths(train.longest, ctx.config.data.buckets),
        mesh=ctx.mesh,
        seed=ctx.config.seed,
    )
    both = jax.jit(lambda a, b: jax.tree.map(lambda x, y: jax.numpy.concatenate([x, y]), a, b))(
        members, diagonals
    )
    weights = settings["weights"]
    if weights is not None:  # of which only those of the members count
        weights = [*weights, *([0.0] * ctx.config.population.members)]
    merged = _merge(ctx, settings | {"weights": weights}, both, base)
    return merged, settings["parameters"]


def _merge_chosen(
    ctx: RunContext, settings: Json, members: Tree, base: Tree | None, loss: Loss
) -> Result:
    """Merge the members that the method chooses by validation losses."""
    choose = table.METHODS[settings["method"]].choose
    assert choose is not None, "a method that needs validation data has a function `choose`"

    def merge(chosen: Sequence[int]) -> Tree:
        numbers = np.array(chosen)
        subset = jax.jit(lambda p: jax.tree.map(lambda x: x[numbers], p))(members)
        weights = settings["weights"]
        if weights is not None:
            weights = [weights[number] for number in chosen]
        return _merge(ctx, settings | {"weights": weights}, subset, base)

    # one model at a time: members and candidates need not fit into memory beside each other
    losses = [loss(member(members, m)) for m in range(ctx.config.population.members)]
    for m, value in enumerate(losses):
        # NaN is below nothing: the choice would depend on where the member stands in the list
        if not math.isfinite(value):
            raise UserError(
                f"member {m}: its validation loss is {value}; a member whose weights are not finite"
                " cannot be chosen: train it again with a lower learning rate"
            )
    choice = choose(losses, lambda chosen: loss(merge(chosen)))
    return merge(choice.members), {
        **settings["parameters"],
        "members": list(choice.members),
        "validation_losses": losses,
        "after_each": choice.losses,
    }


SUPPLIERS.register("fisher", _merge_with_fisher)
SUPPLIERS.register("validation", _merge_chosen)
