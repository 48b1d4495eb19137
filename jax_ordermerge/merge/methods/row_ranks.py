"""Ranks of the elements within the rows of a matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

_CHUNK = 1 << 15  # elements that the host ranks at a time: what fits into a core's cache


def row_ranks(values: jax.Array) -> jax.Array:
    """Return the rank of every element within its row, 0 for the smallest.

    Of equal elements, the one in the lower column comes first. Zeros have the rank 0: most of a
    task vector is zero, and a zero is the same whether it is kept or dropped.

    Args:
        values: uint32[*s]. A row is what one index of the first axis holds. A vector is one row.

    Returns:
        uint32[*s].

    Example:
        >>> row_ranks(jnp.array([[3, 1, 2, 1], [0, 5, 0, 4]], jnp.uint32)).tolist()
        [[3, 0, 2, 1], [0, 3, 0, 2]]
    """
    rows = values.reshape(values.shape[0] if values.ndim > 1 else 1, -1)
    # On CPU numpy needs 5 ns per element where 60 % are zero, and jnp.argsort 140.
    ranks = jax.lax.platform_dependent(rows, cpu=_rank_on_host, default=_rank_on_device)
    return ranks.reshape(values.shape)


def _rank_on_device(rows: jax.Array) -> jax.Array:
    # ranks are the inverse of the sorting permutation; only the first sort can see equal values
    ranks = jnp.argsort(jnp.argsort(rows, axis=-1, stable=True), axis=-1).astype(jnp.uint32)
    return jnp.where(rows == 0, 0, ranks)


def _rank_on_host(rows: jax.Array) -> jax.Array:
    # why not jax.pure_callback: it computes on one device of a mesh and waits there for the
    # collectives of the others, forever
    result = jax.ShapeDtypeStruct(rows.shape, jnp.uint32)
    return buffer_callback(_write_ranks, result, vmap_method="expand_dims")(rows)


def _write_ranks(_: Any, out: Any, rows: Any) -> None:
    values, ranks = np.asarray(rows), np.asarray(out)
    width = values.shape[-1]
    values, ranks = values.reshape(-1, width), ranks.reshape(-1, width)
    step = max(1, _CHUNK // max(width, 1))
    for start in range(0, len(values), step):
        chunk = slice(start, start + step)
        _rank_rows(values[chunk].astype(np.uint32, copy=False), ranks[chunk])


def _rank_rows(values: np.ndarray, ranks: np.ndarray) -> None:
    """Write the ranks of some rows.

    Each nonzero element becomes one integer, its value followed by its column. These are distinct,
    so that any sort will do, and numpy sorts plain integers with the vector units of the processor.
    """
    count, width = values.shape
    ranks[...] = 0
    flat, starts = values.reshape(-1), np.arange(count) * width
    positions = np.flatnonzero(values != 0)
    if not positions.size:
        return
    ends = np.searchsorted(positions, starts + width)
    nonzeros = np.diff(ends, prepend=0)
    keys, column_bits = _sorting_keys(flat[positions], positions, width)
    first = 0
    for end in ends.tolist():
        keys[first:end].sort()
        first = end
    # what was sorted is still row by row: only the columns have changed within the rows
    columns = (keys & keys.dtype.type((1 << column_bits) - 1)).astype(np.int64)
    positions = columns + np.repeat(starts, nonzeros)
    # The nonzero elements of a row follow its zeros. In uint32, which may wrap around on the way:
    # an assignment that also casts takes twice as long.
    first_ranks = (width - ends).astype(np.uint32)
    ascending = np.arange(positions.size, dtype=np.uint32)
    ranks.reshape(-1)[positions] = ascending + np.repeat(first_ranks, nonzeros)


def _sorting_keys(values: np.ndarray, positions: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """Return integers in the order of (value, column), and how many of their bits are the column.

    Args:
        values: uint32[n], not zero.
        positions: int64[n], their row-major numbers in rows of `width` elements.
        width: elements per row.
    """
    column_bits = (width - 1).bit_length()
    # Values that come from bfloat16 end in zeros and are of similar size. Without these bits value
    # and column mostly fit into 32, which are sorted twice as fast as 64.
    union = int(np.bitwise_or.reduce(values))
    shift = (union & -union).bit_length() - 1
    least, greatest = int(values.min()) >> shift, int(values.max()) >> shift
    is_narrow = (greatest - least).bit_length() + column_bits <= 32
    dtype = np.uint32 if is_narrow else np.uint64
    columns = positions & (width - 1) if width == 1 << column_bits else positions % width
    codes = (values >> np.uint32(shift)) - np.uint32(least)
    keys = np.left_shift(codes.astype(dtype), column_bits) | columns.astype(dtype)
    return keys, column_bits
