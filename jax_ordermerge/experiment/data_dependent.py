"""Merges that look at data: the greedy soup on validation examples, and the average by Fisher information of training samples."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_ordermerge.data import pack
from jax_ordermerge.experiment import waves
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.merge import population
from jax_ordermerge.merge.methods import greedy_soup
from jax_ordermerge.train import fisher as information
from jax_ordermerge.train import objective
from jax_ordermerge.tree import Tree, member


def merge_greedily(
    ctx: RunContext, members: Tree, loss: Callable[[Tree], float]
) -> tuple[Tree, dict[str, Any]]:
    """Return the soup, and which members are in it with the validation losses that decided.

    Args:
        ctx: of the run.
        members: the population, in the dtype that is merged.
        loss: of a model on the validation examples.
    """

    def average(chosen: tuple[int, ...]) -> Tree:
        some = jax.jit(lambda p: jax.tree.map(lambda x: x[np.array(chosen)], p))(members)
        return population.merge(
            some, None, ctx.model, method="average", seed=0, dtype=ctx.config.merge.dtype
        )

    alone = [loss(member(members, m)) for m in range(ctx.config.population.members)]
    chosen, seen = greedy_soup.greedy(alone, lambda some: loss(average(some)))
    return average(chosen), {
        "members": list(chosen),
        "validation_losses": alone,
        "after_each": seen,
    }


def fisher(ctx: RunContext, settings: dict[str, Any]) -> Tree:
    """Return the merge by method fisher, of the members in float32 and the diagonals of their Fisher matrices.

    Args:
        ctx: of the run.
        settings: method, seed, weights and parameters of the merge.
    """
    members = waves.restore(ctx.training, ctx.model, ctx.mesh, ctx.layout)
    train = ctx.splits["train"]
    diagonals = information.diagonal(
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
    given = settings["weights"]
    weights = None if given is None else [*given, *([0.0] * ctx.config.population.members)]
    return population.merge(
        both, None, ctx.model, dtype=ctx.config.merge.dtype, **(settings | {"weights": weights})
    )
