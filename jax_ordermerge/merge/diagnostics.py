"""Inner products of task vectors, and what follows from them: cosines, norms, scale of a merge."""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.hash_rng import element_index, mix
from jax_ordermerge.merge.methods.reductions import sum_each
from jax_ordermerge.merge.methods.selection import to_bits

Array = jax.Array | np.ndarray


class Moments(NamedTuple):
    """Sums over the last axis of a tensor; `rows` is the rest of its shape.

    Attributes:
        products: float32[(M+1)(M+2)/2, *rows], <tau_i, tau_j> for i <= j; index M is the merged
            model.
        unchanged: float32[M+2, *rows], counts of elements equal to the base: in each member, in
            the merged model, in all members at once.
        redrawn: [R, *rows], counts of elements that a selection drew again in each round.
    """

    products: Array
    unchanged: Array
    redrawn: Array = np.zeros(0)


class Summary(TypedDict):
    """Diagnostics of a tensor or a model, as they are written to JSON.

    A ratio is None where it is 0 / 0, and any number where it is not finite. Fractions are of all
    elements.

    Attributes:
        elements: their number.
        cosines: [M, M], between the task vectors of the members.
        norms: [M], of the task vectors of the members.
        merged_norm: of the merged task vector.
        unchanged: [M], fraction equal to the base, of each member.
        merged_unchanged: the same of the merged model.
        unchanged_by_all: fraction that every member left at the base.
        redrawn: fraction drawn again in each round, up to the last round that drew any. Only of
            selections with resampling.
        norm_ratio: |tau_merged| / mean |tau_i|.
        lambda_eff: <tau_merged, m> / |m|^2, with m the mean task vector.
    """

    elements: int
    cosines: list[list[float | None]]
    norms: list[float | None]
    merged_norm: float | None
    unchanged: list[float]
    merged_unchanged: float
    unchanged_by_all: float
    redrawn: NotRequired[list[float]]
    norm_ratio: float | None
    lambda_eff: float | None


class Report(TypedDict):
    """Diagnostics of a merge, as they are written to JSON.

    Attributes:
        total: of the model; None where tensors have different numbers of members.
        tensors: by Hugging Face name.
    """

    total: Summary | None
    tensors: dict[str, Summary]


class Scan(NamedTuple):
    """What one pass over the elements of K models finds.

    Attributes:
        checksums: uint32[K], sum_j a_j x_j mod 2^32 of the bit patterns, a_j odd.
        not_finite: uint32[K], numbers of elements that are NaN or infinite.
    """

    checksums: jax.Array
    not_finite: jax.Array


def scan(models: Sequence[jax.Array], offset: jax.Array | None = None) -> Scan:
    """Return checksums of models, and how many of their elements are not finite.

    The factors a_j are hashes of the index j, so the checksums of parts add up to that of the
    tensor in any order. A change of one element always changes the checksum, other accidents pass
    with a probability of 2^-32. It does not protect against intent.

    Args:
        models: K arrays [*s] with elements of at most 4 bytes.
        offset: uint32[2], index of the first element.

    Example:
        >>> x, reverse = jnp.arange(4.0), jnp.arange(4.0)[::-1]
        >>> [counts.tolist() for counts in scan([x, x, reverse])]
        [[3602907136, 3602907136, 4290772992], [0, 0, 0]]

    Source: multilinear hashing, Carter and Wegman 1979, with the multipliers of `hash_rng.mix`.
    """
    lo, hi = element_index(models[0].shape, offset)
    if models[0].size < 1 << 32:
        # The upper half changes at most once, so its hash need not be computed for each element.
        first_lo, first_hi = jnp.zeros(2, jnp.uint32) if offset is None else jnp.asarray(offset)
        hashed_hi = jnp.where(lo < first_lo, mix(first_hi + 1), mix(first_hi))
    else:
        hashed_hi = mix(hi)
    # An odd factor is invertible modulo 2^32, so a change of one element always shows.
    factor = mix(lo ^ hashed_hi) | 1
    # By bits: NaN and infinity are the values whose exponent is all ones.
    exponents = [to_bits(jnp.array(jnp.inf, x.dtype)) for x in models]
    not_finite = [
        (to_bits(x) & exponent) == exponent for x, exponent in zip(models, exponents, strict=True)
    ]
    sums = sum_each(
        [to_bits(x).astype(jnp.uint32) * factor for x in models]
        + [mask.astype(jnp.uint32) for mask in not_finite]
    )
    return Scan(jnp.stack(sums[: len(models)]), jnp.stack(sums[len(models) :]))


def moments(
    members: jax.Array | Sequence[jax.Array], base: jax.Array, merged: jax.Array
) -> Moments:
    """Sum the products of task vectors and count unchanged elements in one pass.

    Unchanged is equality of bits. Each row is summed in float32, `total` adds the rows in float64.

    Args:
        members: [M, *S], or M arrays [*S], in the stored dtype.
        base: [*S].
        merged: [*S].

    Example:
        >>> m = moments(jnp.array([[1.0, 0.0], [2.0, 1.0]]), jnp.zeros(2), jnp.array([2.0, 0.0]))
        >>> m.products.tolist(), m.unchanged.tolist()
        ([1.0, 2.0, 2.0, 5.0, 4.0, 4.0], [1.0, 0.0, 1.0, 0.0])
    """
    models = [jnp.atleast_1d(x) for x in (*members, merged)]
    base = jnp.atleast_1d(base)
    # in float32: the difference of two bfloat16 numbers need not be a bfloat16 number
    task_vectors = [x.astype(jnp.float32) - base.astype(jnp.float32) for x in models]
    # bits and not values: 0 and -0 differ, a NaN equals itself, as in a comparison of files
    unchanged = [to_bits(x) == to_bits(base) for x in models]
    unchanged_by_all = functools.reduce(operator.and_, unchanged[:-1])
    products = [task_vectors[i] * task_vectors[j] for i, j in _pairs(len(task_vectors))]
    # counts are exact in float32, as long as a row has fewer than 2^24 elements
    counts = [x.astype(jnp.float32) for x in (*unchanged, unchanged_by_all)]
    sums = sum_each(products + counts, (base.ndim - 1,))
    return Moments(jnp.stack(sums[: len(products)]), jnp.stack(sums[len(products) :]))


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def total(moment: Moments) -> Moments:
    """Add all rows, in float64 on the host.

    Example:
        >>> total(Moments(np.ones((1, 3)), np.ones((3, 3)))).products.tolist()
        [3.0]
    """
    return Moments(
        # float64: float32 would lose counts beyond 2^24 and small products beside a large sum
        *(np.asarray(x, np.float64).sum(axis=tuple(range(1, np.ndim(x)))) for x in moment)
    )


def add(totals: Sequence[Moments]) -> Moments:
    """Add `total` moments of several tensors, or of parts of one.

    Without a round of redrawing, its count is 0.

    Example:
        >>> selection = Moments(np.ones(1), np.ones(3), np.ones(2))
        >>> average = Moments(np.ones(1), np.ones(3))
        >>> [x.tolist() for x in add([selection, average])]
        [[2.0], [2.0, 2.0, 2.0], [1.0, 1.0]]
    """
    redrawn = np.zeros(max(len(moment.redrawn) for moment in totals))
    for moment in totals:
        # shorter where a tensor has another method, or fewer members to draw from
        redrawn[: len(moment.redrawn)] += moment.redrawn
    return Moments(
        np.sum([moment.products for moment in totals], axis=0),
        np.sum([moment.unchanged for moment in totals], axis=0),
        redrawn,
    )


def summarize(moment: Moments, elements: int) -> Summary:
    """Turn `total` moments into the numbers that are reported.

    Args:
        moment: products float64[(M+1)(M+2)/2], unchanged float64[M+2].
        elements: how many elements were summed.

    Example:
        >>> m = moments(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.zeros(2), jnp.array([0.5, 0.5]))
        >>> summary = summarize(total(m), 2)
        >>> summary["cosines"], round(summary["norm_ratio"], 4), summary["lambda_eff"]
        ([[1.0, 0.0], [0.0, 1.0]], 0.7071, 1.0)
    """
    count = len(moment.unchanged) - 2
    # the merged model is number `count`, after the members
    gram = np.zeros((count + 1, count + 1))
    for (i, j), value in zip(_pairs(count + 1), moment.products, strict=True):
        gram[i, j] = gram[j, i] = value
    members = gram[:count, :count]
    # a square beyond float32 is infinite, and a sum with infinities of both signs is NaN
    with np.errstate(invalid="ignore"):
        norms = np.sqrt(np.diag(gram))
    *unchanged, merged_unchanged, unchanged_by_all = (
        float(value) / elements for value in moment.unchanged
    )
    summary: Summary = {
        "elements": elements,
        "cosines": [
            [_ratio(members[i, j], math.sqrt(members[i, i] * members[j, j])) for j in range(count)]
            for i in range(count)
        ],
        "norms": [_finite(norm) for norm in norms[:count]],
        "merged_norm": _finite(norms[count]),
        "unchanged": unchanged,
        "merged_unchanged": merged_unchanged,
        "unchanged_by_all": unchanged_by_all,
        "norm_ratio": _ratio(norms[count], norms[:count].mean()),
        # the means over members are <tau_merged, m> and |m|^2 without forming m
        "lambda_eff": _ratio(gram[count, :count].mean(), members.mean()),
    }
    if len(moment.redrawn):
        # once a round has redrawn nothing, those after it do not either
        redrawn = np.trim_zeros(np.asarray(moment.redrawn), "b")
        summary["redrawn"] = [float(x) / elements for x in redrawn.tolist()]
    return summary


def report(tensors: Iterable[tuple[str, Moments, int]]) -> Report:
    """Summarize (name, `total` moments, elements) of every tensor, and their sum.

    Example:
        >>> m = total(moments(jnp.ones((2, 3)), jnp.zeros(3), jnp.ones(3)))
        >>> report([("a", m, 3), ("b", m, 3)])["total"]["elements"]
        6
    """
    names, totals, elements = zip(*tensors, strict=True)
    summaries = map(summarize, totals, elements)
    # slices of different models may have different numbers of members: nothing to add up
    is_uniform = len({len(moment.unchanged) for moment in totals}) == 1
    return {
        "total": summarize(add(totals), sum(elements)) if is_uniform else None,
        "tensors": dict(zip(names, summaries, strict=True)),
    }


def _finite(value: float) -> float | None:
    # JSON has neither NaN nor infinity
    return float(value) if math.isfinite(value) else None


def _ratio(a: float, b: float) -> float | None:
    return float(a / b) if b > 0 and math.isfinite(a) and math.isfinite(b) else None
