"""One optimizer step of one member, and how a function of one member becomes a program over a population.

Axis letters: `M` member, `A` accumulation step (microbatch), `B` example of a microbatch, `T` position.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import mesh as meshes
from jax_ordermerge import tree
from jax_ordermerge.data.pack import SEQUENCES
from jax_ordermerge.train.objective import ExampleSums, Objective
from jax_ordermerge.tree import Tree

Batch = dict[str, jax.Array]
Step = Callable[["TrainState", Batch, Tree], tuple["TrainState", "Metrics"]]
# else XLA may keep float32 where the program says bfloat16, and where it does depends on the mesh: a member would no longer be
# the same alone and among others
EXACT: dict[str, str | bool] = {"xla_allow_excess_precision": False}


class TrainState(NamedTuple):
    """Everything that changes in training. In a population every leaf has a leading `M`.

    Attributes:
        params: float32 masters of what is trained.
        opt_state: of the optax optimizer.
        step: int32 scalar, steps done.
    """

    params: Tree
    opt_state: Any
    step: Any


class Metrics(NamedTuple):
    """What a step reports.

    Attributes:
        loss: float32 scalar, mean over the response tokens (or the pairs) of the batch, before the update.
        grad_norm: float32 scalar, before clipping.
        learning_rate: float32 scalar, of this update.
        ids: int32[A, B], or packed [A, B, S], the examples trained on as the batch names them.
        examples: sums of each example, float32 of the same shape.
    """

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    ids: jax.Array
    examples: ExampleSums


def train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    lengths: Sequence[int],
    specs: Tree | None = None,
) -> Step:
    """Return the step of one member.

    The gradient is that of the mean over what the objective counts in the whole batch (response tokens, or pairs), whatever the
    microbatches: sums are accumulated in float32 and divided once.

    Args:
        objective: see `objective.py`.
        tx: the optimizer.
        rate: its learning rate by step, reported only.
        lengths: padded lengths a microbatch may have; `batch["bucket"]`, int32[A], says which.
        specs: a PartitionSpec for every parameter, which accumulated gradients keep; None leaves them to the compiler.

    Returns:
        `(state, batch, frozen) -> (state, metrics)`; the batch holds `SEQUENCES` as [A, B, ..., T] with T the longest length, `ids`,
        `bucket` and whatever else the objective reads; `frozen` is what the objective reads but does not train, `{}` if nothing.
    """

    def gradients(params: Tree, microbatch: Batch, frozen: Tree) -> tuple[Tree, ExampleSums]:
        def of_length(length: int) -> Callable[[Tree, Batch, Tree], tuple[Tree, ExampleSums]]:
            def branch(params: Tree, microbatch: Batch, frozen: Tree) -> tuple[Tree, ExampleSums]:
                short = microbatch | {name: microbatch[name][..., :length] for name in SEQUENCES}
                return _kept(jax.grad(objective, has_aux=True)(params, short, frozen), specs)

            return branch

        return switch(
            microbatch["bucket"],
            [of_length(length) for length in lengths],
            params,
            microbatch,
            frozen,
        )

    def step(state: TrainState, batch: Batch, frozen: Tree) -> tuple[TrainState, Metrics]:
        summed, examples = _accumulate(
            lambda microbatch: gradients(state.params, microbatch, frozen), batch, state.params
        )
        weight = jnp.maximum(examples.weights.sum(), 1.0)
        mean = jax.tree.map(lambda g: g / weight, summed)
        updates, opt_state = tx.update(mean, state.opt_state, state.params)
        loss, rate_now = examples.losses.sum() / weight, jnp.asarray(rate(state.step), jnp.float32)
        metrics = Metrics(loss, optax.tree.norm(mean), rate_now, batch["ids"], examples)
        return TrainState(
            optax.apply_updates(state.params, updates), opt_state, state.step + 1
        ), metrics

    return step


def switch(bucket: jax.Array, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """Return what the branch of a bucket makes of the operands; where there is one branch only, no choice is compiled."""
    return (
        branches[0](*operands)
        if len(branches) == 1
        else jax.lax.switch(bucket, branches, *operands)
    )


def _kept(found: tuple[Tree, ExampleSums], specs: Tree | None) -> tuple[Tree, ExampleSums]:
    grads, sums = found
    return (
        grads if specs is None else jax.tree.map(jax.lax.with_sharding_constraint, grads, specs)
    ), sums


def _accumulate(
    gradients: Callable[[Batch], tuple[Tree, ExampleSums]], batch: Batch, params: Tree
) -> tuple[Tree, ExampleSums]:
    """Sum gradients over the microbatches; return them with the sums of each example, [A, B]."""
    if batch["tokens"].shape[0] == 1:
        grads, sums = gradients(jax.tree.map(lambda x: x[0], batch))
        return grads, jax.tree.map(lambda x: x[None], sums)

    def body(total: Tree, microbatch: Batch) -> tuple[Tree, ExampleSums]:
        grads, sums = gradients(microbatch)
        return jax.tree.map(jnp.add, total, grads), sums

    return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), batch)


# ---------------------------------------------------------------------------------------------------------------------- populations


def abstract_state(
    params: Tree, tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Return the state of a population as `jax.ShapeDtypeStruct`s, the optimizer's state sharded like its parameters.

    What has other axes than its parameter, as Adafactor's means over rows and columns, keeps the sharding of those that are left:
    jax itself says so, when the optimizer's `init` is traced with shardings as part of the types.

    Args:
        params: of the population, abstract, with shardings (`convert.abstract_params(..., members=M)`).
        tx: the optimizer.
        mesh: where counters live; one that is not on the mesh would compile the step twice.
    """
    typed = AbstractMesh(
        tuple(mesh.shape.values()),
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(typed, x.sharding.spec)
        ),
        params,
    )
    with jax.sharding.use_abstract_mesh(typed):
        opt_state = jax.eval_shape(jax.vmap(tx.init), like)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        inner = () if leaf.sharding is None else tuple(leaf.sharding.spec)[1:]
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P("order", *inner))
        )

    counter = jax.ShapeDtypeStruct((tree.size(params),), jnp.int32)
    return TrainState(params, jax.tree.map(placed, opt_state), placed(counter))


def initial_state(
    start: Tree, tx: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Return a population whose members all start alike.

    Args:
        start: parameters of one member, float32.
        tx: the optimizer.
        abstract: from `abstract_state`.
    """
    members = abstract.step.shape[0]

    def build(start: Tree) -> TrainState:
        params = jax.tree.map(lambda x: jnp.broadcast_to(x, (members, *x.shape)), start)
        return TrainState(params, jax.vmap(tx.init)(params), jnp.zeros(members, jnp.int32))

    return jax.jit(build, out_shardings=shardings(abstract))(start)


def compile_step(step: Step, mesh: Mesh, state: TrainState, batch: Any, frozen: Tree) -> Step:
    """Compile a step of one member over the population, once and for all: another shape or sharding is an error, not a new program.

    Args:
        step: from `train_step`.
        mesh: the mesh.
        state: from `abstract_state`; it is donated.
        batch: abstract, with a leading `M` and shardings.
        frozen: abstract, with shardings and without `M`: one copy for all members.
    """
    population = jax.jit(
        meshes.update_members(step, mesh),
        in_shardings=(shardings(state), shardings(batch), shardings(frozen)),
        out_shardings=(shardings(state), NamedSharding(mesh, P("order"))),
        donate_argnums=0,
    )
    return population.lower(state, batch, frozen).compile(EXACT)


def place(arrays: Tree, abstract: Tree) -> Tree:
    """Return arrays in the dtypes and shardings of others, as what is frozen is held."""
    cast = jax.jit(
        lambda x: jax.tree.map(lambda a, like: a.astype(like.dtype), x, abstract),
        out_shardings=shardings(abstract),
    )
    return cast(arrays)


def shardings(abstract: Any) -> Any:
    """Return the sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
