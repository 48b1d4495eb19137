"""Examples into padded batches, in numpy. A batch is the dict of arrays that a train step takes."""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.order import PADDING

Batch = dict[str, np.ndarray]
# Rows that are filled at the same time. With 8, positions in the epoch stay almost those before
# packing, and rows of 12 examples are 98 % full. With 1 they are 82 % full.
_OPEN = 8
# Arrays of a batch that have an axis of positions.
SEQUENCES = ("tokens", "targets", "positions", "segments", "weights")


def collate(examples: Examples, rows: np.ndarray, length: int) -> Batch:
    """Return the batch of the examples of `rows`, right-padded to `length`.

    Args:
        examples: tokenized examples.
        rows: int[B], rows of the examples; -1 is an example of padding alone. Packed int[B, S]: the
            examples side by side in each row of the batch, -1 after the last.
        length: T, at least the number of tokens of each row of the batch.

    Returns:
        `tokens, targets, positions, segments` int32[B, T], `weights` float32[B, T] and `ids`
        int32[B] or [B, S] (-1 on padding). `targets[t] = tokens[t + 1]`. A weight is 1 where the
        target belongs to the response, and 0 at the last token of an example, which has no target.
        Segments count from 1 in every row. Padding is 0 in all but `ids`.
        Pairs give [B, 2, T], the chosen sequence first, and `reference` float32[B, 2].

    Raises:
        ValueError: a row of the batch is longer than `length` (nothing is cut here), or pairs have
            no reference log-probabilities.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> examples = Examples(
        ...     Ragged.of([[5, 6, 7], [8, 9]], np.int32),
        ...     Ragged.of([[0, 1, 1], [0, 1]], np.bool_),
        ...     np.array([3, 4]),
        ... )
        >>> batch = collate(examples, np.array([1, 0, -1]), 4)
        >>> batch["tokens"].tolist(), batch["targets"].tolist()
        ([[8, 9, 0, 0], [5, 6, 7, 0], [0, 0, 0, 0]], [[9, 0, 0, 0], [6, 7, 0, 0], [0, 0, 0, 0]])
        >>> batch["weights"].tolist(), batch["ids"].tolist()
        ([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], [4, 3, -1])
        >>> packed = collate(examples, np.array([[1, 0]]), 6)
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
            f"a row is too long: given {ends.max()} tokens, expected at most {length};"
            " drop or truncate examples when they are loaded"
        )
    # Vectors over all tokens of the batch, without a loop over examples: the example (numbered
    # through the batch), the position in it, the index in the flat arrays, row and column.
    flat_sizes = sizes.reshape(-1)
    example = np.repeat(np.arange(sizes.size), flat_sizes)
    position = np.arange(example.size) - (flat_sizes.cumsum() - flat_sizes)[example]
    index = examples.tokens.offsets[rows].reshape(-1)[example] + position
    row, column = example // sizes.shape[1], (ends - sizes).reshape(-1)[example] + position
    tokens, targets, positions, segments = np.zeros((4, len(rows), length), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    tokens[row, column] = examples.tokens.flat[index]
    positions[row, column] = position
    segments[row, column] = example % sizes.shape[1] + 1
    has_target = position < flat_sizes[example] - 1
    row, column, target = row[has_target], column[has_target], index[has_target] + 1
    targets[row, column] = examples.tokens.flat[target]
    weights[row, column] = examples.answers.flat[target]
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segments": segments,
        "weights": weights,
        "ids": np.where(rows == PADDING, PADDING, examples.ids[rows]).astype(np.int32),
    }


def pack_in_order(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return which examples share a row of `length` tokens, with rows in the order of the examples.

    Next fit with several rows: each example goes into the oldest of at most 8 open rows that has
    space. Where none has, the oldest row is closed and a new one opened.

    Args:
        sizes: tokens of each example, int[n], none above `length`.
        length: tokens per row.

    Returns:
        int32[R, S], each number of an example once, -1 after the last of a row. S is the largest
        number of examples per row.

    Example:
        >>> pack_in_order(np.array([5, 4, 3, 8, 2]), 8).tolist()
        [[0, 2], [1, 4], [3, -1]]
    """
    # Why not best fit over all rows, as in `pack_tightly`? It would move examples far from their
    # positions in the order, and the order is what is studied.
    rows: list[list[int]] = []
    opened: list[tuple[list[int], int]] = []  # the examples and the tokens of each open row
    for number, size in enumerate(sizes.tolist()):
        for slot, (row, used) in enumerate(opened):
            if used + size <= length:
                row.append(number)
                opened[slot] = row, used + size
                break
        else:
            if len(opened) == _OPEN:
                opened.pop(0)
            rows.append([number])
            opened.append((rows[-1], size))
    return _pad(rows)


def pack_tightly(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return which examples share a row of `length` tokens, in few rows and in no useful order.

    Best fit decreasing: from the longest on, each example goes into the row with the least space
    that is enough.

    Args, returns: see `pack_in_order`.

    Example:
        >>> pack_tightly(np.array([5, 4, 3, 8, 2]), 8).tolist()
        [[3, -1], [0, 2], [1, 4]]
    """
    # Rows by free space, with a sorted list of the spaces in use: O(n log n) for any number of
    # examples, where a search over all rows would be O(n^2).
    rows: list[list[int]] = []
    by_space: dict[int, list[list[int]]] = {}  # rows by their number of free tokens
    spaces: list[int] = []  # the keys that have rows, ascending
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        slot = bisect.bisect_left(spaces, size)
        if slot == len(spaces):
            rows.append([])
            row, space = rows[-1], length
        else:
            space = spaces[slot]
            row = by_space[space].pop()
            if not by_space[space]:
                spaces.pop(slot)
        row.append(number)
        if not by_space.setdefault(space - size, []):
            bisect.insort(spaces, space - size)
        by_space[space - size].append(row)
    return _pad(rows)


def _pad(rows: list[list[int]]) -> np.ndarray:
    packed = np.full((len(rows), max(map(len, rows), default=0)), PADDING, np.int32)
    for number, row in enumerate(rows):
        packed[number, : len(row)] = row
    return packed


def _collate_pairs(examples: Examples, rows: np.ndarray, length: int) -> Batch:
    if examples.reference is None:
        raise ValueError(
            "preference pairs have no reference log-probabilities; measure the base on them first"
        )
    chosen, rejected = (collate(part, rows, length) for part in examples.parts)
    pairs = {name: np.stack([chosen[name], rejected[name]], axis=1) for name in SEQUENCES}
    reference = np.where(rows[:, None] == PADDING, 0, examples.reference[rows]).astype(np.float32)
    return {**pairs, "ids": chosen["ids"], "reference": reference}


def bucket_lengths(longest: int, buckets: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the padded lengths, ascending; the last is `longest` rounded up to a multiple of 8.

    Args:
        longest: tokens of the longest example.
        buckets: shorter lengths to pad to; those not below the last length are left out.

    Example:
        >>> bucket_lengths(300, (256, 128, 512)), bucket_lengths(64)
        ((128, 256, 304), (64,))
    """
    # a multiple of 8, so that few lengths are in use and all are aligned
    last = -(-longest // 8) * 8
    return (*sorted({size for size in buckets if size < last}), last)


def step_batch(
    examples: Examples, rows: np.ndarray, *, microbatch: int, lengths: Sequence[int]
) -> Batch:
    """Return one optimizer step of one member, cut into A = B / microbatch accumulation steps.

    It depends on the rows of this member alone, so a member in a population takes the same steps as
    in a run of its own. With more than one length the rows are sorted by length (stable, padding
    rows first), so that short examples share a microbatch. The sum over a step does not depend on
    the division into microbatches.

    Args:
        examples: tokenized examples.
        rows: int[B], packed int[B, S]; -1 on padding.
        microbatch: b, a divisor of B.
        lengths: padded lengths, ascending, from `bucket_lengths`.

    Returns:
        the arrays of `collate` as [A, b, ...], all padded to T = lengths[-1], and `bucket`
        int32[A]: the index of the smallest length that holds the microbatch.

    Raises:
        ValueError: the microbatch does not divide the rows.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> examples = Examples(
        ...     Ragged.of([[5] * 9, [8, 9]], np.int32),
        ...     Ragged.of([[1] * 9, [0, 1]], np.bool_),
        ...     np.arange(2),
        ... )
        >>> batch = step_batch(examples, np.array([0, 1]), microbatch=1, lengths=(8, 16))
        >>> batch["tokens"].shape, batch["ids"].tolist(), batch["bucket"].tolist()
        ((2, 1, 16), [[1], [0]], [0, 1])
    """
    rows = np.asarray(rows)
    if len(rows) % microbatch:
        raise ValueError(
            f"a step of {len(rows)} rows is not a multiple of microbatch = {microbatch}"
        )
    sizes = _sizes(examples, rows).reshape(len(rows), -1).sum(1)
    # A stable sort: rows of one length keep their order, so the result does not depend on numpy.
    if len(lengths) > 1:
        by_length = np.argsort(sizes, kind="stable")
        rows, sizes = rows[by_length], sizes[by_length]
    flat = collate(examples, rows, lengths[-1])
    batch = {name: array.reshape(-1, microbatch, *array.shape[1:]) for name, array in flat.items()}
    # The longest row of a microbatch decides. The step runs the program of that length, `lengths`
    # being few, and reads the first columns only.
    longest = sizes.reshape(-1, microbatch).max(1)
    batch["bucket"] = np.searchsorted(lengths, longest).astype(np.int32)
    return batch


def length_batches(examples: Examples, batch: int, lengths: Sequence[int]) -> Iterator[Batch]:
    """Yield evaluation batches that together hold every example once.

    The longest examples come first, so that a lack of memory shows in the first batch.

    Args:
        examples: tokenized examples.
        batch: B, examples per batch; the last batch is filled with padding rows.
        lengths: padded lengths, ascending. Each batch is padded to the smallest that holds it, so
            there are at most `len(lengths)` shapes to compile.

    Yields:
        the dict of `collate`.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> examples = Examples(
        ...     Ragged.of([[5], [5] * 9, [8, 9]], np.int32),
        ...     Ragged.of([[1], [1] * 9, [0, 1]], np.bool_),
        ...     np.arange(3),
        ... )
        >>> batches = length_batches(examples, 2, (8, 16))
        >>> [(batch["tokens"].shape, batch["ids"].tolist()) for batch in batches]
        [((2, 16), [1, 2]), ((2, 8), [0, -1])]
    """
    sizes = examples.lengths
    by_length = np.argsort(-sizes, kind="stable")
    for start in range(0, len(examples), batch):
        rows = by_length[start : start + batch]
        length = lengths[int(np.searchsorted(lengths, sizes[rows[0]]))]
        padded = np.pad(rows, (0, batch - rows.size), constant_values=PADDING)
        yield collate(examples, padded, length)


def _sizes(examples: Examples, rows: np.ndarray) -> np.ndarray:
    # From the offsets of these rows alone: a step must not cost a pass over all examples. An index
    # of -1 reads an arbitrary row, which the mask replaces.
    sizes = [part.tokens.offsets[rows + 1] - part.tokens.offsets[rows] for part in examples.parts]
    return np.where(rows == PADDING, 0, np.max(sizes, axis=0))
