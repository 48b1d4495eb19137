"""What each member sees at each step: the orders, and a feed that builds batches on the host while the devices compute.

Axis letters: `M` member, `A` accumulation step, `B` example, `T` position.
"""

import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import mesh as meshes
from jax_ordermerge.config import Config
from jax_ordermerge.data import order, pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.pack import Batch
from jax_ordermerge.errors import UserError

_AHEAD = 2  # batches held ready


def epoch_order(config: Config, examples: int, member: int, epoch: int) -> np.ndarray:
    """Return the rows of the examples (or packs) that a member sees in an epoch, int32[steps, batch]; see `order.order_indices`."""
    return order.order_indices(
        level=config.population.level,
        examples=examples,
        batch=config.training.batch,
        seed=config.seed,
        member=member,
        members=config.population.members,
        epoch=epoch,
        reshuffle=config.population.reshuffle,
    )


def draw_orders(config: Config, sizes: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """Return the rows of the examples that members see, int32[M, epochs, steps, batch], -1 on padding; packed with one axis more, [S].

    With `packs` the examples are packed once, by their sizes alone, and the packs take the place of examples in the orders: all members
    have the same rows and as many steps, and a sample's position is that of its pack. With `bins` each order is packed
    by itself. The number of rows then differs, so all have the steps that the longest of all members' epochs needs, and the others
    spread their rows evenly over them.

    Args:
        config: of the run.
        sizes: tokens of each example, int[n].
        members: which members, of those of the population.

    Raises:
        UserError: an epoch has fewer rows than steps.

    Example:
        >>> from jax_ordermerge.config import make_config
        >>> config = make_config(
        ...     {
        ...         "training": {"batch": 2, "epochs": 1},
        ...         "data": {"packing": "packs", "max_length": 8},
        ...     }
        ... )
        >>> draw_orders(config, np.array([5, 4, 3, 8, 2]), (0,)).shape
        (1, 1, 2, 2, 2)
    """
    epochs, n = range(config.training.epochs), len(sizes)
    length = config.data.max_length
    if config.data.packing == "packs":
        packs = pack.pack_tightly(sizes, length)
        return _chosen(
            packs,
            np.stack([[epoch_order(config, len(packs), m, e) for e in epochs] for m in members]),
        )
    everyone = range(config.population.members) if config.data.packing == "bins" else members
    drawn = np.stack([[epoch_order(config, n, m, e) for e in epochs] for m in everyone])
    if config.data.packing == "none":
        return drawn
    sequences = [[one[one >= 0] for one in own] for own in drawn]
    packed = [
        [_chosen(one, pack.pack_in_order(sizes[one], length)) for one in own] for own in sequences
    ]
    rows = [len(one) for own in packed for one in own]
    steps, most = (
        -(-max(rows) // config.training.batch),
        max(one.shape[1] for own in packed for one in own),
    )
    if min(rows) < steps:
        raise UserError(
            f"data.packing = bins: an epoch fills {min(rows)} rows, too few for {steps} steps; give packs, or a larger training.batch"
        )
    spread = [
        [_spread(one, steps, config.training.batch, most) for one in packed[m]] for m in members
    ]
    return np.stack(spread)


def _chosen(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return `values[places]`, all padding where a place is padding."""
    absent = (places == order.PADDING).reshape(*places.shape, *[1] * (values.ndim - 1))
    return np.where(absent, order.PADDING, values[places]).astype(np.int32)


def _spread(rows: np.ndarray, steps: int, batch: int, most: int) -> np.ndarray:
    """Cut rows [R, S] into steps of nearly equal numbers of rows: int32[steps, batch, most]."""
    spread = np.full((steps, batch, most), order.PADDING, np.int32)
    cuts = np.arange(steps + 1) * len(rows) // steps
    for step, (start, end) in enumerate(itertools.pairwise(cuts)):
        spread[step, : end - start, : rows.shape[1]] = rows[start:end]
    return spread


def row_lengths(config: Config, longest: int) -> tuple[int, ...]:
    """Return the lengths that rows are padded to, ascending; packed rows have one, whatever the longest example.

    Example:
        >>> row_lengths(Config(), 300)
        (304,)
    """
    return pack.bucket_lengths(
        longest if config.data.packing == "none" else config.data.max_length, config.data.buckets
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All steps of all members trained together.

    Attributes:
        config: of the run.
        examples: tokenized; their ids are their row numbers here.
        ids: int[n], the sample id of each row.
        members: which members of the population, in the order of the axis `M`.
        orders: int32[M, epochs, steps an epoch, batch], or packed [..., batch, S], rows of the examples, -1 on padding.
        lengths: padded lengths, ascending.
        company: orders of the whole population if all its members pad a step alike, else None; see `make_plan`.
    """

    config: Config
    examples: Examples
    ids: np.ndarray
    members: tuple[int, ...]
    orders: np.ndarray
    lengths: tuple[int, ...]
    population_orders: np.ndarray | None

    @property
    def epoch_steps(self) -> int:
        """Steps an epoch."""
        return int(self.orders.shape[2])

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return int(self.orders.shape[1] * self.orders.shape[2])

    @functools.cached_property
    def digests(self) -> dict[str, list[str]]:
        """`{"member_0": [digest of each epoch]}`."""
        return {
            f"member_{m}": [order.digest(e) for e in epochs]
            for m, epochs in zip(self.members, self.orders, strict=True)
        }

    @property
    def packing(self) -> dict[str, Any]:
        """How rows are packed, the same at all members: `kind`, the most `examples` of a row, its `length`, `steps` of `rows` an epoch,
        and `filled`, the fraction of all their tokens that are no padding."""
        _, _, steps, rows, most = self.orders.shape
        length = self.lengths[-1]
        filled = float(self.examples.lengths.sum() / (steps * rows * length))
        return {
            "kind": self.config.data.packing,
            "examples": most,
            "length": length,
            "steps": steps,
            "rows": rows,
            "filled": filled,
        }

    @property
    def microbatch(self) -> int:
        """Examples a forward pass."""
        return self.config.training.microbatch or self.config.training.batch

    def rows(self, step: int) -> np.ndarray:
        """Return int32[M, batch] of a step, from 0; packed [M, batch, S]."""
        return self._at(self.orders, step)

    def _at(self, orders: np.ndarray, step: int) -> np.ndarray:
        return orders[:, step // self.epoch_steps, step % self.epoch_steps]

    def tokens(self, step: int) -> int:
        """Return the number of tokens that are no padding, over all members."""
        return int(self.lengths_seen(step).sum())

    def lengths_seen(self, step: int) -> np.ndarray:
        """Return the number of tokens of each sequence of a step, over all members, int[n]."""
        rows = self.rows(step)
        return np.concatenate([part.lengths[rows[rows >= 0]] for part in self.examples.parts])

    def batch(self, step: int, place: int) -> Batch:
        """Return the batch of the member at a place of the axis `M`; see `pack.step_batch`."""
        batch = pack.step_batch(
            self.examples, self.rows(step)[place], microbatch=self.microbatch, lengths=self.lengths
        )
        if self.population_orders is not None:
            rows = self._at(self.population_orders, step)
            sizes = np.sort(np.where(rows < 0, 0, self.examples.lengths[rows]), axis=1).reshape(
                len(rows), -1, self.microbatch
            )
            batch["bucket"] = np.searchsorted(self.lengths, sizes.max((0, 2))).astype(np.int32)
        return batch


def make_plan(
    config: Config, examples: Examples, members: Sequence[int] | None = None, *, alike: bool = False
) -> Plan:
    """Draw the orders.

    Args:
        config: of the run.
        examples: tokenized examples.
        members: which members to train, by default all.
        alike: pad a microbatch to the longest among all members of the population, trained here or not. Device groups that train
            different members may not branch apart where a member spans several devices: collectives of XLA wait for all groups.
    """
    everyone = range(config.population.members)
    chosen = tuple(everyone if members is None else members)
    lengths = row_lengths(config, examples.longest)
    numbered = dataclasses.replace(examples, ids=np.arange(len(examples)))
    population_orders = (
        draw_orders(config, examples.lengths, everyone) if alike and len(lengths) > 1 else None
    )
    orders = draw_orders(config, examples.lengths, chosen)
    return Plan(
        config, numbered, np.asarray(examples.ids), chosen, orders, lengths, population_orders
    )


def abstract_batch(plan: Plan, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the batch of a step over all members as shapes with shardings: members, examples and positions over their mesh axes."""

    def abstract(name: str, array: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (len(plan.members), *array.shape)
        axes = ("member", None, "batch", *[None] * array.ndim)[: len(shape)]
        place = meshes.sharding(
            (*axes[:-1], "length") if name in pack.SEQUENCES else axes, shape, mesh
        )
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=place)

    return {name: abstract(name, array) for name, array in plan.batch(0, 0).items()}


def device_batch(
    plan: Plan, step: int, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Build the batch of a step. Each process builds only the members that live on its own devices."""
    bucket = abstract["bucket"]
    mine = {
        place
        for index in bucket.sharding.addressable_devices_indices_map(bucket.shape).values()
        for place in range(*index[0].indices(len(plan.members)))
    }
    built = {place: plan.batch(step, place) for place in sorted(mine)}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        places = range(*index[0].indices(len(plan.members)))
        return np.stack([built[place][name][index[1:]] for place in places])

    return {
        name: jax.make_array_from_callback(leaf.shape, leaf.sharding, functools.partial(part, name))
        for name, leaf in abstract.items()
    }


class Feed:
    """Iterate over the device batches of steps `start, start + 1, ...`, built ahead in a thread. Use it as a context manager."""

    def __init__(self, plan: Plan, abstract: dict[str, jax.ShapeDtypeStruct], start: int) -> None:
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
