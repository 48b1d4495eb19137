"""Order within a tensor: the k largest values, order statistics, ranks within rows. Ties are broken in a defined way everywhere."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from jax_ordermerge.merge.counter import random_words
from jax_ordermerge.merge.parts import Part, Tensor, counts, cut_of_largest

Known = dict[str, Any]
Values = Callable[..., Sequence[jax.Array]]


def magnitudes(p: Part) -> list[jax.Array]:
    """Return the bits of |tau_i| as uint32, M arrays: integer order is the order of the magnitudes, NaN the largest."""
    return [jax.lax.bitcast_convert_type(jnp.abs(tau), jnp.uint32) for tau in p.taus()]


def tie_ranks(p: Part) -> jax.Array:
    """Return the rank of every element among those of equal value, uint32, largest first.

    It is the complement of the hash of the row-major index under the key (0, 0) (docs/random_choice.md): defined, the same
    everywhere, and favouring no part of the tensor. In bf16 ties at a cut are many.
    """
    return ~random_words(jnp.zeros(2, jnp.uint32), p.indices())


def largest(tensor: Tensor, keep: np.ndarray, values: Values, *arrays: Any) -> dict[str, np.ndarray]:
    """Find the `keep_i` largest values of each kind i, ties broken by `tie_ranks`; `is_largest` then tells which they are.

    Args:
        tensor: of n elements.
        keep: int[K], from 0 to n.
        values: a function of a module, `values(part, *arrays)` -> K arrays uint32.

    Returns:
        cut uint32[K], rank uint32[K], and ties, bool[K]: whether some of those equal to the cut are kept (those of at least that rank).
    """
    keep = np.asarray(keep, np.int64)
    size = math.prod(tensor.shape)
    cut, above = cut_of_largest(tensor, np.clip(keep, 1, size), values, *arrays)
    ties, nothing, everything = keep > above, keep <= 0, keep >= size
    rank = np.zeros(len(keep), np.int64)
    if (ties & ~everything).any():
        last, over = cut_of_largest(tensor, np.maximum(keep - above, 1), _ranks_at, cut, *arrays, spread="even", of=values)
        # `over` ranks are greater than the last; if they are too few, the one equal to it is kept too
        rank = last.astype(np.int64) + (over >= keep - above)
    cut = np.where(nothing, 0xFFFFFFFF, np.where(everything, 0, cut)).astype(np.uint32)
    return {
        "cut": cut,
        "rank": np.where(everything, 0, np.minimum(rank, 0xFFFFFFFF)).astype(np.uint32),
        "ties": (ties | everything) & ~nothing,
    }


def _ranks_at(p: Part, cut: jax.Array, *arrays: Any, of: Values) -> list[jax.Array]:
    rank = tie_ranks(p)
    return [jnp.where(x == cut[i], rank, 0) for i, x in enumerate(of(p, *arrays))]


def is_largest(value: jax.Array, rank: jax.Array, known: Known, i: int) -> jax.Array:
    """Return bool[*s]: whether a value of kind i is among the largest that `largest` found; `rank` is `tie_ranks` of the part."""
    return (value > known["cut"][i]) | ((value == known["cut"][i]) & known["ties"][i] & (rank >= known["rank"][i]))


def order_statistics(tensor: Tensor, positions: Sequence[int], values: Callable[..., jax.Array], *arrays: Any) -> np.ndarray:
    """Return the values at some positions of the sorted tensor, exactly, by counting: 11 passes.

    Args:
        tensor: of n elements.
        positions: K numbers from 0 (the smallest) to n - 1.
        values: a function of a module, `values(part, *arrays)` -> uint32[*s].

    Returns:
        uint32[K].
    """
    size = math.prod(tensor.shape)
    at_least = size - np.asarray(positions, np.int64)  # so many are at or above the value
    low, width = np.zeros(len(at_least), np.int64), 1 << 32
    while width > 1:
        step = max(1, width // 8)
        cuts = low[:, None] + np.arange(step, width, step)
        reached = tensor.total(_at_or_above, cuts.ravel().astype(np.uint32), *arrays, values=values).reshape(cuts.shape)
        low, width = low + step * (reached >= at_least[:, None]).sum(axis=1), step
    return low.astype(np.uint32)


def _at_or_above(p: Part, cuts: jax.Array, *arrays: Any, values: Callable[..., jax.Array]) -> jax.Array:
    found = values(p, *arrays)
    return counts([found >= cuts[i] for i in range(cuts.shape[0])])


def row_ranks(values: jax.Array) -> jax.Array:
    """Return the rank of every element within its row, 0 for the smallest; of equal ones, that in the lower column comes first.

    On CPU by numpy, two radix sorts of 16 bits a row: 13 ns an element. There jnp.argsort takes 140, and a sort of (value, column)
    packed into 64 bits 10 or 20, whichever SIMD instructions numpy chooses.

    Args:
        values: uint32[*s]; a row is what one index of the first axis holds. A vector is one row.

    Returns:
        uint32[*s].

    Example:
        >>> row_ranks(jnp.array([[3, 1, 2, 1]], jnp.uint32)).tolist()
        [[3, 0, 2, 1]]
    """
    rows = values.reshape(values.shape[0] if values.ndim > 1 else 1, -1)
    return jax.lax.platform_dependent(rows, cpu=_row_ranks_on_host, default=_row_ranks_on_device).reshape(values.shape)


def _row_ranks_on_device(rows: jax.Array) -> jax.Array:
    return jnp.argsort(jnp.argsort(rows, axis=-1, stable=True), axis=-1).astype(jnp.uint32)


def _row_ranks_on_host(rows: jax.Array) -> jax.Array:
    # why not jax.pure_callback: it computes on one device of a mesh and waits there for the collectives of the others, forever
    result = jax.ShapeDtypeStruct(rows.shape, jnp.uint32)
    return buffer_callback(_write_row_ranks, result, vmap_method="expand_dims")(rows)


def _write_row_ranks(_: Any, out: Any, rows: Any) -> None:
    values, ranks = np.asarray(rows), np.asarray(out)
    width = values.shape[-1]
    values, ranks = values.reshape(-1, width), ranks.reshape(-1)
    step = max(1, (1 << 16) // max(width, 1))  # rows at a time: what fits into a core's cache
    for start in range(0, len(values), step):
        halves = values[start : start + step].astype("<u4").view("<u2")
        first = np.arange(len(halves))[:, None] * width
        by_low = first + np.argsort(halves[:, ::2], axis=1, kind="stable")
        high = np.take(halves[:, 1::2].ravel(), by_low, mode="clip")
        by_both = first + np.argsort(high, axis=1, kind="stable")
        order = np.take(by_low.ravel(), by_both.ravel(), mode="clip")
        ranks[start * width : (start + len(halves)) * width][order] = np.tile(np.arange(width, dtype=np.uint32), len(halves))
