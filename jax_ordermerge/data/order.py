"""The order in which a member sees the examples: a pure function of (level, seed, member, epoch).

There is no iterator state to save. A resumed run, another number of hosts and another mesh all
continue at the same example.

Levels:

    sample: a new permutation of the samples; batches change composition.
    batch: batches are composed once from the seed, equal for all members and epochs; the full
        batches are permuted.
    balanced: one base permutation per epoch, in which member m starts m/members of the way
        round. Over the members every sample visits equally spaced positions, so the position
        effect cancels by design.
    same: one order for all members (control).
    reverse: members 2j and 2j+1 have an order and its exact reverse. With an odd number of
        members the last one has no partner.
"""

import hashlib
from typing import Final, Literal, get_args

import numpy as np

from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.rng import stream_key_bits

Level = Literal["sample", "batch", "balanced", "same", "reverse"]
Reshuffle = Literal["each_epoch", "never"]
LEVELS: Final = get_args(Level)
PADDING: Final = -1


def permutation(n: int, seed: int, *names: str | int) -> np.ndarray:
    """Return a random permutation of `range(n)`, int32[n], on the host.

    It sorts n raw 64-bit words of Philox4x64-10 under the key of the named stream. Why not
    `Generator.permutation`? numpy promises that raw words never change, but not that distributions
    do not. With a stable sort the result depends on no version, platform or device. Equal words,
    which alone would favour the smaller index, have a probability below n^2 / 2^65.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).

    Example:
        >>> permutation(8, 0, "example").tolist()
        [6, 2, 7, 1, 0, 4, 5, 3]
    """
    # The 64-bit key of the stream is the lower half of Philox's 128-bit key.
    low, high = (int(word) for word in stream_key_bits(seed, *names))
    words = np.random.Philox(key=low | high << 32).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int32)


def order_indices(
    *,
    level: Level,
    examples: int,
    batch: int,
    seed: int,
    member: int,
    members: int,
    epoch: int,
    reshuffle: Reshuffle = "each_epoch",
) -> np.ndarray:
    """Return the rows of the examples that one member sees in one epoch, int32[steps, batch].

    Every row appears once. Where `batch` does not divide `examples`, the end of the last step is
    padded with -1: the samples are permuted, rotated or reversed first and cut into steps after.
    At level `batch` the short batch therefore keeps the last place. Elsewhere its few samples would
    make one noisy update at a high learning rate. Its samples have the same position in every
    member, so they carry no information about position and do not bias it. Member 0 has the same
    order at all levels but `batch`. At level `sample` an order does not depend on `members`.

    Args:
        level: what is permuted, see the module docstring.
        examples: number of samples, at least 1.
        batch: samples per step, at least 1.
        seed: seed of the run.
        member: 0 <= member < members.
        members: number of members.
        epoch: from 0.
        reshuffle: `never` repeats epoch 0.

    Raises:
        UserError: unknown level.
        ValueError: a number out of range.

    Source: the ablation of Ju et al. 2024 (arXiv 2410.03743) is `batch`; `balanced` is a cyclic
    Latin square over the members.

    Example:
        >>> settings = dict(examples=5, batch=2, seed=0, members=2, epoch=0)
        >>> order_indices(level="sample", member=0, **settings).tolist()
        [[2, 0], [1, 3], [4, -1]]
        >>> order_indices(level="reverse", member=1, **settings).tolist()
        [[4, 3], [1, 0], [2, -1]]
    """
    if level not in LEVELS:
        raise UserError(
            f"population.level = {level!r} is not a level of order{did_you_mean(level, LEVELS)}"
        )
    if min(examples, batch, members) < 1 or not 0 <= member < members or epoch < 0:
        raise ValueError(
            f"out of range: {examples=}, {batch=}, {members=} must be at least 1,"
            f" {member=} in [0, members), {epoch=} at least 0"
        )
    epoch = 0 if reshuffle == "never" else epoch
    # The stream names are part of the format: a checkpoint is continued with the same orders.
    if level == "batch":
        sequence = permutation(examples, seed, "order", "composition")
        # The last, short batch is no part of the permutation: see the docstring.
        full = examples - examples % batch
        batches = permutation(full // batch, seed, "order", "batches", member, epoch)
        permuted = sequence[:full].reshape(-1, batch)[batches].reshape(-1)
        sequence = np.concatenate([permuted, sequence[full:]])
    else:
        # the member whose permutation this member uses
        source = {"sample": member, "balanced": 0, "same": 0, "reverse": member // 2 * 2}[level]
        sequence = permutation(examples, seed, "order", source, epoch)
        # Member m starts m n / k samples further on, rounded down: over the members the positions
        # of a sample are n / k apart, up to rounding.
        if level == "balanced":
            sequence = np.roll(sequence, -(member * examples // members))
        elif level == "reverse" and member % 2:
            sequence = sequence[::-1]
    # Cut into steps last, so that all levels are padded in the same place.
    return np.pad(sequence, (0, -examples % batch), constant_values=PADDING).reshape(-1, batch)


def locate(indices: np.ndarray, examples: int) -> np.ndarray:
    """Return the (step, row) of each sample in an epoch, int64[examples, 2].

    Packed rows give [examples, 3]: step, row and segment.

    Args:
        indices: int[steps, batch] of one epoch, packed int[steps, batch, segments]; -1 on padding.
        examples: number of samples.

    Raises:
        ValueError: the epoch does not hold every sample exactly once.

    Example:
        >>> locate(np.array([[2, 0], [1, -1]]), 3).tolist()
        [[0, 1], [1, 0], [0, 0]]
    """
    coordinates = np.argwhere(indices != PADDING)
    rows = indices[tuple(coordinates.T)]
    # checked here because statistics of wrong positions would look plausible
    if not np.array_equal(np.sort(rows), np.arange(examples)):
        raise ValueError(
            f"an epoch holds each of {examples} samples once;"
            f" given {rows.size}, {np.unique(rows).size} of them different"
        )
    return coordinates[np.argsort(rows)]


def positions(indices: np.ndarray, examples: int) -> np.ndarray:
    """Return the position of each sample in an epoch, float64[examples]: 0 first step, 1 last step.

    Args and errors are those of `locate`.

    Example:
        >>> positions(np.array([[2, 0], [1, 3], [4, -1]]), 5).tolist()
        [0.0, 0.5, 0.0, 0.5, 1.0]
    """
    return locate(indices, examples)[:, 0] / max(len(indices) - 1, 1)


def digest(indices: np.ndarray) -> str:
    """Return the SHA-256 of shape and rows of an order, as hexadecimal; equal on every platform.

    Example:
        >>> digest(np.array([[1, 0]]))[:16], digest(np.array([[1], [0]]))[:16]
        ('e640fcf7bcf5b1b2', 'b5841383b2a95282')
    """
    shape = "x".join(str(size) for size in indices.shape).encode()
    rows = np.ascontiguousarray(indices, dtype="<i4").tobytes()
    return hashlib.sha256(shape + b":" + rows).hexdigest()
