"""The order in which a member sees the examples: a pure function of (level, seed, member, epoch). Integers in, integers out.

There is no iterator state to save: resume, another number of hosts and another mesh all continue at the same example.
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

    It sorts n raw 64-bit words of Philox4x64-10 under the key of the named stream. numpy promises that raw words never change,
    which it does not promise for `Generator.permutation`, and a stable sort leaves nothing to a version, platform or device.
    Equal words, which alone would favour the smaller index, have a chance below n^2 / 2^65.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).

    Example:
        >>> permutation(8, 0, "example").tolist()
        [6, 2, 7, 1, 0, 4, 5, 3]
    """
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
    """Return the rows of the examples that one member sees in one epoch, step by step: int32[steps, batch].

    Levels:
        sample: a fresh permutation of the samples; batches change composition.
        batch: batches are composed once from the seed, alike for all members and epochs; the full ones are permuted.
        balanced: one base permutation an epoch; member m starts m/members of the way round, so that over the members every sample
            visits equally spaced positions and the position effect cancels by design.
        same: one order for all members (control).
        reverse: members 2j and 2j+1 are an order and its exact reverse; with an odd number the last one has no partner.

    Every row appears once. At every level only the end of the last step is padded, with -1, when `batch` does not divide `examples`:
    the sequence of samples is permuted, rotated or reversed first and cut into steps after. At level `batch` the short batch
    therefore keeps the last place, since elsewhere its few samples would make one noisy update at a high learning rate; its samples
    have one position at every member, so they say nothing about position and bias nothing. Member 0 has the same order at all
    levels but `batch`, and at level `sample` an order does not depend on how many members there are.

    Args:
        level: what is permuted.
        examples: number of samples, at least 1.
        batch: samples a step, at least 1.
        seed: seed of the run.
        member: 0 <= member < members.
        members: number of members.
        epoch: from 0.
        reshuffle: `never` repeats epoch 0.

    Raises:
        UserError: unknown level.
        ValueError: a number out of range.

    Source: the ablation of Ju et al. 2024 (arXiv 2410.03743) is `batch`; `balanced` is a cyclic Latin square over the members.

    Example:
        >>> order_indices(
        ...     level="sample", examples=5, batch=2, seed=0, member=0, members=1, epoch=0
        ... ).tolist()
        [[2, 0], [1, 3], [4, -1]]
        >>> order_indices(
        ...     level="reverse", examples=5, batch=2, seed=0, member=1, members=2, epoch=0
        ... ).tolist()
        [[4, 3], [1, 0], [2, -1]]
    """
    if level not in LEVELS:
        raise UserError(
            f"population.level = {level!r} is not a level of order{did_you_mean(level, LEVELS)}"
        )
    if min(examples, batch, members) < 1 or not 0 <= member < members or epoch < 0:
        raise ValueError(
            f"{examples=}, {batch=}, {members=} must be at least 1, {member=} in [0, members), {epoch=} at least 0"
        )
    epoch = 0 if reshuffle == "never" else epoch
    if level == "batch":
        sequence = permutation(examples, seed, "order", "composition")
        full = examples - examples % batch
        places = permutation(full // batch, seed, "order", "batches", member, epoch)
        sequence = np.concatenate(
            [sequence[:full].reshape(-1, batch)[places].reshape(-1), sequence[full:]]
        )
    else:
        owner = {"sample": member, "balanced": 0, "same": 0, "reverse": member // 2 * 2}[level]
        sequence = permutation(examples, seed, "order", owner, epoch)
        if level == "balanced":
            sequence = np.roll(sequence, -(member * examples // members))
        elif level == "reverse" and member % 2:
            sequence = sequence[::-1]
    return np.pad(sequence, (0, -examples % batch), constant_values=PADDING).reshape(-1, batch)


def places(indices: np.ndarray, examples: int) -> np.ndarray:
    """Return where each sample stands in an epoch: int64[examples, 2] of (step, row), or of packed rows [examples, 3] with the segment.

    Args:
        indices: int[steps, batch], or int[steps, batch, segments], of one epoch, -1 on padding.
        examples: number of samples.

    Raises:
        ValueError: the epoch does not hold every sample exactly once.

    Example:
        >>> places(np.array([[2, 0], [1, -1]]), 3).tolist()
        [[0, 1], [1, 0], [0, 0]]
    """
    found = np.argwhere(indices != PADDING)
    rows = indices[tuple(found.T)]
    if not np.array_equal(np.sort(rows), np.arange(examples)):
        raise ValueError(
            f"an epoch holds each of {examples} samples once; this one has {rows.size}, {np.unique(rows).size} different"
        )
    return found[np.argsort(rows)]


def positions(indices: np.ndarray, examples: int) -> np.ndarray:
    """Return when each sample is seen: float64[examples], its step divided by the last step, 0 the first and 1 the last.

    Args and errors are those of `places`.

    Example:
        >>> positions(np.array([[2, 0], [1, 3], [4, -1]]), 5).tolist()
        [0.0, 0.5, 0.0, 0.5, 1.0]
    """
    return places(indices, examples)[:, 0] / max(len(indices) - 1, 1)


def digest(indices: np.ndarray) -> str:
    """Return SHA-256 over the shape and the rows of an order, as hexadecimal; the same on every platform.

    Example:
        >>> digest(np.array([[1, 0]]))[:16], digest(np.array([[1], [0]]))[:16]
        ('e640fcf7bcf5b1b2', 'b5841383b2a95282')
    """
    text = "x".join(str(size) for size in indices.shape).encode()
    return hashlib.sha256(
        text + b":" + np.ascontiguousarray(indices, dtype="<i4").tobytes()
    ).hexdigest()
