"""What each member sees at each step: the orders, and the batches that follow from them.

Axis letters: `M` member, `A` accumulation step, `B` example, `T` position, `S` example of a row.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypedDict

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_ordermerge import mesh as meshes
from jax_ordermerge.data import order, pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.pack import Batch
from jax_ordermerge.layout import member_name
from jax_ordermerge.train.orders import draw_orders
from jax_ordermerge.train.spec import TrainingSpec

# Batches that are built before they are asked for. Two hide a batch that takes longer than its
# step; more would only take memory of the devices.
_AHEAD = 2

AbstractBatch = dict[str, jax.ShapeDtypeStruct]

# ---------------------------------------------------------------------------------- the plan


def row_lengths(spec: TrainingSpec, longest: int) -> tuple[int, ...]:
    """Return the lengths that rows are padded to, ascending.

    Packed rows have one length, however long the longest example is.

    Example:
        >>> row_lengths(TrainingSpec(), 300)
        (304,)
    """
    longest = longest if spec.data.packing == "none" else spec.data.max_length
    return pack.bucket_lengths(longest, spec.data.buckets)


class Packing(TypedDict):
    """How rows are packed, the same for all members.

    Attributes:
        kind: `data.packing`.
        examples: the most examples of a row.
        length: tokens of a row.
        steps: steps per epoch.
        rows: rows per step.
        filled: fraction of the tokens of all rows that are not padding.
    """

    kind: str
    examples: int
    length: int
    steps: int
    rows: int
    filled: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """All steps of all members that are trained together.

    Attributes:
        spec: settings of the training.
        examples: tokenized examples; their ids are their row numbers here.
        ids: int[n], the sample id of each row.
        members: numbers of the members, in the order of the axis `M`.
        orders: int32[M, epochs, steps per epoch, batch], or packed [..., batch, S]: rows of the
            examples, -1 on padding.
        lengths: padded lengths, ascending.
        population_orders: orders of the whole population where all its members pad a step alike,
            else None; see `make_plan`.
    """

    spec: TrainingSpec
    examples: Examples
    ids: np.ndarray
    members: tuple[int, ...]
    orders: np.ndarray
    lengths: tuple[int, ...]
    population_orders: np.ndarray | None

    @property
    def epoch_steps(self) -> int:
        """Steps per epoch."""
        return int(self.orders.shape[2])

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return int(self.orders.shape[1] * self.orders.shape[2])

    @property
    def microbatch(self) -> int:
        """Examples per forward pass."""
        return self.spec.training.microbatch or self.spec.training.batch

    @functools.cached_property
    def digests(self) -> dict[str, list[str]]:
        """`{"member_0": [digest of each epoch]}`."""
        return {
            member_name(m): [order.digest(indices) for indices in epochs]
            for m, epochs in zip(self.members, self.orders, strict=True)
        }

    @property
    def packing(self) -> Packing:
        """How rows are packed."""
        _, _, steps, rows, width = self.orders.shape
        length = self.lengths[-1]
        # over an epoch, in which every example is once
        filled = float(self.examples.lengths.sum() / (steps * rows * length))
        return Packing(
            kind=self.spec.data.packing,
            examples=width,
            length=length,
            steps=steps,
            rows=rows,
            filled=filled,
        )

    def rows(self, step: int) -> np.ndarray:
        """Return int32[M, batch] of a step, from 0; packed [M, batch, S]."""
        return self._at(self.orders, step)

    def _at(self, orders: np.ndarray, step: int) -> np.ndarray:
        return orders[:, step // self.epoch_steps, step % self.epoch_steps]

    def sequence_lengths(self, step: int) -> np.ndarray:
        """Return the tokens of each sequence of a step, over all members and without padding."""
        rows = self.rows(step)
        return np.concatenate([part.lengths[rows[rows >= 0]] for part in self.examples.parts])

    def batch(self, step: int, position: int) -> Batch:
        """Return the batch of the member at a position of the axis `M`; see `pack.step_batch`."""
        rows = self.rows(step)[position]
        batch = pack.step_batch(
            self.examples, rows, microbatch=self.microbatch, lengths=self.lengths
        )
        if self.population_orders is not None:
            rows = self._at(self.population_orders, step)
            # `pack.step_batch` cuts microbatches from the rows in ascending length; so does this,
            # for every member of the population, and takes the longest of them
            sizes = np.sort(np.where(rows < 0, 0, self.examples.lengths[rows]), axis=1)
            longest = sizes.reshape(len(rows), -1, self.microbatch).max((0, 2))
            batch["bucket"] = np.searchsorted(self.lengths, longest).astype(np.int32)
        return batch


def make_plan(
    spec: TrainingSpec,
    examples: Examples,
    members: Sequence[int] | None = None,
    *,
    mesh: Mesh | None = None,
) -> Plan:
    """Draw the orders of a training.

    Args:
        spec: settings of the training.
        examples: tokenized examples.
        members: numbers of the members to train, by default all.
        mesh: the mesh to train on. Where a member spans several of its devices, a microbatch is
            padded to the longest of all members of the population, trained here or not.
    """
    population = range(spec.population.total)
    members = tuple(population if members is None else members)
    lengths = row_lengths(spec, examples.longest)
    # The padded length selects a branch of the compiled step. Device groups that train different
    # members must take the same one: XLA's collectives over the inner axes wait for all groups, so
    # groups in different branches would wait for each other forever. All members of the population
    # count, not only those trained here, so that a member alone is padded as in the population.
    pad_alike = mesh is not None and mesh.size > mesh.shape["order"] and len(lengths) > 1
    return Plan(
        spec=spec,
        # Row numbers in place of sample ids: they index the array of losses, and ids of a file may
        # be any numbers. They become sample ids again when something is written.
        examples=dataclasses.replace(examples, ids=np.arange(len(examples))),
        ids=np.asarray(examples.ids),
        members=members,
        orders=draw_orders(spec, examples.lengths, members),
        lengths=lengths,
        population_orders=draw_orders(spec, examples.lengths, population) if pad_alike else None,
    )


# ---------------------------------------------------------------------------------- device batches


def batch_sharding(
    name: str, shape: Sequence[int], leading: Sequence[str | None], mesh: Mesh
) -> NamedSharding:
    """Return the sharding of an array of a batch: its first axes are named, positions come last."""
    axes = (*leading, *[None] * len(shape))[: len(shape)]
    if name in pack.SEQUENCES:
        axes = (*axes[:-1], "length")
    return meshes.sharding(axes, shape, mesh)


def abstract_batch(plan: Plan, mesh: Mesh) -> AbstractBatch:
    """Return the batch of a step over all members as shapes with shardings.

    Members, examples and positions are divided over their mesh axes.
    """

    # All batches of a training have one shape, that of the longest padded length, so one program
    # takes them; `bucket` says how many of the positions a microbatch really uses.
    def abstract(name: str, array: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (len(plan.members), *array.shape)
        sharding = batch_sharding(name, shape, ("member", None, "batch"), mesh)
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)

    return {name: abstract(name, array) for name, array in plan.batch(0, 0).items()}


def device_batch(plan: Plan, step: int, abstract: AbstractBatch) -> dict[str, jax.Array]:
    """Build the batch of a step. A process builds only the members of its own devices."""
    # `bucket` has a member axis alone, so its shards say which members each process has. The work
    # of a host stays the same however many hosts share the population.
    bucket = abstract["bucket"]
    members = len(plan.members)
    local = {
        position
        for index in bucket.sharding.addressable_devices_indices_map(bucket.shape).values()
        for position in range(*index[0].indices(members))
    }
    batches = {position: plan.batch(step, position) for position in sorted(local)}

    def shard(name: str, index: tuple[slice, ...]) -> np.ndarray:
        positions = range(*index[0].indices(members))
        return np.stack([batches[position][name][index[1:]] for position in positions])

    return {
        name: jax.make_array_from_callback(
            leaf.shape, leaf.sharding, functools.partial(shard, name)
        )
        for name, leaf in abstract.items()
    }


def feed(
    plan: Plan, abstract: AbstractBatch, start: int
) -> Generator[dict[str, jax.Array], None, None]:
    """Yield the device batches of steps `start, start + 1, ...`, built ahead in a thread.

    Close the generator (`contextlib.closing`) where it may be left early: that ends the thread.
    """
    # a thread is enough: the main thread waits for the devices, without the interpreter lock
    steps = iter(range(start, plan.steps))
    building: collections.deque[Future[dict[str, jax.Array]]] = collections.deque()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        try:
            while True:
                for step in itertools.islice(steps, _AHEAD + 1 - len(building)):
                    building.append(thread.submit(device_batch, plan, step, abstract))
                if not building:
                    return
                yield building.popleft().result()  # raises what was raised in the thread
        finally:
            # leaving the executor waits for what was submitted: do not build what nobody takes
            for future in building:
                future.cancel()
