"""What each member sees at each step: the orders, and a feed that builds batches on the host.

The feed works in a thread of its own, so that batches are built while the devices compute.

Axis letters: `M` member, `A` accumulation step, `B` example, `T` position, `S` example of a row.
"""

import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypedDict

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import mesh as meshes
from jax_ordermerge.data import order, pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.pack import Batch
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import member_name
from jax_ordermerge.train.spec import TrainingSpec

_AHEAD = 2  # batches that are built before they are asked for

AbstractBatch = dict[str, jax.ShapeDtypeStruct]

# ---------------------------------------------------------------------------------- orders


def epoch_order(spec: TrainingSpec, examples: int, member: int, epoch: int) -> np.ndarray:
    """Return the rows that a member sees in an epoch, int32[steps, batch].

    Args:
        spec: settings of the training.
        examples: number of examples (or packs).
        member: number of the member.
        epoch: from 0.

    See `order.order_indices`.
    """
    return order.order_indices(
        level=spec.population.level,
        examples=examples,
        batch=spec.training.batch,
        seed=spec.seed,
        member=member,
        members=spec.population.members,
        epoch=epoch,
        reshuffle=spec.population.reshuffle,
    )


def draw_orders(spec: TrainingSpec, sizes: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """Return the rows of the examples that members see, int32[M, epochs, steps, batch].

    Padding is -1. Packed rows have one more axis, [..., batch, S].

    With `packs` the examples are packed once, by their sizes alone, and the orders permute packs.
    All members then have the same rows and the same number of steps, and the position of a sample
    is that of its pack. With `bins` each order is packed by itself, so the number of rows differs.
    Every epoch then has as many steps as the longest epoch of the population needs, and its rows
    are spread evenly over them.

    Args:
        spec: settings of the training.
        sizes: tokens of each example, int[n].
        members: numbers of the members to draw for.

    Raises:
        UserError: an epoch has fewer rows than steps.

    Example:
        >>> from jax_ordermerge import config
        >>> spec = TrainingSpec(
        ...     training=config.Training(batch=2, epochs=1),
        ...     data=config.Data(packing="packs", max_length=8),
        ... )
        >>> draw_orders(spec, np.array([5, 4, 3, 8, 2]), (0,)).shape
        (1, 1, 2, 2, 2)
    """

    def draw(examples: int, members: Sequence[int]) -> np.ndarray:
        epochs = range(spec.training.epochs)
        orders = [[epoch_order(spec, examples, m, epoch) for epoch in epochs] for m in members]
        return np.stack(orders)

    length = spec.data.max_length
    if spec.data.packing == "none":
        return draw(len(sizes), members)
    if spec.data.packing == "packs":
        packs = pack.pack_tightly(sizes, length)
        return _take_rows(packs, draw(len(packs), members))
    # Steps must not depend on which members are trained here: a member alone is the member of the
    # population. So the orders of all members are packed, whoever asks.
    packed = []
    for epochs in draw(len(sizes), range(spec.population.members)):
        sequences = [indices[indices >= 0] for indices in epochs]
        packed.append([_take_rows(s, pack.pack_in_order(sizes[s], length)) for s in sequences])
    row_counts = [len(rows) for epochs in packed for rows in epochs]
    width = max(rows.shape[1] for epochs in packed for rows in epochs)
    steps = -(-max(row_counts) // spec.training.batch)
    if min(row_counts) < steps:
        raise UserError(
            f"data.packing = bins: an epoch fills {min(row_counts)} rows, too few for {steps} steps;"
            " set packs, or a larger training.batch"
        )
    return np.stack(
        [
            [_spread_rows(rows, steps, spec.training.batch, width) for rows in packed[m]]
            for m in members
        ]
    )


def _take_rows(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return `values[indices]`, with padding wherever an index is padding."""
    absent = (indices == order.PADDING).reshape(*indices.shape, *[1] * (values.ndim - 1))
    return np.where(absent, order.PADDING, values[indices]).astype(np.int32)


def _spread_rows(rows: np.ndarray, steps: int, batch: int, width: int) -> np.ndarray:
    """Cut rows [R, S] into steps of nearly equal numbers of rows: int32[steps, batch, width]."""
    spread = np.full((steps, batch, width), order.PADDING, np.int32)
    cuts = np.arange(steps + 1) * len(rows) // steps
    for step, (start, end) in enumerate(itertools.pairwise(cuts)):
        spread[step, : end - start, : rows.shape[1]] = rows[start:end]
    return spread


def row_lengths(spec: TrainingSpec, longest: int) -> tuple[int, ...]:
    """Return the lengths that rows are padded to, ascending.

    Packed rows have one length, however long the longest example is.

    Example:
        >>> row_lengths(TrainingSpec(), 300)
        (304,)
    """
    longest = longest if spec.data.packing == "none" else spec.data.max_length
    return pack.bucket_lengths(longest, spec.data.buckets)


# ---------------------------------------------------------------------------------- the plan


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
            # as `pack.step_batch` does: microbatches are cut from the rows in ascending length
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
            padded to the longest of all members of the population, trained here or not. Device
            groups that train different members then take the same branch: XLA's collectives wait
            for all groups, so groups in different branches would wait for each other forever.
    """
    population = range(spec.population.members)
    members = tuple(population if members is None else members)
    lengths = row_lengths(spec, examples.longest)
    pad_alike = mesh is not None and mesh.size > mesh.shape["order"] and len(lengths) > 1
    return Plan(
        spec=spec,
        examples=dataclasses.replace(examples, ids=np.arange(len(examples))),
        ids=np.asarray(examples.ids),
        members=members,
        orders=draw_orders(spec, examples.lengths, members),
        lengths=lengths,
        population_orders=draw_orders(spec, examples.lengths, population) if pad_alike else None,
    )


# ---------------------------------------------------------------------------------- device batches


def abstract_batch(plan: Plan, mesh: Mesh) -> AbstractBatch:
    """Return the batch of a step over all members as shapes with shardings.

    Members, examples and positions are divided over their mesh axes.
    """

    def abstract(name: str, array: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (len(plan.members), *array.shape)
        axes = ("member", None, "batch", *[None] * array.ndim)[: len(shape)]
        if name in pack.SEQUENCES:
            axes = (*axes[:-1], "length")
        sharding = meshes.sharding(axes, shape, mesh)
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)

    return {name: abstract(name, array) for name, array in plan.batch(0, 0).items()}


def device_batch(plan: Plan, step: int, abstract: AbstractBatch) -> dict[str, jax.Array]:
    """Build the batch of a step. A process builds only the members of its own devices."""
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


class Feed:
    """Iterate over the device batches of steps `start, start + 1, ...`, built ahead in a thread.

    Use it as a context manager: leaving it ends the thread.
    """

    def __init__(self, plan: Plan, abstract: AbstractBatch, start: int) -> None:
        self._plan, self._abstract, self._start = plan, abstract, start
        self._ready: queue.Queue[dict[str, jax.Array] | BaseException] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._build, name="batches", daemon=True)

    def _build(self) -> None:
        try:
            for step in range(self._start, self._plan.steps):
                self._put(device_batch(self._plan, step, self._abstract))
                if self._stopped.is_set():
                    return
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: dict[str, jax.Array] | BaseException) -> None:
        # a put without timeout would never return when the consumer leaves early
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                return

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        for _ in range(self._start, self._plan.steps):
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()
