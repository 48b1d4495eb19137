"""One optimizer step of one member, and how it becomes one program over a population.

Axis letters: `M` member, `A` accumulation step (microbatch), `B` example of a microbatch,
`T` position.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import fusion, tree
from jax_ordermerge import mesh as meshes
from jax_ordermerge.data.pack import SEQUENCES
from jax_ordermerge.train.compiler_options import EXACT, Options
from jax_ordermerge.train.objective import ExampleSums, Objective
from jax_ordermerge.train.optimizer import DistinctShapes
from jax_ordermerge.tree import PyTree, Tree

T = TypeVar("T")
Batch = dict[str, jax.Array]
OptimizerMemory = Literal["device", "host"]
Step = Callable[["TrainState", Batch, Tree], tuple["TrainState", "Metrics"]]


class TrainState(NamedTuple):
    """Everything that changes in training. In a population every leaf has a leading `M`.

    Attributes:
        params: float32 masters of what is trained.
        opt_state: state of the optax optimizer.
        step: int32 scalar, steps done.
    """

    params: Tree
    opt_state: PyTree
    step: Any  # or its shape


class Metrics(NamedTuple):
    """What a step reports.

    Attributes:
        loss: float32 scalar, mean over the response tokens (or the pairs) of the batch, before the
            update.
        grad_norm: float32 scalar, before clipping.
        learning_rate: float32 scalar, of this update.
        ids: int32[A, B], or packed [A, B, S], the examples trained on as the batch names them.
        examples: sums per example, float32 of the same shape.
    """

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    ids: jax.Array
    examples: ExampleSums


# ---------------------------------------------------------------------------------- one member


class _Member:
    """The parts of a step of one member: gradients of a microbatch, and the update."""

    def __init__(
        self,
        objective: Objective,
        tx: optax.GradientTransformation,
        rate: optax.Schedule,
        specs: Tree | None,
        shapes: DistinctShapes | None,
        optimizer_memory: OptimizerMemory = "device",
    ) -> None:
        self.on_host = optimizer_memory == "host"
        self.objective, self.tx, self.rate, self.specs = objective, tx, rate, specs
        self.shapes = shapes or DistinctShapes()

    def gradients(
        self, length: int, params: Tree, microbatch: Batch, frozen: Tree
    ) -> tuple[Tree, ExampleSums]:
        short = shorten(microbatch, length)
        grads, sums = jax.grad(self.objective, has_aux=True)(params, short, frozen)
        # Gradients are as large as the parameters. Without the constraint XLA may choose to hold
        # the sum that the scan carries undivided on every device.
        if self.specs is not None:
            grads = jax.tree.map(jax.lax.with_sharding_constraint, grads, self.specs)
        return grads, sums

    def update(
        self, state: TrainState, summed: Tree, examples: ExampleSums, ids: jax.Array
    ) -> tuple[TrainState, Metrics]:
        # Sum first and divide once: microbatches have different numbers of response tokens, and a
        # mean of their means would weigh the tokens of a short one more.
        weight = jnp.maximum(examples.weights.sum(), 1.0)  # 1 where all of the batch is padding
        shapes = self.shapes
        mean = jax.tree.map(lambda g: g / weight, shapes.widen(summed))
        old = shapes.widen(state.params)
        opt_state = state.opt_state
        if self.on_host:
            opt_state = _move(opt_state, to_host=False)
        updates, opt_state = self.tx.update(mean, shapes.widen(opt_state), old)
        loss = examples.losses.sum() / weight
        learning_rate = jnp.asarray(self.rate(state.step), jnp.float32)
        norm = optax.tree.norm(mean)
        metrics = Metrics(loss, norm, learning_rate, ids, examples)
        params, opt_state = shapes.narrow((optax.apply_updates(old, updates), opt_state))
        if self.on_host:
            opt_state = _move(opt_state, to_host=True)
        return TrainState(params, opt_state, state.step + 1), metrics


def train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    lengths: Sequence[int],
    specs: Tree | None = None,
    shapes: DistinctShapes | None = None,
    optimizer_memory: OptimizerMemory = "device",
) -> Step:
    """Return the step of one member.

    The gradient is that of the mean over what the objective counts in the whole batch (response
    tokens, or pairs), however it is cut into microbatches.

    Args:
        objective: see `objective.py`.
        tx: the optimizer.
        rate: its learning rate by step, for the metrics only.
        lengths: padded lengths of a microbatch; `batch["bucket"]`, int32[A], is an index of them.
        specs: a PartitionSpec for every parameter, which accumulated gradients keep; None leaves
            them to the compiler.
        shapes: in which parameters are updated, from `optimizer.distinct_shapes`; None is as they
            are.
        optimizer_memory: where the state of the optimizer is given and returned.

    Returns:
        `(state, batch, frozen) -> (state, metrics)`. The batch holds `SEQUENCES` as [A, B, ..., T]
        with T the longest length, `ids`, `bucket` and whatever else the objective reads. `frozen`
        is what the objective reads but does not train, `{}` if nothing.
    """
    member = _Member(objective, tx, rate, specs, shapes, optimizer_memory)
    # One program with a branch per padded length, instead of a program per length: members that run
    # at the same time may need different lengths at the same step.
    by_length = [functools.partial(member.gradients, length) for length in lengths]

    def step(state: TrainState, batch: Batch, frozen: Tree) -> tuple[TrainState, Metrics]:
        def microbatch_gradients(microbatch: Batch) -> tuple[Tree, ExampleSums]:
            return switch(microbatch["bucket"], by_length, state.params, microbatch, frozen)

        summed, examples = _accumulate(microbatch_gradients, batch, state.params)
        return member.update(state, summed, examples, batch["ids"])

    return step


def fused_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    lengths: Sequence[int],
    specs: Tree | None = None,
    shapes: DistinctShapes | None = None,
) -> Step:
    """Return the step of all members of a device group as one program, see `Lora.fused`.

    Each member has its own gradients, clipping and update, as in `train_step`. Products with
    `frozen` are over the rows of all members, which sum in another order, so a member does not have
    the bits that it has alone.

    Args:
        objective, tx, rate, lengths, specs, shapes: see `train_step`.

    Returns:
        `(states, batches, frozen) -> (states, metrics)` with a leading `M` everywhere but in
        `frozen`.
    """
    member = _Member(objective, tx, rate, specs, shapes)
    by_length = [
        fusion.fuse_members(functools.partial(member.gradients, length), (True, True, False))
        for length in lengths
    ]

    def step(states: TrainState, batches: Batch, frozen: Tree) -> tuple[TrainState, Metrics]:
        def microbatch_gradients(microbatches: Batch) -> tuple[Tree, ExampleSums]:
            # The longest of all members: a choice per member would compute every branch for every
            # member. What a longer branch adds to a member is padding.
            bucket = microbatches["bucket"].max()
            return switch(bucket, by_length, states.params, microbatches, frozen)

        # the scan over microbatches is outermost, so their axis comes first
        by_microbatch = jax.tree.map(_swap, batches)
        summed, examples = _accumulate(microbatch_gradients, by_microbatch, states.params)
        update = fusion.fuse_members(member.update, (True,) * 4)
        return update(states, summed, jax.tree.map(_swap, examples), batches["ids"])

    return step


def _swap(x: jax.Array) -> jax.Array:
    """Exchange the axes of members and microbatches."""
    return jnp.swapaxes(x, 0, 1)


def _move(opt_state: PyTree, *, to_host: bool) -> PyTree:
    space = jax.memory.Space.Host if to_host else jax.memory.Space.Device
    # as in `abstract_state`, counters stay where they are
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim > 0 else x, opt_state)


def shorten(microbatch: Mapping[str, jax.Array], length: int) -> Batch:
    """Cut the positions of a microbatch to a padded length; what is cut off is padding."""
    return {**microbatch, **{name: microbatch[name][..., :length] for name in SEQUENCES}}


def switch(bucket: jax.Array, branches: Sequence[Callable[..., T]], *operands: PyTree) -> T:
    """Return `branches[bucket](*operands)`; of a single branch no choice is compiled."""
    if len(branches) == 1:
        return branches[0](*operands)
    return jax.lax.switch(bucket, branches, *operands)


def _accumulate(
    gradients: Callable[[Batch], tuple[Tree, ExampleSums]], batch: Batch, params: Tree
) -> tuple[Tree, ExampleSums]:
    """Sum gradients over the microbatches; return them with the sums per example, [A, B]."""
    # a single microbatch needs no second buffer for the sum
    if batch["tokens"].shape[0] == 1:
        grads, sums = gradients(jax.tree.map(lambda x: x[0], batch))
        return grads, jax.tree.map(lambda x: x[None], sums)

    def body(total: Tree, microbatch: Batch) -> tuple[Tree, ExampleSums]:
        grads, sums = gradients(microbatch)
        return jax.tree.map(jnp.add, total, grads), sums

    return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), batch)


# ---------------------------------------------------------------------------------- populations


def abstract_state(
    params: Tree,
    tx: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *,
    optimizer_memory: OptimizerMemory = "device",
) -> TrainState:
    """Return the state of a population as `jax.ShapeDtypeStruct`s.

    The state of the optimizer is sharded as its parameters are.

    Args:
        params: parameters of the population, abstract, with shardings
            (`convert.abstract_params(..., members=M)`).
        tx: the optimizer.
        mesh: where counters live.
        optimizer_memory: where the other arrays of the optimizer's state live.
    """
    # A leaf of the optimizer may have fewer axes than its parameter, such as Adafactor's means over
    # rows and columns. It keeps the sharding of the axes that are left, and JAX itself says which:
    # `init` is traced on a mesh with explicit axes, so that shardings are part of the types.
    names = mesh.axis_names
    explicit = AbstractMesh(
        tuple(mesh.shape.values()), names, axis_types=(AxisType.Explicit,) * len(names)
    )

    def typed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(explicit, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.sharding.use_abstract_mesh(explicit):
        opt_state = jax.eval_shape(jax.vmap(tx.init), jax.tree.map(typed, params))

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # the member axis of a traced leaf carries no sharding of its own
        inner = () if leaf.sharding is None else tuple(leaf.sharding.spec)[1:]
        # counters are read by the device in every step, and take no memory
        on_host = optimizer_memory == "host" and leaf.ndim > 1
        kind = meshes.HOST_MEMORY if on_host else None
        sharding = NamedSharding(mesh, P("order", *inner), memory_kind=kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # A counter that is not on the mesh would differ from the one that the step returns, and the
    # step would be compiled twice.
    counter = jax.ShapeDtypeStruct((tree.size(params),), jnp.int32)
    return TrainState(params, jax.tree.map(on_mesh, opt_state), on_mesh(counter))


def initial_state(
    starts: Sequence[Tree], tx: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Return a population before its first step.

    Args:
        starts: parameters, float32, of one member, from which all start, or of each.
        tx: the optimizer.
        abstract: from `abstract_state`.
    """
    members = abstract.step.shape[0]

    # under jit, so that no device ever holds more than its shards of the population
    def build(starts: Sequence[Tree]) -> TrainState:
        def of_members(*leaves: jax.Array) -> jax.Array:
            if len(leaves) == 1:
                return jnp.broadcast_to(leaves[0], (members, *leaves[0].shape))
            return jnp.stack(leaves)

        params = jax.tree.map(of_members, *starts)
        return TrainState(params, jax.vmap(tx.init)(params), jnp.zeros(members, jnp.int32))

    return jax.jit(build, out_shardings=shardings(abstract))(starts)


def compile_step(
    step: Step,
    mesh: Mesh,
    state: TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    frozen: Tree,
    options: Options = EXACT,
    *,
    fused: bool = False,
) -> Step:
    """Compile a step of one member, or of one device group, over the population.

    It is compiled once, ahead of time: an argument of another shape or sharding is an error, not a
    new program.

    Args:
        step: from `train_step`, or with `fused` from `fused_step`.
        mesh: the mesh.
        state: from `abstract_state`; it is donated.
        batch: abstract, with a leading `M` and shardings.
        frozen: abstract, with shardings and without `M`: one copy for all members.
        options: of the compiler, see `compiler_options.resolve`.
        fused: whether the step takes all members of a device group at once.
    """
    # Why not always `jax.vmap` over members: it turns their matmuls into batched ones, which sum in
    # another order, so a member would not have the bits that it has alone. It also needs the
    # activations of all members at once. So members of a device group run one after another
    # (`lax.scan`), and device groups next to each other (`shard_map` over `order`), without any
    # communication. `lora.fused` gives that up where all members read one base.
    mapped = meshes.update_groups if fused else meshes.update_members
    population = jax.jit(
        mapped(step, mesh),
        in_shardings=(shardings(state), shardings(batch), shardings(frozen)),
        out_shardings=(shardings(state), NamedSharding(mesh, P("order"))),
        # Parameters and moments are updated in place. Without donation two copies of the population
        # would be in memory.
        donate_argnums=0,
    )
    return population.lower(state, batch, frozen).compile(options)


def shardings(abstract: PyTree) -> PyTree:
    """Return the sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
