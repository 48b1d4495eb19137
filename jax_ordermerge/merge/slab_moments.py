"""Diagnostics of a slab while it is in memory: moments of the first elements of all models."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from jax_ordermerge.merge import diagnostics
from jax_ordermerge.merge.methods import parts, reductions, table

# Diagnostics of slabs with more elements than this look at their first sixteenth only: of 8 members
# there are 45 inner products, which is more arithmetic per element than in the merge.
SAMPLED_ABOVE, SAMPLED_SHARE = 1 << 18, 16
_PIECE = 1 << 16  # elements that one call looks at: the sample of a slab of 2^20 elements


def sample_size(size: int) -> int:
    """Return how many elements of a slab are looked at.

    Example:
        >>> sample_size(1 << 18), sample_size(1 << 20)
        (262144, 65536)
    """
    return size if size <= SAMPLED_ABOVE else size // SAMPLED_SHARE


def measure(
    part: parts.Part,
    base: np.ndarray,
    merged: np.ndarray,
    arrays: dict[str, np.ndarray],
    start: int,
    *,
    method: str,
    static: table.Static,
    out: np.dtype,
) -> diagnostics.Moments:
    """Return the `diagnostics.total` moments of the first elements of a slab.

    Args:
        part: the slab of all models.
        base: [n], the first elements of the base: those to look at.
        merged: the merged slab.
        arrays: what the method's `prepare` returned.
        start: number of the first element in the tensor.
        method, static, out: see `table.merge_part`.
    """
    count_redrawn = table.METHODS[method].count_redrawn(dict(static))
    # Rows of at most 256 elements: float32 sums of rows are exact enough, float64 adds up the rows.
    width = math.gcd(base.size, reductions.BLOCK)
    # In pieces of one size, so that one program serves slabs of all sizes: it takes as long to
    # compile as the merge itself. Rows that are only filled up with zeros are cut off again.
    piece = _PIECE if width == reductions.BLOCK else base.size
    flat = [np.asarray(x).reshape(-1)[: base.size] for x in (*part.members, merged)]
    measured = list[diagnostics.Moments]()
    for first in range(0, base.size, piece):
        *members, merged_piece, base_piece = [_padded(x, first, piece) for x in (*flat, base)]
        number = start + first
        offset = np.array([number & 0xFFFFFFFF, number >> 32], np.uint32)
        moments = jax.device_get(
            _measure_sample(
                parts.Part(tuple(members), base_piece, part.key_bits, offset),
                merged_piece,
                None if count_redrawn is None else arrays["weights"],
                width=width,
                out=out,
                count_redrawn=count_redrawn,
                static=static if count_redrawn is not None else (),
            )
        )
        rows = min(piece, base.size - first) // width
        measured.append(
            diagnostics.Moments(
                moments.products[:, :rows], moments.unchanged[:, :rows], moments.redrawn
            )
        )
    products, unchanged, redrawn = zip(*measured, strict=True)
    return diagnostics.total(
        diagnostics.Moments(
            np.concatenate(products, axis=1),
            np.concatenate(unchanged, axis=1),
            np.sum(redrawn, axis=0),
        )
    )


def _padded(x: np.ndarray, first: int, size: int) -> np.ndarray:
    """Return `x[first : first + size]`, filled up with zeros."""
    piece = x[first : first + size]
    missing = size - piece.size
    return np.concatenate([piece, np.zeros(missing, x.dtype)]) if missing else piece


@functools.partial(jax.jit, static_argnames=("width", "out", "count_redrawn", "static"))
def _measure_sample(
    part: parts.Part,
    merged: jax.Array,
    weights: jax.Array | None,
    *,
    width: int,
    out: np.dtype,
    count_redrawn: Callable[..., jax.Array] | None,
    static: table.Static,
) -> diagnostics.Moments:
    """Return the moments of rows of elements, and how many elements a selection drew again.

    Args:
        part: a run of elements [n] of all models.
        merged: [n], the result.
        weights: of a selection.
        width: elements per row.
        out: dtype of the result.
        count_redrawn: see `table.Method`.
        static: what it takes.
    """
    rows = [x.reshape(-1, width) for x in (*part.members, part.base, merged)]
    # compared in the dtype of the output: the merged model is at the base if the files are equal
    *member_rows, base_rows, merged_rows = [parts.round_to(x, out) for x in rows]
    moments = diagnostics.moments(member_rows, base_rows, merged_rows)
    if count_redrawn is None:
        return moments
    # the elements keep their offset, so they draw the same numbers again
    return moments._replace(redrawn=count_redrawn(part, weights, **dict(static)))
