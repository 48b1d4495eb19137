"""Thinned task vectors: trim by magnitude, drop at random, rescale, elect a sign. TIES and DARE are composed of these."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from jax_ordermerge.merge.average import Scale, combine, member_weights, task_vectors
from jax_ordermerge.merge.counter import element_index, key_words, random_words

Density = Annotated[float, Field(gt=0, le=1)]
Rescaling = Literal["density", "norm", "none"]


def trim(delta: jax.Array, density: float) -> jax.Array:
    """Keep the max(1, floor(density n)) elements of largest magnitude, exactly, and zero the others.

    The cut is found on the bits of |delta| (for floats that are not negative, integer order is float order), by counting only: no sort, and no gather when the tensor is sharded. Elements that tie at the cut are ranked by the hash of
    their row-major index under the key (0, 0), smallest first: the choice is defined, the same everywhere, and favours no part of
    the tensor. In bf16 such ties are many.

    Args:
        delta: float32[*S], fewer than 2^32 elements. NaN counts as largest.
        density: fraction to keep, in (0, 1].

    Returns:
        float32[*S].

    Example:
        >>> trim(jnp.array([0.1, -0.5, 0.3, 0.2]), 0.5).tolist()
        [0.0, -0.5, 0.30000001192092896, 0.0]

    Source: Yadav et al., "TIES-Merging" (arXiv 2306.01708), section 4, step 1.
    """
    keep = max(1, math.floor(density * delta.size))
    if keep >= delta.size:
        return delta
    magnitude = jax.lax.bitcast_convert_type(jnp.abs(delta), jnp.uint32)
    cut = _kth_largest(magnitude, jnp.uint32(keep), jnp.bool_(True))
    above, at = magnitude > cut, magnitude == cut
    rank = ~random_words(jnp.zeros(2, jnp.uint32), element_index(delta.shape))
    last = _kth_largest(rank, keep - jnp.sum(above, dtype=jnp.uint32), at)
    return jnp.where(above | (at & (rank >= last)), delta, 0.0)


def _kth_largest(x: jax.Array, k: jax.Array, among: jax.Array) -> jax.Array:
    """Return the k-th largest of the uint32 values where `among`, or another cut c with the same k values above or at it.

    Two bits a pass, from the top. Three counts in one reduction cost no more than one: the pass is memory-bound.
    """
    zeros = (jnp.uint32(0),) * 3

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, shift, exact = state
        return (shift >= 0) & ~exact

    def next_digit(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        cut, shift, _ = state
        cuts = [cut | (jnp.uint32(digit) << shift.astype(jnp.uint32)) for digit in (1, 2, 3)]
        reached = tuple(((x >= one) & among).astype(jnp.uint32) for one in cuts)
        counts = jnp.stack(jax.lax.reduce(reached, zeros, _add_each, tuple(range(x.ndim))))
        digit = jnp.sum(counts >= k, dtype=jnp.uint32)
        # an exact count ends the search early: with few ties after some log4(n) passes
        exact = jnp.any(counts == k)
        return cut | (digit << shift.astype(jnp.uint32)), shift - 2, exact

    return jax.lax.while_loop(unfinished, next_digit, (jnp.uint32(0), jnp.int32(30), jnp.bool_(False)))[0]


def _add_each(xs: tuple[jax.Array, ...], ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


def drop(delta: jax.Array, density: float, key: jax.Array, member: int, offset: jax.Array | None = None) -> jax.Array:
    """Keep each element with probability `density`, independently, and zero the others.

    Element j is kept where the hash of (key, j, round = member) lies below density 2^32 (docs/random_choice.md).

    Args:
        delta: float32[*S], the task vector of one member.
        density: probability to keep, in (0, 1].
        key: typed key (scalar) of this tensor, the same for all members.
        member: position of the member.
        offset: uint32[2], see `counter.element_index`.

    Returns:
        float32[*S].

    Example:
        >>> 0.2 < float(drop(jnp.ones(1000), 0.25, jax.random.key(0), 0).mean()) < 0.3
        True

    Source: Yu et al., "Language Models are Super Mario" (DARE, arXiv 2311.03099), section 3.1.
    """
    if density == 1:
        return delta
    limit = jnp.uint32(min(round(density * 2**32), 2**32 - 1))
    return jnp.where(random_words(key_words(key), element_index(delta.shape, offset), member) < limit, delta, 0.0)


def rescale(sparse: jax.Array, delta: jax.Array, density: float, rule: Rescaling) -> jax.Array:
    """Make up for what was dropped: divide by the density (the paper), match the L1 norm (mergekit), or nothing.

    Args:
        sparse, delta: float32[*S], one member's task vector after and before dropping.

    Example:
        >>> rescale(jnp.array([0.0, 3.0]), jnp.array([1.0, 3.0]), 0.5, "density").tolist()
        [0.0, 6.0]
        >>> rescale(jnp.array([0.0, 3.0]), jnp.array([3.0, 3.0]), 0.5, "norm").tolist()
        [0.0, 6.0]
    """
    if rule == "none" or density == 1:
        return sparse
    if rule == "density":
        return sparse / density
    before, after = jnp.sum(jnp.abs(delta)), jnp.sum(jnp.abs(sparse))
    return jnp.where(after > 0, sparse * (before / jnp.where(after > 0, after, 1.0)), sparse)


def elect_sign(terms: Sequence[jax.Array]) -> jax.Array:
    """Return gamma = +1 where sum_i x_i >= 0 and -1 elsewhere, float32[*S]: the sign with the larger total magnitude.

    Args:
        terms: M weighted task vectors, float32[*S].

    Example:
        >>> elect_sign(jnp.array([[1.0, -3.0, 0.0], [-2.0, 1.0, 0.0]])).tolist()
        [-1.0, -1.0, 1.0]

    Source: TIES-Merging, step 2; the tie at 0 goes to +1 as in mergekit.
    """
    return jnp.where(combine(terms, jnp.ones(len(terms), jnp.float32)) >= 0, 1.0, -1.0)


def disjoint_sum(deltas: Sequence[jax.Array], weights: jax.Array, normalize: bool) -> jax.Array:
    """Add the weighted task vectors that have the elected sign; `normalize` divides by the weights of those that do.

    Args:
        deltas: M task vectors, float32[*S]. An exact zero never has the elected sign.
        weights: float32[M].

    Example:
        >>> disjoint_sum(jnp.array([[1.0, 0.0], [-2.0, 4.0]]), jnp.array([1.0, 1.0]), True).tolist()
        [-2.0, 4.0]

    Source: TIES-Merging, step 3.
    """
    terms = [weights[i] * delta for i, delta in enumerate(deltas)]
    sign = elect_sign(terms)
    agree = [jnp.sign(term) == sign for term in terms]
    total = combine([jnp.where(a, term, 0.0) for a, term in zip(agree, terms, strict=True)], jnp.ones(len(terms), jnp.float32))
    if not normalize:
        return total
    divisor = combine(agree, weights)
    return total / jnp.where(divisor == 0, 1.0, divisor)


def ties(
    members: jax.Array,
    *,
    base: jax.Array,
    weights: jax.Array | None = None,
    key: jax.Array | None = None,
    density: Density = 0.2,
    scale: Scale = 1.0,
    normalize: bool = True,
) -> jax.Array:
    """TIES: theta = theta_0 + lambda sum_{i in A} w_i trim(tau_i) / sum_{i in A} w_i, A the members of the elected sign.

    The trim is by magnitude within each tensor (see `trim` for ties at the cut).

    Args:
        members: [M, *S], any floating dtype.
        base: [*S], theta_0.
        weights: [M], 1/M by default.
        key: not used.
        density: fraction of each task vector that is kept.
        scale: lambda.
        normalize: divide by the weights of the members that agree (a weighted mean instead of a sum).

    Returns:
        float32[*S].

    Example:
        >>> ties(jnp.array([[1.0, 3.0], [2.0, -1.0]]), base=jnp.zeros(2), density=1.0).tolist()
        [1.5, 3.0]

    Source: Yadav et al., "TIES-Merging" (arXiv 2306.01708), algorithm 1. Trimmed within each tensor like
    mergekit and unlike the paper, which ranks all parameters of the model together.
    """
    # a loop over the members, so that the search for the cut is compiled once
    deltas = jax.lax.map(lambda member: trim(task_vectors(member[None], base)[0], density), members)
    return base.astype(jnp.float32) + scale * disjoint_sum(list(deltas), member_weights(members, weights), normalize)


def _dare(
    members: jax.Array, base: jax.Array, key: jax.Array, *, density: float, rule: Rescaling, offset: jax.Array | None
) -> list[jax.Array]:
    deltas = task_vectors(members, base)
    return [rescale(drop(delta, density, key, i, offset), delta, density, rule) for i, delta in enumerate(deltas)]


def dare_linear(
    members: jax.Array,
    *,
    base: jax.Array,
    weights: jax.Array | None = None,
    key: jax.Array,
    offset: jax.Array | None = None,
    density: Density = 0.5,
    scale: Scale = 1.0,
    rescale: Rescaling = "density",
) -> jax.Array:
    """DARE: theta = theta_0 + lambda sum_i w_i m_i tau_i / density, with masks m_ij ~ Bernoulli(density).

    Args:
        members: [M, *S], any floating dtype.
        base: [*S], theta_0.
        weights: [M], used as they are. 1/M by default.
        key: typed key (scalar) of this tensor.
        offset: uint32[2], row-major index of a slab's first element.
        density: probability to keep an element (1 - the paper's drop rate p); the default is ours
        scale: lambda.
        rescale: divide by the density (the paper), match the L1 norm (mergekit; needs the whole tensor), or none.

    Returns:
        float32[*S].

    Example:
        >>> dare_linear(jnp.array([[2.0], [4.0]]), base=jnp.array([1.0]), key=jax.random.key(0), density=1.0).tolist()
        [3.0]

    Source: Yu et al., "Language Models are Super Mario" (arXiv 2311.03099), equations 1 to 3.
    """
    deltas = _dare(members, base, key, density=density, rule=rescale, offset=offset)
    return base.astype(jnp.float32) + scale * combine(deltas, member_weights(members, weights))


def dare_ties(
    members: jax.Array,
    *,
    base: jax.Array,
    weights: jax.Array | None = None,
    key: jax.Array,
    offset: jax.Array | None = None,
    density: Density = 0.5,
    scale: Scale = 1.0,
    rescale: Rescaling = "density",
    normalize: bool = False,
) -> jax.Array:
    """DARE with sign election: as `dare_linear`, but only the terms w_i m_i tau_i of the elected sign are added.

    Arguments as `dare_linear`; `normalize` divides by the weights of the members that agree.

    Returns:
        float32[*S].

    Example:
        >>> dare_ties(jnp.array([[1.0], [-3.0]]), base=jnp.zeros(1), key=jax.random.key(0), density=1.0).tolist()
        [-1.5]

    Source: DARE as above in place of the trim of TIES-Merging (arXiv 2306.01708); mergekit's `dare_ties`.
    """
    deltas = _dare(members, base, key, density=density, rule=rescale, offset=offset)
    return base.astype(jnp.float32) + scale * disjoint_sum(list(deltas), member_weights(members, weights), normalize)
