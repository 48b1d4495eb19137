"""The diagonal of the empirical Fisher information of every member.

It says how much each parameter matters to what the member has learned.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import mesh as meshes
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.rng import stream
from jax_ordermerge.train.objective import Microbatch, Objective
from jax_ordermerge.tree import PyTree, Tree


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
    """Return F = 1/n sum_i (d log p(y_i | x_i) / d theta)^2 over n examples, elementwise.

    All members see the same examples.

    Args:
        objective: summed loss of a microbatch, see `objective.build`; log p is its negative.
        population: parameter dict with a leading axis `M`, float32.
        examples: to draw from, without replacement.
        count: n, at most all of them.
        lengths: padded lengths, ascending.
        mesh: where the parameters are.
        seed: seed of the drawing.

    Returns:
        float32[M, ...], shaped as the population.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging" (arXiv 2111.09832),
    section 3.
    """
    n = min(count, len(examples))
    # the same examples for all members: a difference of Fisher values is one of the members
    rows = jax.device_get(
        jax.random.permutation(stream(seed, "fisher", "examples"), len(examples))[:n]
    )
    # A sum that is updated in place, and not a mean over a batch of gradients: a gradient per
    # example is as large as the model.
    total = jax.tree.map(jnp.zeros_like, population)
    add_squares = _compile_add_squares(objective, mesh)
    for row in rows:
        # One example per backward pass: the gradients of single examples are squared, and no sum of
        # gradients gives them back. Padded to few lengths, so that few programs are compiled.
        length = next(length for length in lengths if length >= examples.lengths[row])
        batch = pack.collate(examples, np.array([row]), length)
        total = add_squares(population, total, batch)
    return jax.tree.map(lambda x: x / n, total)


def _compile_add_squares(objective: Objective, mesh: Mesh) -> Callable[[Tree, Tree, PyTree], Tree]:
    def add(member: tuple[Tree, Tree], batch: Microbatch) -> Tree:
        params, total = member
        gradient = jax.grad(lambda p: objective(p, batch)[0])(params)
        return jax.tree.map(lambda f, g: f + g * g, total, gradient)

    add_members = meshes.map_members(add, mesh)

    @functools.partial(jax.jit, donate_argnums=1)
    def add_squares(population: Tree, total: Tree, batch: Microbatch) -> Tree:
        return add_members((population, total), batch)

    return add_squares
