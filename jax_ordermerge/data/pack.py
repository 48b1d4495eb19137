"""Examples into padded batches. Pure numpy; a batch is a dict of arrays under the names that the train step takes."""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.order import PADDING

Batch = dict[str, np.ndarray]
_OPEN = 8  # rows filled at the same time: positions stay all but those before packing, and rows of 12 examples are 98 % full (with one, 82 %)
SEQUENCES = (
    "tokens",
    "targets",
    "positions",
    "segments",
    "weights",
)  # arrays of a batch with an axis of positions


def collate(examples: Examples, rows: np.ndarray, length: int) -> Batch:
    """Return the examples of `rows`, one or several a row of the batch, right-padded to `length`.

    Args:
        examples: tokenized examples.
        rows: int[B], rows of the examples; -1 is an example of nothing but padding. Of packed rows int[B, S]: the examples that stand
            side by side, -1 behind the last.
        length: T, at least the longest of them, or of their sums.

    Returns:
        `tokens, targets, positions, segments` int32[B, T] (segments count from 1 in every row and are 0 on padding, all others 0 on
        padding), `weights` float32[B, T] and `ids` int32[B] or [B, S] (-1 on padding). `targets[t] = tokens[t + 1]`; a weight is 1 where
        the target belongs to the response. The last token of an example has no target: its weight is 0.
        Of pairs these are [B, 2, T], the chosen sequence before the rejected one, and `reference` float32[B, 2] is there too (0 on
        padding rows).

    Raises:
        ValueError: an example, or what is packed into a row, is longer than `length`; nothing is cut here. Pairs have no reference
            yet.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> two = Examples(
        ...     Ragged.of([[5, 6, 7], [8, 9]], np.int32),
        ...     Ragged.of([[0, 1, 1], [0, 1]], np.bool_),
        ...     np.array([3, 4]),
        ... )
        >>> batch = collate(two, np.array([1, 0, -1]), 4)
        >>> batch["tokens"].tolist(), batch["targets"].tolist()
        ([[8, 9, 0, 0], [5, 6, 7, 0], [0, 0, 0, 0]], [[9, 0, 0, 0], [6, 7, 0, 0], [0, 0, 0, 0]])
        >>> batch["weights"].tolist(), batch["ids"].tolist()
        ([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], [4, 3, -1])
        >>> packed = collate(two, np.array([[1, 0]]), 6)
        >>> packed["tokens"].tolist(), packed["segments"].tolist(), packed["ids"].tolist()
        ([[8, 9, 5, 6, 7, 0]], [[1, 1, 2, 2, 2, 0]], [[4, 3]])
    """
    rows = np.asarray(rows)
    if examples.rejected is not None:
        return _collate_pairs(examples, rows, length)
    sizes = _sizes(examples, rows).reshape(len(rows), -1)
    ends = sizes.cumsum(1)
    if ends.max(initial=0) > length:
        raise ValueError(
            f"an example of {ends.max()} tokens does not fit {length}; drop or truncate it when it is loaded"
        )
    # every token: which example of the batch it belongs to, its place there, in the file and in the batch
    owner = np.repeat(np.arange(sizes.size), sizes.reshape(-1))
    place = np.arange(owner.size) - (sizes.reshape(-1).cumsum() - sizes.reshape(-1))[owner]
    source = examples.tokens.offsets[rows].reshape(-1)[owner] + place
    at = owner // sizes.shape[1], (ends - sizes).reshape(-1)[owner] + place
    followed = place < sizes.reshape(-1)[owner] - 1
    tokens, targets, positions, segments = np.zeros((4, len(rows), length), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    tokens[at], positions[at], segments[at] = (
        examples.tokens.flat[source],
        place,
        owner % sizes.shape[1] + 1,
    )
    before = at[0][followed], at[1][followed]
    targets[before] = examples.tokens.flat[source[followed] + 1]
    weights[before] = examples.answers.flat[source[followed] + 1]
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segments": segments,
        "weights": weights,
        "ids": np.where(rows == PADDING, PADDING, examples.ids[rows]).astype(np.int32),
    }


def pack_in_order(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return which examples share a row of `length` tokens, rows in the order of the examples.

    Next fit with several rows: each example goes into the oldest of at most 8 open rows that has room; where none has, the oldest row
    is closed and another one opened.

    Args:
        sizes: tokens of each example, int[n], none above `length`.
        length: tokens a row.

    Returns:
        int32[R, S], numbers of the examples, every one once, -1 behind the last of a row; S is the most that a row holds.

    Example:
        >>> pack_in_order(np.array([5, 4, 3, 8, 2]), 8).tolist()
        [[0, 2], [1, 4], [3, -1]]
    """
    rows: list[list[int]] = []
    opened: list[tuple[list[int], int]] = []  # the examples and the tokens of each open row
    for number, size in enumerate(sizes.tolist()):
        for place, (row, used) in enumerate(opened):
            if used + size <= length:
                row.append(number)
                opened[place] = row, used + size
                break
        else:
            if len(opened) == _OPEN:
                opened.pop(0)
            rows.append([number])
            opened.append((rows[-1], size))
    return _padded(rows)


def pack_tightly(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return which examples share a row of `length` tokens, in few rows, whose order says nothing.

    Best fit decreasing: from the longest on, each example goes into the row that it fills best.

    Args, returns: see `pack_in_order`.

    Example:
        >>> pack_tightly(np.array([5, 4, 3, 8, 2]), 8).tolist()
        [[3, -1], [0, 2], [1, 4]]
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}  # rows by the tokens that are free in them
    rooms: list[int] = []  # the keys that have rows, ascending
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            rows.append([])
            row, room = rows[-1], length
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        row.append(number)
        if not by_room.setdefault(room - size, []):
            bisect.insort(rooms, room - size)
        by_room[room - size].append(row)
    return _padded(rows)


def _padded(rows: list[list[int]]) -> np.ndarray:
    packed = np.full((len(rows), max(map(len, rows), default=0)), PADDING, np.int32)
    for place, row in enumerate(rows):
        packed[place, : len(row)] = row
    return packed


def _collate_pairs(examples: Examples, rows: np.ndarray, length: int) -> Batch:
    if examples.reference is None:
        raise ValueError(
            "preference pairs have no reference log-probabilities yet; measure the base on them first"
        )
    chosen, rejected = (collate(part, rows, length) for part in examples.parts)
    both = {name: np.stack([chosen[name], rejected[name]], axis=1) for name in SEQUENCES}
    reference = np.where(rows[:, None] == PADDING, 0, examples.reference[rows]).astype(np.float32)
    return {**both, "ids": chosen["ids"], "reference": reference}


def bucket_lengths(longest: int, buckets: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the padded lengths, ascending; the last one is `longest` rounded up to a multiple of 8.

    Args:
        longest: tokens of the longest example.
        buckets: shorter lengths to pad to; those not below the last one are left out.

    Example:
        >>> bucket_lengths(300, (256, 128, 512)), bucket_lengths(64)
        ((128, 256, 304), (64,))
    """
    last = -(-longest // 8) * 8
    return (*sorted({size for size in buckets if size < last}), last)


def step_batch(
    examples: Examples, rows: np.ndarray, *, microbatch: int, lengths: Sequence[int]
) -> Batch:
    """Return one optimizer step of one member, cut into A = B / microbatch accumulation steps.

    It is a function of this member's own rows alone, so that a member in a population takes the steps it takes alone. With more than
    one length the rows are sorted by length (stable, padding rows first), so that short examples share a microbatch: the sum over the
    step does not depend on how it is divided.

    Args:
        examples: tokenized examples.
        rows: int[B], or of packed rows int[B, S]; -1 on padding.
        microbatch: b, a divisor of B.
        lengths: padded lengths, ascending, as `bucket_lengths` gives them.

    Returns:
        the arrays of `collate` as [A, b, ...], all padded to T = lengths[-1], and `bucket` int32[A]: the index of the
        smallest length that holds the microbatch.

    Raises:
        ValueError: the microbatch does not divide the rows.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> two = Examples(
        ...     Ragged.of([[5] * 9, [8, 9]], np.int32),
        ...     Ragged.of([[1] * 9, [0, 1]], np.bool_),
        ...     np.arange(2),
        ... )
        >>> batch = step_batch(two, np.array([0, 1]), microbatch=1, lengths=(8, 16))
        >>> batch["tokens"].shape, batch["ids"].tolist(), batch["bucket"].tolist()
        ((2, 1, 16), [[1], [0]], [0, 1])
    """
    rows = np.asarray(rows)
    if len(rows) % microbatch:
        raise ValueError(
            f"a step of {len(rows)} rows is not a multiple of microbatch = {microbatch}"
        )
    sizes = _sizes(examples, rows).reshape(len(rows), -1).sum(1)
    if len(lengths) > 1:
        by_length = np.argsort(sizes, kind="stable")
        rows, sizes = rows[by_length], sizes[by_length]
    flat = collate(examples, rows, lengths[-1])
    batch = {name: array.reshape(-1, microbatch, *array.shape[1:]) for name, array in flat.items()}
    batch["bucket"] = np.searchsorted(lengths, sizes.reshape(-1, microbatch).max(1)).astype(
        np.int32
    )
    return batch


def length_batches(examples: Examples, batch: int, lengths: Sequence[int]) -> Iterator[Batch]:
    """Yield evaluation batches that together hold every example once, longest first, so that too little memory shows at once.

    Args:
        examples: tokenized examples.
        batch: B, examples a batch; the last one is filled with padding rows.
        lengths: padded lengths, ascending; each batch is padded to the smallest that holds it, so there are at most so many shapes.

    Yields:
        the dict of `collate`.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> three = Examples(
        ...     Ragged.of([[5], [5] * 9, [8, 9]], np.int32),
        ...     Ragged.of([[1], [1] * 9, [0, 1]], np.bool_),
        ...     np.arange(3),
        ... )
        >>> [(b["tokens"].shape, b["ids"].tolist()) for b in length_batches(three, 2, (8, 16))]
        [((2, 16), [1, 2]), ((2, 8), [0, -1])]
    """
    sizes = examples.lengths
    by_length = np.argsort(-sizes, kind="stable")
    for start in range(0, len(examples), batch):
        rows = by_length[start : start + batch]
        length = lengths[int(np.searchsorted(lengths, sizes[rows[0]]))]
        yield collate(
            examples, np.pad(rows, (0, batch - rows.size), constant_values=PADDING), length
        )


def _sizes(examples: Examples, rows: np.ndarray) -> np.ndarray:
    # from the offsets of these rows alone: a step must not cost a pass over all examples
    sizes = [part.tokens.offsets[rows + 1] - part.tokens.offsets[rows] for part in examples.parts]
    return np.where(rows == PADDING, 0, np.max(sizes, axis=0))
