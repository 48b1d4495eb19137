"""The orders of a training: which rows each member sees at each step. No jax: data are previewed.

Axis letters: `M` member, `S` example of a row.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from jax_ordermerge.data import order, pack
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream_key_bits
from jax_ordermerge.train.spec import TrainingSpec


def epoch_order(spec: TrainingSpec, examples: int, member: int, epoch: int) -> np.ndarray:
    """Return the rows that a member sees in an epoch, int32[steps, batch].

    Args:
        spec: settings of the training.
        examples: number of examples (or packs).
        member: number of the member, counted over all populations.
        epoch: from 0.

    See `order.order_indices`.
    """
    # A pure function of its arguments: no state of an iterator is stored in a checkpoint, and a
    # member trained alone draws what it draws in the population.
    population, number = divmod(member, spec.population.members)
    if spec.population.vary == "init":
        number = 0  # members of a population differ in something else
    return order.order_indices(
        level=spec.population.level,
        examples=examples,
        batch=spec.training.batch,
        seed=population_seed(spec.seed, population),
        member=number,
        members=spec.population.members,
        epoch=epoch,
        reshuffle=spec.population.reshuffle,
    )


def population_seed(seed: int, population: int) -> int:
    """Return the seed of the orders of a population; that of population 0 is the seed of the run.

    Example:
        >>> population_seed(3, 0), population_seed(3, 1) != population_seed(3, 2)
        (3, True)
    """
    # A seed of its own and not higher member numbers: `balanced` and `reverse` relate the orders of
    # all members, and `batch` composes the batches once for all of them.
    return int(stream_key_bits(seed, "population", population)[0]) if population else seed


def draw_orders(spec: TrainingSpec, sizes: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """Return the rows of the examples that members see, int32[M, epochs, steps, batch].

    Padding is -1. Packed rows have one more axis, [..., batch, S].

    With `packs` the examples are packed once, and the orders permute packs: the position of a
    sample is that of its pack. With `bins` each order is packed by itself, and every epoch has as
    many steps as the longest epoch of the population needs.

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
        # by sizes alone, so all members have the same rows and the same number of steps
        packs = pack.pack_tightly(sizes, length)
        return _take_rows(packs, draw(len(packs), members))
    # The number of rows now depends on the order, but one program trains all members, so they must
    # take the same number of steps. It must not depend on who is trained here either: a member
    # alone is the member of the population. So the orders of all members are packed, whoever asks.
    packed = []
    for epochs in draw(len(sizes), range(spec.population.total)):
        sequences = [indices[indices >= 0] for indices in epochs]
        packed.append([_take_rows(s, pack.pack_in_order(sizes[s], length)) for s in sequences])
    row_counts = [len(rows) for epochs in packed for rows in epochs]
    width = max(rows.shape[1] for epochs in packed for rows in epochs)
    steps = -(-max(row_counts) // spec.training.batch)
    if min(row_counts) < steps:
        raise UserError(
            f"data.packing = bins: an epoch fills {min(row_counts)} rows, too few for {steps}"
            " steps; set packs, or a larger training.batch"
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
    # Evenly, and not full steps with a rest at the end: an order that fills fewer rows than another
    # one would end with steps of nothing but padding.
    spread = np.full((steps, batch, width), order.PADDING, np.int32)
    cuts = np.arange(steps + 1) * len(rows) // steps
    for step, (start, end) in enumerate(itertools.pairwise(cuts)):
        spread[step, : end - start, : rows.shape[1]] = rows[start:end]
    return spread
