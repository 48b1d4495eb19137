"""The loss of every member on examples that it is not trained on, and the weights that it had where this loss was lowest.

Nothing here is seen by training: no order, no random choice and no update depends on it.

Axis letters: `M` member, `A` microbatch, `B` example of a microbatch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import mesh as meshes
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.order import PADDING
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.objective import Objective
from jax_ordermerge.tree import Tree

# Where a checkpoint `{"best": Best, ...}` holds the weights of the lowest loss.
BRANCH = "best/weights"


class Best(NamedTuple):
    """What was best so far. In a population every leaf has a leading `M`.

    Attributes:
        weights: float32, `{}` where only the losses are asked for.
        loss: float32 scalar, the lowest so far; infinite before the first.
        step: int32 scalar, steps done when it was measured.
    """

    weights: Tree
    loss: Any
    step: Any


Measure = Callable[[Best, Tree, int, Tree], tuple[Best, jax.Array]]


def abstract(weights: Tree, members: int, mesh: Mesh) -> Best:
    """Return the `Best` of a population as `jax.ShapeDtypeStruct`s.

    Args:
        weights: of the population, abstract, with shardings; `{}` to keep none.
        members: M.
        mesh: the mesh.
    """

    def each(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((members,), dtype, sharding=NamedSharding(mesh, P("order")))

    return Best(weights, each(jnp.float32), each(jnp.int32))


def initial(like: Best) -> Best:
    """Return a `Best` that any finite loss is better than.

    Example:
        >>> initial(abstract({}, 2, meshes.make_mesh())).loss.tolist()
        [inf, inf]
    """

    def build() -> Best:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return zeros._replace(loss=jnp.full(like.loss.shape, jnp.inf, like.loss.dtype))

    return jax.jit(build, out_shardings=steps.shardings(like))()


def device_batches(
    examples: Examples, microbatch: int, lengths: tuple[int, ...], mesh: Mesh
) -> dict[str, jax.Array]:
    """Return all examples as the microbatches of one large step, [A, B, ...], the same for every member; see `pack.step_batch`."""
    rows = np.full(-(-len(examples) // microbatch) * microbatch, PADDING)
    rows[: len(examples)] = np.arange(len(examples))

    def put(name: str, array: np.ndarray) -> jax.Array:
        axes = (None, "batch", *[None] * array.ndim)[: array.ndim]
        place = meshes.sharding(
            (*axes[:-1], "length") if name in pack.SEQUENCES else axes, array.shape, mesh
        )
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    batch = pack.step_batch(examples, rows, microbatch=microbatch, lengths=lengths)
    return {name: put(name, array) for name, array in batch.items()}


def compile_measure(
    objective: Objective,
    mesh: Mesh,
    best: Best,
    weights: Tree,
    batch: dict[str, jax.Array],
    frozen: Tree,
    lengths: tuple[int, ...],
) -> Measure:
    """Compile `(best, weights, step, frozen) -> (best, loss)` over a population; nothing crosses members, as in the training step.

    Args:
        objective: whose loss is measured, over what it counts in all examples together.
        mesh: the mesh.
        best: from `abstract`; it is donated.
        weights: of the population, abstract: what is measured.
        batch: from `device_batches`.
        frozen: abstract, see `steps.compile_step`.
        lengths: padded lengths that the batch was made with.
    """

    def measure(best: Best, weights: Tree, shared: tuple[Any, Any, Tree]) -> tuple[Best, jax.Array]:
        batch, step, frozen = shared

        def sums(microbatch: Any) -> jax.Array:
            def of_length(length: int) -> Callable[[Any], jax.Array]:
                def branch(microbatch: Any) -> jax.Array:
                    short = microbatch | {
                        name: microbatch[name][..., :length] for name in pack.SEQUENCES
                    }
                    _, found = objective(weights, short, frozen)
                    return jnp.stack([found.losses.sum(), found.weights.sum()])

                return branch

            return steps.switch(
                microbatch["bucket"], [of_length(length) for length in lengths], microbatch
            )

        total = jax.lax.map(sums, batch).sum(0)
        loss = total[0] / jnp.maximum(total[1], 1.0)
        lower = loss < best.loss
        if best.weights:  # else they are not kept
            best = best._replace(
                weights=jax.tree.map(
                    lambda new, old: jnp.where(lower, new, old), weights, best.weights
                )
            )
        return best._replace(
            loss=jnp.where(lower, loss, best.loss), step=jnp.where(lower, step, best.step)
        ), loss

    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    shared = (batch, step, frozen)
    population = jax.jit(
        meshes.update_members(measure, mesh),
        in_shardings=(steps.shardings(best), steps.shardings(weights), steps.shardings(shared)),
        out_shardings=(steps.shardings(best), NamedSharding(mesh, P("order"))),
        donate_argnums=0,
    )
    compiled = population.lower(best, weights, shared).compile(steps.EXACT)
    return lambda best, weights, done, frozen: compiled(
        best, weights, (batch, jax.device_put(np.int32(done), step.sharding), frozen)
    )
