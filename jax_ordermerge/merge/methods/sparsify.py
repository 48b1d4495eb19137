"""Generalized task arithmetic: thin the task vectors, rescale, elect a sign, add. TIES, DARE, Breadcrumbs and DELLA are composed of these.

theta = theta_0 + lambda sum_i keep_i w_i s_i m_i tau_i / (divisor), with masks m_i of the thinning, factors s_i of the rescaling and,
with consensus, keep_i where w_i s_i m_i tau_i has the elected sign.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jax_ordermerge.errors import UserError
from jax_ordermerge.hash_rng import random_words
from jax_ordermerge.merge.methods.average import Scale, combine, equal_weights
from jax_ordermerge.merge.methods.parts import Part, Tensor, block_sums, rounded
from jax_ordermerge.merge.methods.top_k import is_largest, largest, magnitudes, places, row_ranks

Density = Annotated[float, Field(gt=0, le=1)]
Densities = Density | list[Density]  # one for all members, or one each
Fraction = Annotated[float, Field(ge=0, lt=1)]
Fractions = Fraction | list[Fraction]
Count = Annotated[int, Field(ge=0)]
Rescaling = Literal["density", "norm", "none"]
SampleRescaling = Literal["probability", "norm", "none"]
Known = dict[str, Any]
Masks = Callable[..., list[jax.Array]]


# ------------------------------------------------------------------------------------------------------------------------ thinning


def each_member(tensor: Tensor, name: str, value: float | list[float]) -> np.ndarray:
    """Return a parameter as float64[M], one a member.

    Raises:
        UserError: a list has not one a member.
    """
    if isinstance(value, list) and len(value) != tensor.count:
        raise UserError(
            f"{name} = {value}: give one number for all of the {tensor.count} members, or one a member"
        )
    return np.broadcast_to(np.asarray(value, np.float64), tensor.count)


def trim(tensor: Tensor, density: Densities) -> Known:
    """Keep the max(1, floor(density n)) elements of largest magnitude of each task vector, exactly.

    Source: Yadav et al., "TIES-Merging" (arXiv 2306.01708), section 4, step 1.
    """
    size = math.prod(tensor.shape)
    keep = [
        max(1, math.floor(one * size)) for one in each_member(tensor, "density", density).tolist()
    ]
    if min(keep) >= size:
        return {"thinning": "none"}
    return {"thinning": "trim", **largest(tensor, np.array(keep), magnitudes)}


def trim_masks(p: Part, **known: Any) -> list[jax.Array]:
    """Return which elements `trim` keeps, M arrays bool[*s]."""
    place = places(p)
    return [is_largest(value, place, known, i) for i, value in enumerate(magnitudes(p))]


def drop(tensor: Tensor, density: Densities) -> Known:
    """Keep each element with probability `density`, independently.

    Element j of member i is kept where the hash of (key, j, round = i) lies below density 2^32 (docs/random_choice.md).

    Source: Yu et al., "Language Models are Super Mario" (DARE, arXiv 2311.03099), section 3.1.
    """
    each = each_member(tensor, "density", density)
    if (each == 1).all():
        return {"thinning": "none"}
    return {"thinning": "drop", "last": _last_kept(each).astype(np.uint32)}


def drop_masks(p: Part, *, last: jax.Array) -> list[jax.Array]:
    """Return which elements `drop` keeps, M arrays bool[*s]."""
    index = p.indices()
    return [random_words(p.words, index, i) <= last[i] for i in range(len(p.members))]


def _last_kept(probability: np.ndarray) -> np.ndarray:
    """Return round(p 2^32) - 1 as int64: a hash up to it is kept. Above 0, p is at least 2^-32."""
    return np.maximum(np.round(probability * 2.0**32), 1).astype(np.int64) - 1


def band(tensor: Tensor, density: Densities, gamma: Fractions, at_least: int) -> Known:
    """Keep, of each task vector, the floor(density n) elements of largest magnitude below the floor(gamma n) largest.

    Where fewer are left below those, fewer of the largest are dropped; at least `at_least` elements are kept. So a tensor loses
    everything only if `at_least` is 0 and it has fewer than 1 / density elements.

    Source: Davari and Belilovsky, "Model Breadcrumbs" (arXiv 2312.06795), the masks of section 3.
    """
    size = math.prod(tensor.shape)
    below, above = each_member(tensor, "density", density), each_member(tensor, "gamma", gamma)
    keep = np.minimum(np.maximum(np.floor(below * size), at_least), size).astype(np.int64)
    top = np.minimum(np.floor(above * size).astype(np.int64), size - keep)
    if keep.min() >= size:
        return {"thinning": "none"}
    return {
        "thinning": "band",
        **largest(tensor, np.concatenate([top, top + keep]), _magnitudes_twice),
    }


def _magnitudes_twice(p: Part) -> list[jax.Array]:
    return 2 * magnitudes(p)


def band_masks(p: Part, **known: Any) -> list[jax.Array]:
    """Return which elements `band` keeps, M arrays bool[*s]."""
    place, count = places(p), len(p.members)
    return [
        is_largest(value, place, known, count + i) & ~is_largest(value, place, known, i)
        for i, value in enumerate(magnitudes(p))
    ]


def sample(tensor: Tensor, density: Densities, epsilon: Fractions, unbiased: bool) -> Known:
    """Keep each element with a probability that grows with the rank r = 0 .. n-1 of its magnitude in its row of n.

    p = density - epsilon + 2 epsilon r / (n - 1), in steps of 2^-32, and density where n = 1. Element j of member i is kept where the
    hash of (key, j, round = i) lies below p 2^32. Where the density is 1, all is kept, whatever epsilon.

    Args:
        tensor: the tensor.
        density, epsilon: one each, or one a member.
        unbiased: divide what is kept by p.

    Raises:
        UserError: a probability would not lie in (0, 1].

    Source: Deep et al., "DELLA-Merging" (arXiv 2406.11617), MagPrune; the paper's drop rate is 1 - p.
    """
    middle, half = each_member(tensor, "density", density), each_member(tensor, "epsilon", epsilon)
    half = np.where(middle == 1, 0, half)
    for one, around in zip(middle.tolist(), half.tolist(), strict=True):
        if one - around <= 0 or one + around > 1:
            raise UserError(
                f"density = {one} and epsilon = {around} give probabilities from {one - around:.4g} to {one + around:.4g};"
                f" choose epsilon below {min(one, 1 - one):.4g}"
            )
    if (middle == 1).all():
        return {"thinning": "none"}
    width = math.prod(tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape)
    half = half if width > 1 else 0 * half
    low = _last_kept(middle - half)
    step = (_last_kept(middle + half) - low) // max(width - 1, 1)
    thinning = "sample_unbiased" if unbiased else "sample"
    return {"thinning": thinning, "low": low.astype(np.uint32), "step": step.astype(np.uint32)}


def _last_sampled(p: Part, low: jax.Array, step: jax.Array) -> list[jax.Array]:
    return [low[i] + step[i] * row_ranks(value) for i, value in enumerate(magnitudes(p))]


def sample_masks(p: Part, *, low: jax.Array, step: jax.Array) -> list[jax.Array]:
    """Return which elements `sample` keeps, M arrays bool[*s]."""
    index = p.indices()
    return [
        random_words(p.words, index, i) <= last
        for i, last in enumerate(_last_sampled(p, low, step))
    ]


def _sampled_unbiased(p: Part, *, low: jax.Array, step: jax.Array) -> list[jax.Array]:
    index, out = p.indices(), []
    for i, (last, tau) in enumerate(
        zip(_last_sampled(p, low, step), p.task_vectors(), strict=True)
    ):
        probability = (last.astype(jnp.float32) + 1) * jnp.float32(2.0**-32)
        out.append(jnp.where(random_words(p.words, index, i) <= last, tau / probability, 0.0))
    return out


MASKS: dict[str, Masks] = {
    "trim": trim_masks,
    "drop": drop_masks,
    "band": band_masks,
    "sample": sample_masks,
}


def masked(p: Part, thinning: str, known: Known) -> list[jax.Array]:
    """Return the thinned task vectors m_i tau_i, M arrays float32[*s]."""
    if thinning == "sample_unbiased":
        return _sampled_unbiased(p, **known)
    task_vectors = p.task_vectors()
    if thinning == "none":
        return task_vectors
    return [
        jnp.where(mask, tau, 0.0)
        for mask, tau in zip(MASKS[thinning](p, **known), task_vectors, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------------------- rescaling


def rescaling(tensor: Tensor, thinned: Known, density: Densities, rule: Rescaling) -> np.ndarray:
    """Return the factors s_i that make up for what was thinned, float32[M].

    Args:
        tensor: the tensor.
        thinned: what the thinning returned.
        density: of the thinning.
        rule: divide by the density (the paper), match the L1 norm of the task vector (mergekit), or nothing.
    """
    each = each_member(tensor, "density", density)
    if rule == "none" or thinned["thinning"] == "none":
        return np.ones(tensor.count, np.float32)
    if rule == "density":
        return (1 / each).astype(np.float32)
    arrays = {name: value for name, value in thinned.items() if name != "thinning"}
    before, after = tensor.total(_norms, arrays, thinning=thinned["thinning"])
    matched = (before > 0) & (after > 0) & (each < 1)
    return np.where(matched, before / np.where(matched, after, 1), 1).astype(np.float32)


def _norms(p: Part, known: Known, *, thinning: str) -> jax.Array:
    """Return the L1 norms before and after, [2, M, blocks]."""
    return jnp.stack(
        [
            jnp.stack([block_sums(jnp.abs(x)) for x in xs])
            for xs in (p.task_vectors(), masked(p, thinning, known))
        ]
    )


# ------------------------------------------------------------------------------------------------------------- election and adding


def elect_sign(terms: Sequence[jax.Array]) -> jax.Array:
    """Return gamma >= 0, bool[*s]: whether sum_i x_i >= 0, the sign with the larger total magnitude.

    Args:
        terms: M weighted task vectors, float32[*s].

    Example:
        >>> elect_sign([jnp.array([1.0, -3.0, 0.0]), jnp.array([-2.0, 1.0, 0.0])]).tolist()
        [False, False, True]

    Source: TIES-Merging, step 2; the tie at 0 goes to + as in mergekit.
    """
    return _in_order(terms) >= 0


def _in_order(terms: Sequence[jax.Array]) -> jax.Array:
    """Add up in the order of the members."""
    return functools.reduce(jnp.add, terms)


def disjoint_sum(deltas: Sequence[jax.Array], weights: jax.Array, normalize: bool) -> jax.Array:
    """Add the weighted task vectors that have the elected sign; `normalize` divides by the weights of those that do.

    Args:
        deltas: M task vectors, float32[*s]. An exact zero never has the elected sign.
        weights: float32[M].

    Example:
        >>> disjoint_sum(jnp.array([[1.0, 0.0], [-2.0, 4.0]]), jnp.array([1.0, 1.0]), True).tolist()
        [-2.0, 4.0]

    Source: TIES-Merging, step 3.
    """
    terms = [rounded(weights[i] * delta) for i, delta in enumerate(deltas)]
    positive = elect_sign(terms)
    agree = [jnp.where(positive, term > 0, term < 0) for term in terms]
    total = _in_order([jnp.where(a, term, 0.0) for a, term in zip(agree, terms, strict=True)])
    if not normalize:
        return total
    divisor = _in_order([jnp.where(a, weights[i], 0.0) for i, a in enumerate(agree)])
    return total / jnp.where(divisor == 0, 1.0, divisor)


def generalized_part(
    p: Part,
    *,
    weights: jax.Array,
    factors: jax.Array,
    scale: jax.Array,
    thinning: str,
    consensus: bool,
    normalize: bool,
    **known: Any,
) -> jax.Array:
    """Merge a part by the equation on top of this file."""
    deltas = [factors[i] * delta for i, delta in enumerate(masked(p, thinning, known))]
    if consensus:
        merged = disjoint_sum(deltas, weights, normalize)
    else:
        merged = combine(deltas, weights)
        if normalize:
            total = combine([jnp.float32(1)] * len(deltas), weights)
            merged = merged / jnp.where(jnp.abs(total) < 1e-8, 1.0, total)
    return p.base_float() + rounded(scale * merged)


def generalized(
    tensor: Tensor,
    thinned: Known,
    factors: np.ndarray,
    *,
    scale: float,
    consensus: bool,
    normalize: bool,
) -> Known:
    """Return what `generalized_part` must know."""
    return {
        **thinned,
        "weights": np.float32(equal_weights(tensor)),
        "factors": factors,
        "scale": np.float32(scale),
        "consensus": consensus,
        "normalize": normalize,
    }


# ------------------------------------------------------------------------------------------------------------------------- methods


def ties(
    tensor: Tensor,
    *,
    density: Densities = 0.2,
    scale: Scale = 1.0,
    normalize: bool = True,
    rescale: Rescaling = "none",
) -> Known:
    """TIES: theta = theta_0 + lambda sum_{i in A} w_i trim(tau_i) / sum_{i in A} w_i, A the members of the elected sign.

    The trim is by magnitude within each tensor (see `ranks.Place` for ties at the cut).

    Args:
        tensor: its weights are 1/M by default.
        density: fraction of each task vector that is kept.
        scale: lambda.
        normalize: divide by the weights of the members that agree (a weighted mean instead of a sum).
        rescale: of the trimmed task vectors.

    Source: Yadav et al., "TIES-Merging" (arXiv 2306.01708), algorithm 1. Trimmed within each tensor like
    mergekit and unlike the paper, which ranks all parameters of the model together.
    """
    thinned = trim(tensor, density)
    factors = rescaling(tensor, thinned, density, rescale)
    return generalized(tensor, thinned, factors, scale=scale, consensus=True, normalize=normalize)


def dare_linear(
    tensor: Tensor,
    *,
    density: Densities = 0.5,
    scale: Scale = 1.0,
    rescale: Rescaling = "density",
    normalize: bool = False,
) -> Known:
    """DARE: theta = theta_0 + lambda sum_i w_i m_i tau_i / density, with masks m_ij ~ Bernoulli(density).

    Args:
        tensor: its weights are used as they are. 1/M by default.
        density: probability to keep an element (1 - the paper's drop rate p); the default is ours.
        scale: lambda.
        rescale: divide by the density (the paper), match the L1 norm (mergekit), or none.
        normalize: divide by the sum of the weights.

    Source: Yu et al., "Language Models are Super Mario" (arXiv 2311.03099), equations 1 to 3.
    """
    thinned = drop(tensor, density)
    factors = rescaling(tensor, thinned, density, rescale)
    return generalized(tensor, thinned, factors, scale=scale, consensus=False, normalize=normalize)


def dare_ties(
    tensor: Tensor,
    *,
    density: Densities = 0.5,
    scale: Scale = 1.0,
    rescale: Rescaling = "density",
    normalize: bool = False,
) -> Known:
    """DARE with sign election: as `dare_linear`, but only the terms w_i m_i tau_i of the elected sign are added.

    Arguments as `dare_linear`; `normalize` divides by the weights of the members that agree.

    Source: DARE as above in place of the trim of TIES-Merging (arXiv 2306.01708); mergekit's `dare_ties`.
    """
    thinned = drop(tensor, density)
    factors = rescaling(tensor, thinned, density, rescale)
    return generalized(tensor, thinned, factors, scale=scale, consensus=True, normalize=normalize)


def breadcrumbs(
    tensor: Tensor,
    *,
    density: Densities = 0.9,
    gamma: Fractions = 0.01,
    at_least: Count = 1,
    scale: Scale = 1.0,
    normalize: bool = False,
    rescale: Rescaling = "none",
) -> Known:
    """Model Breadcrumbs: theta = theta_0 + lambda sum_i w_i m_i tau_i, m_i without the largest and the smallest magnitudes.

    Args:
        tensor: its weights are used as they are. 1/M by default.
        density: fraction of each task vector that is kept; the default is ours.
        gamma: fraction that is dropped above it, fewer where nothing is left to drop below; 1 - density - gamma is dropped below.
        at_least: how many elements are kept at least. mergekit: 0, so that a tensor of fewer than 1 / density elements loses all.
        scale: lambda.
        normalize: divide by the sum of the weights.
        rescale: of the thinned task vectors.

    Source: Davari and Belilovsky, "Model Breadcrumbs" (arXiv 2312.06795): masks within each tensor. The parameters are mergekit's; the
    paper's beta, the quantile below which all is dropped, is 1 - density - gamma.
    """
    thinned = band(tensor, density, gamma, at_least)
    factors = rescaling(tensor, thinned, density, rescale)
    return generalized(tensor, thinned, factors, scale=scale, consensus=False, normalize=normalize)


def breadcrumbs_ties(
    tensor: Tensor,
    *,
    density: Densities = 0.9,
    gamma: Fractions = 0.01,
    at_least: Count = 1,
    scale: Scale = 1.0,
    normalize: bool = False,
    rescale: Rescaling = "none",
) -> Known:
    """Model Breadcrumbs with sign election: as `breadcrumbs`, but only the terms w_i m_i tau_i of the elected sign are added.

    Arguments as `breadcrumbs`; `normalize` divides by the weights of the members that agree.

    Source: the masks of Model Breadcrumbs in place of the trim of TIES-Merging (arXiv 2306.01708); mergekit's `breadcrumbs_ties`.
    """
    thinned = band(tensor, density, gamma, at_least)
    factors = rescaling(tensor, thinned, density, rescale)
    return generalized(tensor, thinned, factors, scale=scale, consensus=True, normalize=normalize)


def della(
    tensor: Tensor,
    *,
    density: Densities = 0.5,
    epsilon: Fractions = 0.15,
    scale: Scale = 1.0,
    normalize: bool = True,
    rescale: SampleRescaling = "probability",
) -> Known:
    """DELLA: theta = theta_0 + lambda sum_{i in A} w_i m_i tau_i / p_i (/ sum_{i in A} w_i), A the members of the elected sign.

    m_ij ~ Bernoulli(p_ij), p_ij from density - epsilon for the smallest magnitude of a row to density + epsilon for the largest.

    Args:
        tensor: its weights are 1/M by default.
        density: mean probability to keep an element (1 - the paper's drop rate); the default is ours.
        epsilon: half the range of the probabilities.
        scale: lambda.
        normalize: divide by the weights of the members that agree (mergekit's default).
        rescale: divide by each element's own probability (the paper), match the L1 norm of the task vector (mergekit), or none.

    Source: Deep et al., "DELLA-Merging" (arXiv 2406.11617): drop (MagPrune), elect, fuse.
    """
    thinned = sample(tensor, density, epsilon, unbiased=rescale == "probability")
    factors = rescaling(tensor, thinned, density, "norm" if rescale == "norm" else "none")
    return generalized(tensor, thinned, factors, scale=scale, consensus=True, normalize=normalize)


def della_linear(
    tensor: Tensor,
    *,
    density: Densities = 0.5,
    epsilon: Fractions = 0.15,
    scale: Scale = 1.0,
    normalize: bool = False,
    rescale: SampleRescaling = "probability",
) -> Known:
    """DELLA without sign election: theta = theta_0 + lambda sum_i w_i m_i tau_i / p_i; arguments as `della`.

    Source: as `della`, without the step "elect"; mergekit's `della_linear`.
    """
    thinned = sample(tensor, density, epsilon, unbiased=rescale == "probability")
    factors = rescaling(tensor, thinned, density, "norm" if rescale == "norm" else "none")
    return generalized(tensor, thinned, factors, scale=scale, consensus=False, normalize=normalize)
