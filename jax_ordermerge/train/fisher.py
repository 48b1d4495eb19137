"""The diagonal of the empirical Fisher information of every member: how much each parameter matters to what the member has learned."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import mesh as meshes
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.rng import stream
from jax_ordermerge.train.objective import Objective
from jax_ordermerge.tree import Tree


def diagonal(
    objective: Objective,
    population: Tree,
    examples: Examples,
    *,
    count: int,
    lengths: Sequence[int],
    mesh: Mesh,
    seed: int,
) -> Tree:
    """Return F = 1/n sum_i (d log p(y_i | x_i) / d theta)^2 over n examples, elementwise: float32[M, ...] as the population.

    One example a backward pass, since it is the gradients of single examples that are squared. All members see the same examples.

    Args:
        objective: the summed loss of a microbatch, see `objective.build`; log p is its negative.
        population: parameter dict with a leading axis `M`, float32.
        examples: to draw from, without replacement.
        count: n, at most all of them.
        lengths: padded lengths, ascending.
        mesh: where the parameters are.
        seed: of the drawing.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging" (arXiv 2111.09832), section 3.
    """
    n = min(count, len(examples))
    rows = jax.device_get(
        jax.random.permutation(stream(seed, "fisher", "examples"), len(examples))[:n]
    )
    total = jax.tree.map(jnp.zeros_like, population)
    program = _program(objective, mesh)
    for row in rows:
        size = int(examples.lengths[row])
        length = next(one for one in lengths if one >= size)
        batch = pack.collate(examples, np.array([row]), length)
        total = program(population, total, batch)
    return jax.tree.map(lambda x: x / n, total)


def _program(objective: Objective, mesh: Mesh) -> Any:
    def add(one: tuple[Tree, Tree], batch: Any) -> Tree:
        params, total = one
        gradient = jax.grad(lambda p: objective(p, batch)[0])(params)
        return jax.tree.map(lambda f, g: f + g * g, total, gradient)

    members = meshes.map_members(add, mesh)

    @functools.partial(jax.jit, donate_argnums=1)
    def program(population: Tree, total: Tree, batch: Any) -> Tree:
        return members((population, total), batch)

    return program
