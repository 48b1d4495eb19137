"""Sums and counts that have the same bits for any slab of a file and on any mesh.

Floating-point addition is not associative. The kernels here therefore fix the order of additions:
within blocks of 256 consecutive elements on the device, and from block to block in float64 on the
host (see `parts.Sums`).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

BLOCK = 256  # elements of one floating-point partial sum
_LANES = 32  # partial sums that are added up side by side, so that the inner loop is vectorized


def rounded(x: jax.Array) -> jax.Array:
    """Return x, an array of products, such that no later addition is fused with the product.

    XLA computes x y + z with one rounding (a fused multiply-add) where both operations end up in
    one fusion. Which operations do depends on the shape and on the mesh, and so does the last bit.

    Example:
        >>> rounded(jnp.array([0.1, jnp.inf, jnp.nan])).tolist()
        [0.10000000149011612, inf, nan]
    """
    # Why not `optimization_barrier` or a no-op `reduce_precision`: XLA removes both before fusion.
    # A select that XLA cannot prove to be the identity stays between product and addition.
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def block_sums(x: jax.Array) -> jax.Array:
    """Sum runs of 256 consecutive elements in a fixed order, down to 32 partial sums per run.

    `fold` adds up the 32. The two steps are separate programs: XLA would compile both together
    into one slow expression.

    Args:
        x: float32[*s]. The last run is padded with zeros.

    Returns:
        float32[ceil(n / 256), 32].

    Example:
        >>> fold(block_sums(jnp.ones(600))).tolist()
        [256.0, 256.0, 88.0]
    """
    if x.size == 0:
        return jnp.zeros((0, _LANES), jnp.float32)
    x = rounded(x)
    # Flattened only where blocks would cross rows: splitting the last axis alone leaves the
    # sharding of the other axes as it is. The blocks are the same either way.
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        x = jnp.pad(x.ravel(), (0, -x.size % BLOCK))
    x = x.reshape(*x.shape[:-1], -1, BLOCK // _LANES, _LANES)
    # a tree of additions that the program spells out; the order within `jnp.sum` is XLA's choice
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = x[..., :half, :] + x[..., half:, :]
    return x.reshape(-1, _LANES)


def fold(x: jax.Array) -> jax.Array:
    """Add up the last axis, whose length is a power of two, in a fixed order.

    Example:
        >>> fold(jnp.arange(4.0)).item()
        6.0
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def sum_along(x: jax.Array, axis: int) -> jax.Array:
    """Sum along one axis in a fixed order of additions. The axis stays, with length 1.

    Args:
        x: float32[*s], of at least 2 axes.
        axis: the axis to sum.

    Example:
        >>> sum_along(jnp.ones((2, 600)), 1).tolist()
        [[600.0], [600.0]]
    """
    x = jnp.moveaxis(x, axis, -1)
    unpadded = [(0, 0)] * (x.ndim - 1)
    # every row starts a new block, so that the sum of a row does not depend on its neighbours
    x = jnp.pad(x, [*unpadded, (0, -x.shape[-1] % BLOCK)])
    sums = fold(block_sums(x)).reshape(*x.shape[:-1], -1)
    # as in `block_sums`; an odd block is paired with zero, which changes no bit of a sum but -0.0
    while sums.shape[-1] > 1:
        half = -(-sums.shape[-1] // 2)
        right = jnp.pad(sums[..., half:], [*unpadded, (0, 2 * half - sums.shape[-1])])
        sums = sums[..., :half] + right
    return jnp.moveaxis(sums, -1, axis)


def count_true(flags: Sequence[jax.Array], axes: Sequence[int] | None = None) -> jax.Array:
    """Count the true elements of each array, in one pass over memory.

    Args:
        flags: K arrays bool[*s] of fewer than 2^32 elements.
        axes: the axes to count along, all by default.

    Returns:
        uint32[K], or uint32[K, *remaining axes].

    Example:
        >>> count_true([jnp.array([True, False]), jnp.array([True, True])]).tolist()
        [1, 2]
    """
    # integers: any order of additions, on any mesh, gives the same count
    return jnp.stack(sum_each([flag.astype(jnp.uint32) for flag in flags], axes))


def sum_each(terms: Sequence[jax.Array], axes: Sequence[int] | None = None) -> Sequence[jax.Array]:
    """Sum each of K arrays, in one pass over memory. XLA chooses the order of additions.

    Args:
        terms: K arrays [*s] of one dtype.
        axes: the axes to sum along, all by default.

    Example:
        >>> [x.item() for x in sum_each([jnp.arange(3), jnp.ones(3, jnp.int32)])]
        [3, 3]
    """
    # one variadic reduce: K separate sums would each read the models again
    zeros = tuple(jnp.zeros((), x.dtype) for x in terms)
    axes = tuple(range(terms[0].ndim)) if axes is None else tuple(axes)
    return jax.lax.reduce(tuple(terms), zeros, functools.partial(jax.tree.map, jnp.add), axes)
