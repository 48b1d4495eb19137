"""Sparse task arithmetic: thin the task vectors, rescale them, elect a sign, add.

TIES, DARE, Breadcrumbs and DELLA are this equation with different masks:

    theta = theta_0 + lambda sum_i a_i w_i s_i m_i tau_i (/ sum_i a_i w_i)

with masks m_i, factors s_i of the rescaling and, with sign election, a_i = 1 where w_i s_i m_i
tau_i has the elected sign. Without election all a_i are 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.parameters import Densities, per_member, weights_or_mean
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import block_sums, rounded

Rescaling = Literal["density", "norm", "none"]
Thin = Callable[..., list[jax.Array]]  # `(part, **arrays)` -> m_i tau_i, M arrays float32[*s]


def apply_masks(part: Part, masks: Sequence[jax.Array]) -> list[jax.Array]:
    """Return m_i tau_i, M arrays float32[*s]."""
    return [jnp.where(mask, tau, 0.0) for mask, tau in zip(masks, part.task_vectors(), strict=True)]


def prepare(
    tensor: Tensor,
    thin: Thin,
    arrays: Prepared,
    *,
    density: Densities,
    rescale: Rescaling,
    scale: float,
    elect: bool,
    normalize: bool,
) -> Prepared:
    """Return what `apply` needs.

    Args:
        tensor: its weights are 1/M by default.
        thin: thins the task vectors, a function at module level.
        arrays: what `thin` takes. An empty dict keeps everything.
        density: fraction of the elements that `thin` keeps.
        rescale: how s_i makes up for thinned elements: divide by the density (DARE), match the L1
            norm of the task vector (mergekit), or not at all.
        scale: lambda.
        elect: whether signs are elected.
        normalize: divide by the sum of the weights: with election, of the members that agree.
    """
    densities = per_member(density, tensor.count)
    factors = np.ones(tensor.count)
    if arrays and rescale == "density":
        # unbiased: the expectation of a random m_i tau_i is density tau_i
        factors = 1 / densities
    elif arrays and rescale == "norm":
        # in float32 on the device, added in float64: the ratio of two sums of many elements
        before, after = tensor.total(_norms, arrays, thin=thin)
        # a member that kept everything, or lost everything, has no factor to match
        matched = (before > 0) & (after > 0) & (densities < 1)
        factors = np.where(matched, before / np.where(matched, after, 1), 1)
    # `thin`, `elect` and `normalize` select a program; all else are arrays
    return {
        **arrays,
        "thin": thin if arrays else None,
        "weights": np.float32(weights_or_mean(tensor)),
        "factors": np.float32(factors),
        "scale": np.float32(scale),
        "elect": elect,
        "normalize": normalize,
    }


def _norms(part: Part, arrays: Prepared, *, thin: Thin) -> jax.Array:
    """Return the L1 norms of the task vectors before and after thinning, [2, M, blocks, 32]."""
    return jnp.stack(
        [
            jnp.stack([block_sums(jnp.abs(x)) for x in vectors])
            for vectors in (part.task_vectors(), thin(part, **arrays))
        ]
    )


def apply(
    part: Part,
    *,
    weights: jax.Array,
    factors: jax.Array,
    scale: jax.Array,
    thin: Thin | None,
    elect: bool,
    normalize: bool,
    **arrays: Any,
) -> jax.Array:
    """Merge by the equation at the top of this module."""
    thinned = part.task_vectors() if thin is None else thin(part, **arrays)
    # not `rounded`: the next operation on it is a product as well, never an addition
    deltas = [factors[i] * delta for i, delta in enumerate(thinned)]
    if elect:
        merged = disjoint_sum(deltas, weights, normalize)
    else:
        merged = combine(deltas, weights)
        if normalize:
            # the weights are added as the terms are, in float32 and in the order of the members
            total = combine([jnp.float32(1)] * len(deltas), weights)
            # weights of both signs may sum to nothing; mergekit divides by 1 there
            merged = merged / jnp.where(jnp.abs(total) < 1e-8, 1.0, total)
    return part.base_float() + rounded(scale * merged)


def elect_sign(terms: Sequence[jax.Array]) -> jax.Array:
    """Return bool[*s]: whether sum_i x_i >= 0, the sign with the larger total magnitude.

    Args:
        terms: M weighted task vectors, float32[*s].

    Example:
        >>> elect_sign([jnp.array([1.0, -3.0, 0.0]), jnp.array([-2.0, 1.0, 0.0])]).tolist()
        [False, False, True]

    Source: TIES-Merging, step 2. A sum of 0 elects + as in mergekit; the paper leaves it open.
    """
    return functools.reduce(jnp.add, terms) >= 0


def disjoint_sum(deltas: Sequence[jax.Array], weights: jax.Array, normalize: bool) -> jax.Array:
    """Add the weighted task vectors that have the elected sign.

    Args:
        deltas: M task vectors, float32[*s]. An exact zero never has the elected sign.
        weights: float32[M].
        normalize: divide by the weights of the members that have the sign.

    Example:
        >>> disjoint_sum(jnp.array([[1.0, 0.0], [-2.0, 4.0]]), jnp.array([1.0, 1.0]), True).tolist()
        [-2.0, 4.0]

    Source: TIES-Merging, step 3.
    """
    # rounded: the sign is elected by the same bits that are added
    terms = [rounded(weights[i] * delta) for i, delta in enumerate(deltas)]
    positive = elect_sign(terms)
    agree = [jnp.where(positive, term > 0, term < 0) for term in terms]
    total = functools.reduce(
        jnp.add, [jnp.where(flag, term, 0.0) for flag, term in zip(agree, terms, strict=True)]
    )
    if not normalize:
        return total
    # weights of both signs may cancel, and where no member agrees the sum is empty
    divisor = functools.reduce(
        jnp.add, [jnp.where(flag, weights[i], 0.0) for i, flag in enumerate(agree)]
    )
    return total / jnp.where(divisor == 0, 1.0, divisor)
