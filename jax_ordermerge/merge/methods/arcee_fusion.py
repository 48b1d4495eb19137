"""Importance fusion: take only the important changes of one model.

Source: Arcee's method in mergekit, `arcee_fusion`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.merge.methods.parameters import Finite
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import sum_along
from jax_ordermerge.merge.methods.table import METHODS, Method
from jax_ordermerge.merge.methods.top_k import order_statistics

LARGEST = float(np.finfo(np.float32).max)


def prepare(tensor: Tensor, *, spread: Finite = 1.5) -> Prepared:
    """Importance fusion: theta_j is the member's where I_j >= median + spread (Q3 - Q1) of I.

    Elsewhere it is the base's. I_j = |tau_j| KL_r with KL_r = sum_c p_c log(p_c / q_c) in the row r
    of j, where p and q are the softmax of the row in the member and in the base. The quantile at a
    fraction f is the element at position floor(f (n - 1)) of the sorted tensor: exact, where
    mergekit samples a million elements without a seed.

    Args:
        tensor: of one member. Takes no weights.
        spread: how many interquartile ranges above the median an element is important.
    """
    width = math.prod(tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape)
    sums = _as_float(tensor.total(_softmax_sums, width=width, reduce="join")).astype(np.float64)
    # log sum exp of the member minus that of the base, in each row. In float64: where a member
    # differs little the quotient is near 1, and float32 would lose most digits of its logarithm.
    shift = np.float32(sums[0] - sums[2] + np.log(sums[1] / sums[3]))
    base = np.float32(sums[2:])
    divergence = _as_float(tensor.total(_divergences, shift, base, width=width, reduce="join"))
    # three order statistics, found in the same counting passes
    last = math.prod(tensor.shape) - 1
    positions = [int(f * last) for f in (0.5, 0.25, 0.75)]
    quartiles = order_statistics(tensor, positions, _importance_bits, divergence)
    median, first, third = quartiles.view(np.float32).astype(np.float64)
    # in float64: spread times the range may leave float32
    threshold = np.clip(median + spread * (third - first), -LARGEST, LARGEST)
    return {"divergence": divergence, "threshold": np.float32(threshold)}


def apply(part: Part, *, divergence: jax.Array, threshold: jax.Array) -> jax.Array:
    """Take the important elements from the member, and the others from the base."""
    important = _importance(part, divergence) >= threshold
    return jnp.where(important, part.floats()[0], part.base_float())


def _as_float(bits: np.ndarray) -> np.ndarray:
    # values per row are joined as integers, since floating-point results of `total` are summed
    return bits.astype(np.uint32).view(np.float32)


def _importance(part: Part, divergence: jax.Array) -> jax.Array:
    (tau,) = part.task_vectors()
    rows = tau.shape[0] if tau.ndim > 1 else 1
    first = jnp.uint32(0) if part.row is None else part.row
    # the KL of all rows of the tensor comes in; this part has some of them
    divergence = jax.lax.dynamic_slice(divergence, (first,), (rows,))
    importance = jnp.abs(tau).reshape(rows, -1) * divergence[:, None]
    # no infinity: its bits would be a quantile, and spread times it not a number
    return jnp.minimum(importance, LARGEST).reshape(tau.shape)


def _importance_bits(part: Part, divergence: jax.Array) -> list[jax.Array]:
    return [jax.lax.bitcast_convert_type(_importance(part, divergence), jnp.uint32)]


def _as_rows(x: jax.Array, width: int) -> jax.Array:
    rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)
    assert rows.shape[1] == width, "the part does not consist of complete rows"
    return rows


def _softmax_sums(part: Part, *, width: int) -> jax.Array:
    """Return the bits of max and sum exp(x - max) per row, uint32[4, rows]: member, then base."""
    results = []
    for x in (part.floats()[0], part.base_float()):
        rows = _as_rows(x, width)
        # exp of anything above 88.7 is infinite in float32, so the maximum of the row is subtracted
        top = rows.max(axis=1)
        results += [top, sum_along(_exp(rows - top[:, None]), 1)[:, 0]]
    return jax.lax.bitcast_convert_type(jnp.stack(results), jnp.uint32)


def _divergences(part: Part, shift: jax.Array, base: jax.Array, *, width: int) -> jax.Array:
    """Return the bits of KL of each row, uint32[rows].

    KL is computed as sum_c q_c (x_c log x_c - x_c + 1) with x = p / q. Its terms are never negative
    and do not cancel. mergekit adds 1e-8 to p and q instead, and measures the rounding of float32
    where a member differs little.

    Args:
        part: complete rows.
        shift: float32[height], log sum exp of the member minus that of the base.
        base: float32[2, height], max and sum exp(x - max) of the base.
        width: of a row.
    """
    base_rows, tau = _as_rows(part.base_float(), width), _as_rows(part.task_vectors()[0], width)
    start = jnp.uint32(0) if part.row is None else part.row
    per_row = jnp.stack([shift, base[0], base[1]])
    here = jax.lax.dynamic_slice(per_row, (jnp.zeros_like(start), start), (3, len(tau)))
    shift_here, top, total = here[:, :, None]
    log = jnp.maximum(tau - shift_here, -87.0)  # log(p / q), no smaller than `_exp` takes
    # x log x - x + 1 with x = exp(log): near 0 by its series, where the terms would cancel. The
    # series is sum_k (k-1) log^k / k! from k = 2. The first term left out, 7 log^8 / 8!, is at most
    # 1e-7 of the sum where |log| < 0.25: one unit of float32.
    series = (
        log
        * log
        * (1 / 2 + log * (1 / 3 + log * (1 / 8 + log * (1 / 30 + log * (1 / 144 + log / 840)))))
    )
    terms = jnp.where(jnp.abs(log) < 0.25, series, _exp(log) * (log - 1) + 1)
    divergence = sum_along(_exp(base_rows - top) * terms, 1)[:, 0] / total[:, 0]
    return jax.lax.bitcast_convert_type(divergence, jnp.uint32)


def _exp(x: jax.Array) -> jax.Array:
    """Return exp(x) to 2 units in the last place, from multiplications and additions alone.

    Source: the polynomial of S. Moshier's Cephes library, function expf.
    """
    # why not jnp.exp: on CPU its last bits differ in the last elements of an array, where they no
    # longer fill a vector register; a part would not have the bits that the tensor has
    x = jnp.clip(x, -87.0, 88.0)
    k = jnp.floor(x * 1.44269504 + 0.5)
    # ln 2 in two parts: the first has 9 bits, so k times it is exact and the subtraction loses
    # nothing
    r = x - k * 0.693359375 - k * -2.12194440e-4
    y = jnp.float32(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + c
    # 2^k by its exponent bits: the clip above keeps k + 127 within 1 .. 254
    scale = jax.lax.bitcast_convert_type((k.astype(jnp.int32) + 127) << 23, jnp.float32)
    return (y * r * r + r + 1) * scale


METHODS.register(
    "arcee_fusion",
    Method(
        prepare,
        apply,
        "mergekit",
        weights="none",
        members=(1, 1),
        unit=lambda parameters: "row",
    ),
)
