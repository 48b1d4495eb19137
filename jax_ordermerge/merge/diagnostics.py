"""Inner products of task vectors, and what follows from them: cosines, norms, the length of a merge."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.hash_rng import element_index, mix
from jax_ordermerge.merge.methods.selection import to_bits


class Moments(NamedTuple):
    """Sums over the last axis of a tensor; `rows` is the rest of its shape.

    Attributes:
        products: float32[(M+1)(M+2)/2, *rows], <tau_i, tau_j> for i <= j; number M is the merged model.
        unchanged: float32[M+2, *rows], counts of elements at the base: of each member, of the merged model, of all members at once.
        redrawn: [R, *rows], counts of elements that a selection drew again in each round (`select.redrawn`).
    """

    products: jax.Array
    unchanged: jax.Array
    redrawn: jax.Array | np.ndarray = np.zeros(0)


def checksums(models: Sequence[jax.Array], offset: jax.Array | None = None) -> jax.Array:
    """Return sum_j a_j x_j mod 2^32 of the bit patterns of each model, with odd a_j made from the index: uint32[K].

    Sums of parts add up to that of the tensor, in any order. One changed element always changes it, and chance changes leave it as it
    was once in 2^32. It tells accidents and mistaken files apart; it is no protection against intent.

    Args:
        models: K arrays [*s] of elements of at most 4 bytes.
        offset: uint32[2], number of the first element.

    Example:
        >>> one, two = jnp.arange(4.0), jnp.arange(4.0)[::-1]
        >>> checksums([one, one, two]).tolist()
        [3602907136, 3602907136, 4290772992]

    Source: multilinear hashing, Carter and Wegman 1979, with the multipliers of `counter.mix`.
    """
    index = element_index(models[0].shape, offset)
    factor = mix(index.lo ^ mix(index.hi)) | 1
    terms = tuple(to_bits(x).astype(jnp.uint32) * factor for x in models)
    add = functools.partial(jax.tree.map, jnp.add)
    return jnp.stack(
        jax.lax.reduce(terms, tuple(jnp.uint32(0) for _ in terms), add, tuple(range(terms[0].ndim)))
    )


def moments(
    members: jax.Array | Sequence[jax.Array], base: jax.Array, merged: jax.Array
) -> Moments:
    """Sum the products of task vectors and count unchanged elements in one pass.

    Row by row in float32; `summarize` adds the rows in float64. Unchanged is equality of bits.

    Args:
        members: [M, *S]; base, merged: [*S], all in the stored dtype.

    Example:
        >>> m = moments(jnp.array([[1.0, 0.0], [2.0, 1.0]]), jnp.zeros(2), jnp.array([2.0, 0.0]))
        >>> m.products.tolist(), m.unchanged.tolist()
        ([1.0, 2.0, 2.0, 5.0, 4.0, 4.0], [1.0, 0.0, 1.0, 0.0])
    """
    models = [jnp.atleast_1d(x) for x in (*members, merged)]
    base = jnp.atleast_1d(base)
    task_vectors = [x.astype(jnp.float32) - base.astype(jnp.float32) for x in models]
    same = [to_bits(x) == to_bits(base) for x in models]
    everywhere = same[0]
    for flag in same[1:-1]:
        everywhere = everywhere & flag
    products = [task_vectors[i] * task_vectors[j] for i, j in _pairs(len(task_vectors))]
    operands = products + [flag.astype(jnp.float32) for flag in (*same, everywhere)]
    # one reduction of many operands reads the tensors once; counts below 2^24 a row are exact in float32
    sums = jax.lax.reduce(
        tuple(operands),
        tuple(jnp.float32(0) for _ in operands),
        lambda xs, ys: tuple(x + y for x, y in zip(xs, ys, strict=True)),
        (base.ndim - 1,),
    )
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
        *(np.asarray(x, np.float64).sum(axis=tuple(range(1, np.ndim(x)))) for x in moment)
    )


def add(moments: Sequence[Moments]) -> Moments:
    """Add `total` moments of several tensors, or of parts of one. A tensor of which nothing was redrawn counts as 0.

    Example:
        >>> one = Moments(np.ones(1), np.ones(3), np.ones(2))
        >>> [x.tolist() for x in add([one, one._replace(redrawn=np.zeros(0))])]
        [[2.0], [2.0, 2.0, 2.0], [1.0, 1.0]]
    """
    redrawn = np.zeros(max(len(one.redrawn) for one in moments))
    for one in moments:
        redrawn[: len(one.redrawn)] += one.redrawn
    return Moments(
        np.sum([one.products for one in moments], axis=0),
        np.sum([one.unchanged for one in moments], axis=0),
        redrawn,
    )


def summarize(moment: Moments, elements: int) -> dict[str, Any]:
    """Turn `total` moments into the numbers that are reported.

    Args:
        moment: products float64[(M+1)(M+2)/2], unchanged float64[M+2].
        elements: how many elements were summed.

    Returns:
        elements; cosines (M x M, of the members' task vectors); norms (M) and merged_norm; unchanged (fraction per member),
        unchanged_by_all and merged_unchanged; redrawn (fraction of the elements drawn again in each round up to the last in which any was, of a
        selection with resampling); norm_ratio = |tau_merged| / mean |tau_i|; lambda_eff = <tau_merged, m> / |m|^2 with
        m the mean task vector. Plain Python; None where it is 0 / 0.

    Example:
        >>> m = moments(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.zeros(2), jnp.array([0.5, 0.5]))
        >>> numbers = summarize(total(m), 2)
        >>> numbers["cosines"], round(numbers["norm_ratio"], 4), numbers["lambda_eff"]
        ([[1.0, 0.0], [0.0, 1.0]], 0.7071, 1.0)
    """
    count = len(moment.unchanged) - 2
    gram = np.zeros((count + 1, count + 1))
    for (i, j), value in zip(_pairs(count + 1), moment.products, strict=True):
        gram[i, j] = gram[j, i] = value
    members, norms = gram[:count, :count], np.sqrt(np.diag(gram))
    fractions = [float(value) / elements for value in moment.unchanged]
    return {
        "elements": elements,
        "cosines": [
            [_ratio(members[i, j], math.sqrt(members[i, i] * members[j, j])) for j in range(count)]
            for i in range(count)
        ],
        "norms": norms[:count].tolist(),
        "merged_norm": float(norms[count]),
        "unchanged": fractions[:count],
        "merged_unchanged": fractions[count],
        "unchanged_by_all": fractions[count + 1],
        **(
            {
                "redrawn": [
                    float(x) / elements
                    for x in np.trim_zeros(np.asarray(moment.redrawn), "b").tolist()
                ]
            }
            if len(moment.redrawn)
            else {}
        ),
        "norm_ratio": _ratio(norms[count], norms[:count].mean()),
        "lambda_eff": _ratio(gram[count, :count].mean(), members.mean()),
    }


def report(tensors: Iterable[tuple[str, Moments, int]]) -> dict[str, Any]:
    """Return `{"total": numbers, "tensors": {name: numbers}}` from (name, `total` moments, elements) of every tensor.

    The total is None where the tensors have different numbers of members (slices of different models).

    Example:
        >>> m = total(moments(jnp.ones((2, 3)), jnp.zeros(3), jnp.ones(3)))
        >>> report([("a", m, 3), ("b", m, 3)])["total"]["elements"]
        6
    """
    found = list(tensors)
    alone = {name: summarize(moment, elements) for name, moment, elements in found}
    if len({len(moment.unchanged) for _, moment, _ in found}) != 1:
        return {"total": None, "tensors": alone}
    everything = summarize(
        add([moment for _, moment, _ in found]), sum(elements for _, _, elements in found)
    )
    return {"total": everything, "tensors": alone}


def _ratio(a: float, b: float) -> float | None:
    return float(a / b) if b > 0 and math.isfinite(a) and math.isfinite(b) else None
