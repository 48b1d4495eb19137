"""Methods that take each element of a task vector or leave it, by what the members did there: SCE, RAM, consensus, fusion, and the like.

Notation: theta_0 the base, theta_i the M members, tau_i = theta_i - theta_0, j an element.
"""

import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods.average import Scale, combine, equal_weights
from jax_ordermerge.merge.methods.parts import (
    BLOCK,
    Part,
    Tensor,
    block_sums,
    counts,
    fold,
    rounded,
)
from jax_ordermerge.merge.methods.sparsify import Count, Density, Known, each_member
from jax_ordermerge.merge.methods.top_k import is_largest, largest, order_statistics, places

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Thresholds = NotNegative | list[NotNegative]
Scales = Scale | list[Scale]
LARGEST = float(np.finfo(np.float32).max)


def _refuse_weights(name: str, tensor: Tensor) -> None:
    if tensor.weights is not None:
        raise UserError(
            f"merge method {name} takes no weights, {tensor.weights.tolist()} were given; leave them out"
        )


# ----------------------------------------------------------------------------------------------------------------------------- SCE


def sce(
    tensor: Tensor, *, select_topk: Density = 1.0, at_least: Count = 1, floor: NotNegative = 0.0
) -> Known:
    """SCE: theta = theta_0 + sum_{i in A} eta_i s tau_i / sum_{i in A} eta_i; s selects, A erases.

    s_j is 1 for the elements of largest variance over the members, A are the members whose s tau_i has the sign of sum_i s tau_i,
    and eta_i = mean_j (s_j tau_ij)^2 / sum of these means: the weight of a member is the energy of its task vector.

    Args:
        tensor: of M members. Takes no weights.
        select_topk: fraction of the elements with a variance above 0 that is selected; 1 selects all elements.
        at_least: how many of them are selected at least. mergekit: 0, which leaves a tensor of few elements at the base.
        floor: where the sum of the means is below it the weights are 1/M, and no divisor is below it. mergekit has 1e-6, so that
            fine-tunes of common size, where tau^2 is 1e-8, all get the weight 1/M; by default only exact zeros do.

    Source: Wan et al., "FuseChat" (arXiv 2408.07990), select, calculate, erase; mergekit's `sce`.
    """
    _refuse_weights("sce", tensor)
    cut: Known = {}
    if select_topk < 1:
        varied = int(tensor.total(_varied))
        # in float32 as in mergekit
        keep = min(max(int(np.float32(varied) * np.float32(select_topk)), at_least), varied)
        cut = largest(tensor, np.array([keep]), _variances)
    energies = tensor.total(_energies, cut, selects=bool(cut))
    total = energies.sum()
    # a sum that overflowed says nothing of the weights either
    known_weights = 0 < total < math.inf and total >= floor * math.prod(tensor.shape)
    eta = energies / total if known_weights else np.full(tensor.count, 1 / tensor.count)
    return {"weights": np.float32(eta), "floor": np.float32(floor), "selects": bool(cut), **cut}


def sce_part(
    p: Part, *, weights: jax.Array, floor: jax.Array, selects: bool, **cut: jax.Array
) -> jax.Array:
    """Add the selected elements that agree in sign, weighted."""
    task_vectors = _selected(p, cut, selects)
    # the sign is elected by the task vectors themselves, and not by the weighted ones as in TIES
    positive = combine(task_vectors, jnp.ones(len(task_vectors), jnp.float32)) >= 0
    agree = [jnp.where(positive, tau > 0, tau < 0) for tau in task_vectors]
    total = combine(
        [jnp.where(a, tau, 0.0) for a, tau in zip(agree, task_vectors, strict=True)], weights
    )
    divisor = jnp.maximum(combine(agree, weights), floor)
    return p.base_float() + total / jnp.where(divisor == 0, 1.0, divisor)


def _selected(p: Part, cut: Known, selects: bool) -> list[jax.Array]:
    task_vectors = p.task_vectors()
    if not selects:
        return task_vectors
    chosen = is_largest(_variance(task_vectors), places(p), cut, 0)
    return [jnp.where(chosen, tau, 0.0) for tau in task_vectors]


def _variance(task_vectors: list[jax.Array]) -> jax.Array:
    """Return the bits of M times the variance over the members, uint32[*s]: 0 where all agree, and where it underflows."""
    shifted = [tau - task_vectors[0] for tau in task_vectors]
    # rounded: the cut is found by one program and used by another, which must agree to the last bit
    mean = rounded(functools.reduce(jnp.add, shifted) * jnp.float32(1 / len(task_vectors)))
    square = functools.reduce(jnp.add, [rounded((x - mean) * (x - mean)) for x in shifted])
    return jax.lax.bitcast_convert_type(square, jnp.uint32)


def _variances(p: Part) -> list[jax.Array]:
    return [_variance(p.task_vectors())]


def _varied(p: Part) -> jax.Array:
    return counts([_variance(p.task_vectors()) > 0])[0]


def _energies(p: Part, cut: Known, *, selects: bool) -> jax.Array:
    return jnp.stack([block_sums(tau * tau) for tau in _selected(p, cut, selects)])


# ----------------------------------------------------------------------------------------------------------------------------- RAM


def ram(tensor: Tensor, *, epsilon: NotNegative = 1e-5) -> Known:
    """RAM: theta = theta_0 + sum_{i in C} tau_i / |C|, C_j the members that changed element j, |tau_ij| > epsilon.

    What one member alone changed is taken whole, what several changed is averaged over these.

    Args:
        tensor: takes no weights.
        epsilon: a change up to this is none.

    Source: Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models" (arXiv 2601.13572); mergekit's `ram`.
    """
    _refuse_weights("ram", tensor)
    return {"epsilon": np.float32(epsilon), "unique": np.ones(tensor.count, np.float32)}


def ramplus_tl(
    tensor: Tensor, *, r: Scale = 0.1, alpha: NotNegative = 0.2, epsilon: NotNegative = 1e-5
) -> Known:
    """RAM+, by tensor: as `ram`, with what member i alone changed times 1 + r min(shared_i / unique_i, alpha).

    shared_i and unique_i count the elements that the member changed with others and alone.

    Args:
        tensor: takes no weights.
        r: how much the unique elements are enlarged.
        alpha: largest ratio.
        epsilon: a change up to this is none.

    Source: as `ram`, its rescaling, with ratios of each tensor; mergekit's `ramplus_tl`.
    """
    _refuse_weights("ramplus_tl", tensor)
    shared, unique = np.split(tensor.total(_shared_and_unique, np.float32(epsilon)), 2)
    return {
        "epsilon": np.float32(epsilon),
        "unique": np.float32(1 + r * np.minimum(shared / np.maximum(unique, 1), alpha)),
    }


def ram_part(p: Part, *, epsilon: jax.Array, unique: jax.Array) -> jax.Array:
    """Average the changes over those that made one; `unique` are the factors of what one alone changed."""
    task_vectors = p.task_vectors()
    changed, count = _changed(task_vectors, epsilon)
    kept = [jnp.where(c, tau, 0.0) for c, tau in zip(changed, task_vectors, strict=True)]
    ones = jnp.ones(len(task_vectors), jnp.float32)
    return p.base_float() + jnp.where(
        count > 1,
        combine(kept, ones) / jnp.maximum(count, 1).astype(jnp.float32),
        combine(kept, unique),
    )


def _changed(
    task_vectors: list[jax.Array], epsilon: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    changed = [jnp.abs(tau) > epsilon for tau in task_vectors]
    count = changed[0].astype(jnp.int32)
    for one in changed[1:]:
        count = count + one.astype(jnp.int32)
    return changed, count


def _shared_and_unique(p: Part, epsilon: jax.Array) -> jax.Array:
    changed, count = _changed(p.task_vectors(), epsilon)
    return counts([one & (count > 1) for one in changed] + [one & (count == 1) for one in changed])


# ----------------------------------------------------------------------------------------------------------------- Consensus Merging


def consensus(
    tensor: Tensor,
    *,
    threshold: Thresholds = 0.4,
    k: Annotated[int, Field(ge=1)] = 2,
    scale: Scale = 1.0,
) -> Known:
    """Consensus Merging: theta = theta_0 + scale / M c tau, tau = M sum_i w_i tau_i, c_j = 1 where at least k members use element j.

    Member i uses element j where |tau_ij| >= lambda_i |tau_j - tau_ij| (its TALL mask): its own change is no small part of the sum.

    Args:
        tensor: of at least k members; its weights are 1/M by default, and tau then is the sum of the task vectors, as in the paper.
        threshold: lambda, one for all members or one each; the paper chooses it on validation data, the default is ours.
        k: how many members must use an element. 1 drops what is used by none, 2 also what only one uses.
        scale: 1 gives the average where c is 1; the paper's coefficient of the sum is scale / M.

    Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression" (arXiv
    2405.07813): TALL-masks and Consensus Merging.
    """
    if k > tensor.count:
        raise UserError(
            f"merge method consensus: k = {k} of {tensor.count} members keeps nothing; give a k up to {tensor.count}"
        )
    return {
        "weights": np.float32(equal_weights(tensor) * tensor.count),
        "scale": np.float32(scale / tensor.count),
        "threshold": np.float32(each_member(tensor, "threshold", threshold)),
        "k": np.int32(k),
    }


def consensus_part(
    p: Part, *, weights: jax.Array, scale: jax.Array, threshold: jax.Array, k: jax.Array
) -> jax.Array:
    """Add the multi-task vector where enough members use it."""
    task_vectors = p.task_vectors()
    together = combine(task_vectors, weights)
    used = jnp.zeros(together.shape, jnp.int32)
    for i, tau in enumerate(task_vectors):
        used = used + (jnp.abs(tau) >= threshold[i] * jnp.abs(together - tau)).astype(jnp.int32)
    return p.base_float() + rounded(scale * jnp.where(used >= k, together, 0.0))


# ---------------------------------------------------------------------------------------------------------------------- one member


def nearswap(tensor: Tensor, *, t: NotNegative) -> Known:
    """Near swap: theta = theta_0 + min(1, t / |tau|) tau, so that a change is made whole up to the length t, and cut to t beyond.

    Args:
        tensor: of one member. Takes no weights.
        t: the longest change of an element.

    Source: alchemonaut's method in mergekit (`nearswap`), whose |tau| is at least 1e-6.
    """
    _refuse_weights("nearswap", tensor)
    return {"t": np.float32(t)}


def nearswap_part(p: Part, *, t: jax.Array) -> jax.Array:
    """Cut the change of each element to [-t, t]."""
    (tau,), (own,) = p.task_vectors(), p.floats()
    return jnp.where(jnp.abs(tau) <= t, own, p.base_float() + jnp.sign(tau) * t)


def passthrough(tensor: Tensor, *, scale: Scales | None = None) -> Known:
    """Take a model as it is: theta = scale theta_1.

    Args:
        tensor: of one member. Takes no weights.
        scale: a factor; None keeps every bit.

    Source: mergekit's `passthrough`.
    """
    _refuse_weights("passthrough", tensor)
    return {} if scale is None else {"scale": np.float32(each_member(tensor, "scale", scale)[0])}


def passthrough_part(p: Part, *, scale: jax.Array | None = None) -> jax.Array:
    """Return the member, multiplied if there is a factor."""
    return p.members[0] if scale is None else scale * p.floats()[0]


def arcee_fusion(tensor: Tensor, *, spread: Scale = 1.5) -> Known:
    """Importance fusion: theta_j is the member's where I_j >= median + spread (Q3 - Q1) of I, and the base's elsewhere.

    I_j = |tau_j| KL_r, KL_r = sum_c p_c log(p_c / q_c) in the row r of j, p and q the softmax of the row in the member and the base.
    Q at a fraction f is the element at position floor(f (n - 1)) of the sorted tensor: exact, where mergekit samples a million
    elements without a seed. KL is computed as sum_c q_c (x_c log x_c - x_c + 1), x = p / q, whose terms are never negative and do not
    cancel; mergekit adds 1e-8 to p and q instead, and where a member differs little finds the rounding of float32.

    Args:
        tensor: of one member. Takes no weights.
        spread: how many interquartile ranges above the median an element is important.

    Source: Arcee's method in mergekit (`arcee_fusion`).
    """
    _refuse_weights("arcee_fusion", tensor)
    width = math.prod(tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape)
    tops = _floats(tensor.total(_softmax_sums, width=width, reduce="join")).astype(np.float64)
    # log sum exp of the member minus that of the base, in each row
    shift = np.float32(tops[0] - tops[2] + np.log(tops[1] / tops[3]))
    base = np.float32(tops[2:])
    divergence = _floats(tensor.total(_divergences, shift, base, width=width, reduce="join"))
    last = math.prod(tensor.shape) - 1
    found = order_statistics(
        tensor, [int(f * last) for f in (0.5, 0.25, 0.75)], _importance_bits, divergence
    )
    median, first, third = found.view(np.float32).astype(np.float64)
    threshold = np.clip(median + spread * (third - first), -LARGEST, LARGEST)
    return {"divergence": divergence, "threshold": np.float32(threshold)}


def arcee_fusion_part(p: Part, *, divergence: jax.Array, threshold: jax.Array) -> jax.Array:
    """Take the important elements from the member, and the others from the base."""
    return jnp.where(_importance(p, divergence) >= threshold, p.floats()[0], p.base_float())


def _floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _importance(p: Part, divergence: jax.Array) -> jax.Array:
    (tau,) = p.task_vectors()
    rows = tau.shape[0] if tau.ndim > 1 else 1
    own = jax.lax.dynamic_slice(divergence, (jnp.uint32(0) if p.row is None else p.row,), (rows,))
    return jnp.minimum(jnp.abs(tau).reshape(rows, -1) * own[:, None], LARGEST).reshape(tau.shape)


def _importance_bits(p: Part, divergence: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(_importance(p, divergence), jnp.uint32)


def _whole_rows(x: jax.Array, width: int) -> jax.Array:
    rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1)
    assert rows.shape[1] == width, "the part is not made of whole rows"
    return rows


def _softmax_sums(p: Part, *, width: int) -> jax.Array:
    """Return the bits of max and sum exp(x - max) of each row in the member, then in the base, uint32[4, rows]."""
    found = []
    for x in (p.floats()[0], p.base_float()):
        rows = _whole_rows(x, width)
        top = rows.max(axis=1)
        found += [top, _row_sums(_exp(rows - top[:, None]))]
    return jax.lax.bitcast_convert_type(jnp.stack(found), jnp.uint32)


def _divergences(p: Part, shift: jax.Array, base: jax.Array, *, width: int) -> jax.Array:
    """Return the bits of KL of each row, uint32[rows], from the differences of log sum exp and the base's max and sum, float32[2, height]."""
    q, tau = _whole_rows(p.base_float(), width), _whole_rows(p.task_vectors()[0], width)
    start = jnp.uint32(0) if p.row is None else p.row
    own = jax.lax.dynamic_slice(
        jnp.stack([shift, base[0], base[1]]), (jnp.zeros_like(start), start), (3, len(tau))
    )[:, :, None]
    log = jnp.maximum(tau - own[0], -87.0)  # log(p / q)
    # x log x - x + 1 with x = exp(log), near 0 by its series
    series = (
        log
        * log
        * (1 / 2 + log * (1 / 3 + log * (1 / 8 + log * (1 / 30 + log * (1 / 144 + log / 840)))))
    )
    terms = jnp.where(jnp.abs(log) < 0.25, series, _exp(log) * (log - 1) + 1)
    return jax.lax.bitcast_convert_type(
        _row_sums(_exp(q - own[1]) * terms) / own[2, :, 0], jnp.uint32
    )


def _row_sums(x: jax.Array) -> jax.Array:
    """Sum each row in one fixed order of additions, float32[rows]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)))
    sums = fold(block_sums(x)).reshape(x.shape[0], -1)
    while sums.shape[1] > 1:
        half = -(-sums.shape[1] // 2)
        sums = sums[:, :half] + jnp.pad(sums[:, half:], ((0, 0), (0, 2 * half - sums.shape[1])))
    return sums[:, 0]


def _exp(x: jax.Array) -> jax.Array:
    """Return exp(x) to 2 units in the last place, from multiplications and additions alone.

    jnp.exp on CPU has other last bits in the last elements of an array, where they no longer fill a vector register: parts of a
    tensor would not give the bits of the whole.

    Source: the polynomial of S. Moshier's Cephes library, function expf.
    """
    x = jnp.clip(x, -87.0, 88.0)
    k = jnp.floor(x * 1.44269504 + 0.5)
    r = x - k * 0.693359375 - k * -2.12194440e-4
    y = jnp.float32(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + c
    scale = jax.lax.bitcast_convert_type((k.astype(jnp.int32) + 127) << 23, jnp.float32)
    return (y * r * r + r + 1) * scale
