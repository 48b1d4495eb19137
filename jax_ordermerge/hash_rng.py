"""The random number of an element: a counter-based hash of (key, index, round).

There is no generator state. The number of an element does not depend on the mesh, on slabs, on the
order in which tensors are visited, or on what else is in the program. Why not `jax.random.bits`: it
numbers the elements of the array that it makes, so a slab would not draw what the tensor draws.
Specification, test vectors and statistics: docs/random_choice.md.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Uint32 = TypeVar("Uint32", jax.Array, np.ndarray)
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio; odd, so its multiples visit every uint32 once


class Index(NamedTuple):
    """Row-major numbers of elements as two uint32 arrays: index = hi * 2^32 + lo.

    Two halves, since jax has no 64-bit integers by default.
    """

    lo: jax.Array
    hi: jax.Array


def mix(x: Uint32) -> Uint32:
    """Return lowbias32(x), a bijection of uint32 with low avalanche bias (0.174).

    Args:
        x: uint32, any shape. An array of numpy stays one.

    Example:
        >>> [f"{int(mix(jnp.uint32(x))):08x}" for x in (0, 1, 0xFFFFFFFF)]
        ['00000000', '688990c0', '6768824a']

    Source: C. Wellons, "Prospecting for Hash Functions" (2018),
    https://nullprogram.com/blog/2018/07/31/, function lowbias32.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def random_bits(key_bits: jax.Array, index: Index, round_: int | jax.Array = 0) -> jax.Array:
    """Return one uint32 per index: h = L(L(lo ^ a) ^ b ^ hi), with L = lowbias32.

    The key schedule is a = L(k0 + GOLDEN * round) and b = L(k1 ^ a). Another round is thus another
    key. The schedule is scalar, so it costs nothing per element.

    Args:
        key_bits: uint32[2], the key (k0, k1).
        index: the element numbers, any shape.
        round_: number of the draw (resampling) or of the member (dropping), not negative.

    Returns:
        uint32 of the shape of `index`.

    Example:
        >>> index = Index(jnp.arange(2, dtype=jnp.uint32), jnp.zeros(2, jnp.uint32))
        >>> [f"{h:08x}" for h in random_bits(jnp.array([1, 2], jnp.uint32), index).tolist()]
        ['03a7b1ba', 'c0a12a8a']
    """
    a = mix(key_bits[0] + jnp.uint32(GOLDEN) * jnp.asarray(round_).astype(jnp.uint32))
    b = mix(key_bits[1] ^ a)
    # why twice: with one L two keys would draw the same numbers in another order, index ^ a ^ a'
    return mix(mix(index.lo ^ a) ^ (index.hi ^ b))


def element_index(shape: Sequence[int], offset: jax.Array | None = None) -> Index:
    """Return the row-major index of every element of an array.

    Args:
        shape: the shape of the tensor, or of a slab of it.
        offset: uint32[2] = (lo, hi), the index of the slab's first element. None is 0.

    Returns:
        Two arrays uint32 of shape `shape`.

    Example:
        >>> index = element_index((2, 2), jnp.array([0xFFFFFFFE, 0], jnp.uint32))
        >>> index.lo.tolist(), index.hi.tolist()
        ([[4294967294, 4294967295], [0, 1]], [[0, 0], [1, 1]])
    """
    shape = tuple(shape)
    ones = (1,) * len(shape)
    first = np.zeros(2, np.uint32) if offset is None else offset
    index = Index(jnp.reshape(first[0], ones), jnp.reshape(first[1], ones))
    # one iota per dimension: it follows any sharding of the array, and each is below 2^32 where
    # their weighted sum is not
    for axis, extent in enumerate(shape):
        iota_shape = (*ones[:axis], extent, *ones[axis + 1 :])
        position = jax.lax.broadcasted_iota(jnp.uint32, iota_shape, axis)
        index = _add(index, _times(position, math.prod(shape[axis + 1 :])))
    return index


def round_stochastically(x: jax.Array, random: jax.Array) -> jax.Array:
    """Round float32 to one of the two nearest bfloat16, such that the expectation is x.

    The probability to round up is the fraction that is cut off, in steps of 2^-16.

    Args:
        x: float32[*s]. NaN and infinities stay what they are.
        random: uint32[*s].

    Example:
        >>> x = jnp.full(10000, 1 + 2.0**-9)
        >>> up = round_stochastically(x, jax.random.bits(jax.random.key(0), x.shape)) > 1
        >>> 0.22 < float(up.mean()) < 0.28
        True
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # a carry out of the mantissa goes into the exponent, which is what rounding up means there
    upper_half = (bits + (random >> 16)) >> 16
    rounded = jax.lax.bitcast_convert_type(upper_half.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _add(x: Index, y: Index) -> Index:
    lo = x.lo + y.lo
    carry = (lo < x.lo).astype(jnp.uint32)
    return Index(lo, x.hi + y.hi + carry)


def _times(x: jax.Array, stride: int) -> Index:
    """Return x * stride in 64 bits, for uint32 x and a stride below 2^48."""
    if stride == 1:
        return Index(x, jnp.zeros_like(x))
    # limbs of 16 bits, whose products fit into uint32
    x0, x1 = x & 0xFFFF, x >> 16
    s0, s1, s2 = (jnp.uint32(stride >> shift & 0xFFFF) for shift in (0, 16, 32))
    middle = (x0 * s0 >> 16) + (x0 * s1 & 0xFFFF) + (x1 * s0 & 0xFFFF)
    lo = (x0 * s0 & 0xFFFF) | (middle << 16)
    hi = (middle >> 16) + (x0 * s1 >> 16) + (x1 * s0 >> 16) + x1 * s1 + x * s2
    return Index(lo, hi)
