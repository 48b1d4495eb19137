"""The loss of every member on validation examples, and its weights where this loss was lowest.

Training sees nothing of it: no order, no random choice and no update depends on it.

Axis letters: `M` member, `A` microbatch, `B` example of a microbatch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_ordermerge import mesh as meshes
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.order import PADDING
from jax_ordermerge.train import batches
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.compiler_options import EXACT
from jax_ordermerge.train.objective import ExampleSums, Objective
from jax_ordermerge.tree import Tree

# Where a checkpoint `{"best": Best, ...}` holds the weights of the lowest loss.
BRANCH = "best/weights"


class Best(NamedTuple):
    """The best weights so far. In a population every leaf has a leading `M`.

    Attributes:
        weights: float32; `{}` where only the losses are asked for.
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
        weights: weights of the population, abstract, with shardings; `{}` to store none.
        members: M.
        mesh: the mesh.
    """

    def per_member(dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((members,), dtype, sharding=NamedSharding(mesh, P("order")))

    return Best(weights, per_member(jnp.float32), per_member(jnp.int32))


def initial(abstract: Best) -> Best:
    """Return a `Best` that any finite loss is better than.

    Example:
        >>> from jax_ordermerge.train import validation
        >>> initial(validation.abstract({}, 2, meshes.make_mesh())).loss.tolist()
        [inf, inf]
    """

    def build() -> Best:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        return zeros._replace(loss=jnp.full(abstract.loss.shape, jnp.inf, abstract.loss.dtype))

    return jax.jit(build, out_shardings=steps.shardings(abstract))()


def device_batches(
    examples: Examples, microbatch: int, lengths: tuple[int, ...], mesh: Mesh
) -> dict[str, jax.Array]:
    """Return all examples as the microbatches of one large step, [A, B, ...].

    They are the same for every member; see `pack.step_batch`.
    """
    # padded to full microbatches; padding has weight 0 in every sum
    rows = np.full(-(-len(examples) // microbatch) * microbatch, PADDING)
    rows[: len(examples)] = np.arange(len(examples))

    def put(name: str, array: np.ndarray) -> jax.Array:
        sharding = batches.batch_sharding(name, array.shape, (None, "batch"), mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    batch = pack.step_batch(examples, rows, microbatch=microbatch, lengths=lengths)
    if len(examples.rows_by_source) > 1:
        # padding counts as the first source, where its sums are 0
        batch["source"] = np.zeros_like(batch["ids"])
        for number, of_source in enumerate(examples.rows_by_source.values()):
            batch["source"][np.isin(batch["ids"], examples.ids[of_source])] = number
    return {name: put(name, array) for name, array in batch.items()}


def compile_measure(
    objective: Objective,
    mesh: Mesh,
    best: Best,
    weights: Tree,
    batch: Mapping[str, jax.Array],
    frozen: Tree,
    lengths: tuple[int, ...],
    *,
    sources: int = 1,
) -> Measure:
    """Compile `(best, weights, step, frozen) -> (best, losses)` over a population.

    `losses` is float32[M, 1]: the loss on all examples. With S > 1 sources it is [M, 1 + S]: the
    loss on the examples of each source follows.

    Args:
        objective: whose loss is measured, over what it counts in all examples together.
        mesh: the mesh.
        best: from `abstract`; it is donated.
        weights: what is measured: weights of the population, abstract.
        batch: from `device_batches`.
        frozen: abstract, see `step.compile_step`.
        lengths: padded lengths that the batch was made with.
        sources: S, number of the sources of the examples.
    """

    def measure(
        best: Best, weights: Tree, shared: tuple[steps.Batch, jax.Array, Tree]
    ) -> tuple[Best, jax.Array]:
        batch, step, frozen = shared

        def sums(length: int, microbatch: steps.Batch) -> jax.Array:
            _, examples = objective(weights, steps.shorten(microbatch, length), frozen)
            total = jnp.stack([examples.losses.sum(), examples.weights.sum()])
            if sources == 1:
                return total
            return jnp.stack([total, *_source_sums(examples, microbatch["source"], sources)])

        by_length = [functools.partial(sums, length) for length in lengths]

        def microbatch_sums(microbatch: steps.Batch) -> jax.Array:
            return steps.switch(microbatch["bucket"], by_length, microbatch)

        # One microbatch after another: the activations of one are the memory that training has too.
        # Sums of all examples are divided once, as in training.
        total = jax.lax.map(microbatch_sums, batch).sum(0)
        losses = total[..., 0] / jnp.maximum(total[..., 1], 1.0)
        loss = losses if sources == 1 else losses[0]
        # Strictly lower, so of equal losses the first step counts; a loss that is NaN never does.
        lower = loss < best.loss

        # `where` and not `cond`: a select is one pass over the weights
        def keep_lower(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(lower, new, old)

        lowest = jax.tree.map(keep_lower, weights, best.weights) if best.weights else {}
        new_best = Best(lowest, keep_lower(loss, best.loss), keep_lower(step, best.step))
        return new_best, jnp.atleast_1d(losses)

    # Batch and frozen base are arguments: closed over, they would be constants of the program.
    # Members are handled as in the training step, with the same compiler options, so that a member
    # has the same validation loss alone and in the population.
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    shared = (batch, step, frozen)
    population = jax.jit(
        meshes.update_members(measure, mesh),
        in_shardings=(steps.shardings(best), steps.shardings(weights), steps.shardings(shared)),
        out_shardings=(steps.shardings(best), NamedSharding(mesh, P("order"))),
        donate_argnums=0,
    )
    compiled = population.lower(best, weights, shared).compile(EXACT)

    def call(best: Best, weights: Tree, done: int, frozen: Tree) -> tuple[Best, jax.Array]:
        return compiled(
            best, weights, (batch, jax.device_put(np.int32(done), step.sharding), frozen)
        )

    return call


def _source_sums(examples: ExampleSums, source_B: jax.Array, sources: int) -> jax.Array:
    """Return the sums of losses and weights over the examples of each source, [S, 2]."""
    pairs = jnp.stack([examples.losses, examples.weights], 1)
    # a sum of products and not a matrix product, which TPUs round to bfloat16
    return (jax.nn.one_hot(source_B, sources)[..., None] * pairs[:, None]).sum(0)
