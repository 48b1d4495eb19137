"""Examples into padded batches. Pure numpy; a batch is a dict of arrays under the names that the train step takes."""

from collections.abc import Iterator, Sequence

import numpy as np

from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.order import PADDING

Batch = dict[str, np.ndarray]


def collate(examples: Examples, rows: np.ndarray, length: int) -> Batch:
    """Return the examples of `rows` right-padded to `length`.

    Args:
        examples: tokenized examples.
        rows: int[B], rows of the examples; -1 is an example of nothing but padding.
        length: T, at least the longest of them.

    Returns:
        `tokens, targets, positions, segments` int32[B, T] (segments 1 on tokens and 0 on padding, all others 0 on padding), `weights`
        float32[B, T] and `ids` int32[B] (-1 on padding rows). `targets[t] = tokens[t + 1]`; a weight is 1 where the target belongs to
        the response. The last token has no target: its weight is 0.

    Raises:
        ValueError: an example is longer than `length`; nothing is cut here.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> two = Examples(Ragged.of([[5, 6, 7], [8, 9]], np.int32), Ragged.of([[0, 1, 1], [0, 1]], np.bool_), np.array([3, 4]))
        >>> batch = collate(two, np.array([1, 0, -1]), 4)
        >>> batch["tokens"].tolist(), batch["targets"].tolist()
        ([[8, 9, 0, 0], [5, 6, 7, 0], [0, 0, 0, 0]], [[9, 0, 0, 0], [6, 7, 0, 0], [0, 0, 0, 0]])
        >>> batch["weights"].tolist(), batch["ids"].tolist()
        ([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], [4, 3, -1])
    """
    rows = np.asarray(rows)
    start, sizes = examples.tokens.offsets[rows], _sizes(examples, rows)
    if sizes.max(initial=0) > length:
        raise ValueError(f"an example of {sizes.max()} tokens does not fit {length}; drop or truncate it when it is loaded")
    places = np.arange(length, dtype=np.int32)
    inside, followed = places < sizes[:, None], places < sizes[:, None] - 1
    tokens = np.zeros((rows.size, length), np.int32)
    targets, weights = tokens.copy(), np.zeros(tokens.shape, np.float32)
    at = (start[:, None] + places)[inside]
    tokens[inside] = examples.tokens.flat[at]
    at = (start[:, None] + places)[followed] + 1
    targets[followed] = examples.tokens.flat[at]
    weights[followed] = examples.answers.flat[at]
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": np.where(inside, places, 0).astype(np.int32),
        "segments": inside.astype(np.int32),
        "weights": weights,
        "ids": np.where(rows == PADDING, PADDING, examples.ids[rows]).astype(np.int32),
    }


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


def step_batch(examples: Examples, rows: np.ndarray, *, microbatch: int, lengths: Sequence[int]) -> Batch:
    """Return one optimizer step of one member, cut into A = B / microbatch accumulation steps.

    It is a function of this member's own rows alone, so that a member in a population takes the steps it takes alone. With more than
    one length the rows are sorted by length (stable, padding rows first), so that short examples share a microbatch: the sum over the
    step does not depend on how it is divided.

    Args:
        examples: tokenized examples.
        rows: int[B], -1 on padding.
        microbatch: b, a divisor of B.
        lengths: padded lengths, ascending, as `bucket_lengths` gives them.

    Returns:
        the arrays of `collate` as [A, b, T] and `ids` [A, b], all padded to T = lengths[-1], and `bucket` int32[A]: the index of the
        smallest length that holds the microbatch.

    Raises:
        ValueError: the microbatch does not divide the rows.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> two = Examples(Ragged.of([[5] * 9, [8, 9]], np.int32), Ragged.of([[1] * 9, [0, 1]], np.bool_), np.arange(2))
        >>> batch = step_batch(two, np.array([0, 1]), microbatch=1, lengths=(8, 16))
        >>> batch["tokens"].shape, batch["ids"].tolist(), batch["bucket"].tolist()
        ((2, 1, 16), [[1], [0]], [0, 1])
    """
    rows = np.asarray(rows)
    if rows.size % microbatch:
        raise ValueError(f"a step of {rows.size} rows is not a multiple of microbatch = {microbatch}")
    sizes = _sizes(examples, rows)
    if len(lengths) > 1:
        by_length = np.argsort(sizes, kind="stable")
        rows, sizes = rows[by_length], sizes[by_length]
    flat = collate(examples, rows, lengths[-1])
    batch = {name: array.reshape(-1, microbatch, *array.shape[1:]) for name, array in flat.items()}
    batch["bucket"] = np.searchsorted(lengths, sizes.reshape(-1, microbatch).max(1)).astype(np.int32)
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
        >>> three = Examples(Ragged.of([[5], [5] * 9, [8, 9]], np.int32), Ragged.of([[1], [1] * 9, [0, 1]], np.bool_), np.arange(3))
        >>> [(b["tokens"].shape, b["ids"].tolist()) for b in length_batches(three, 2, (8, 16))]
        [((2, 16), [1, 2]), ((2, 8), [0, -1])]
    """
    sizes = examples.lengths
    by_length = np.argsort(-sizes, kind="stable")
    for start in range(0, len(examples), batch):
        rows = by_length[start : start + batch]
        length = lengths[int(np.searchsorted(lengths, sizes[rows[0]]))]
        yield collate(examples, np.pad(rows, (0, batch - rows.size), constant_values=PADDING), length)


def _sizes(examples: Examples, rows: np.ndarray) -> np.ndarray:
    # from the offsets of these rows alone: a step must not cost a pass over all examples
    offsets = examples.tokens.offsets
    return np.where(rows == PADDING, 0, offsets[rows + 1] - offsets[rows])
