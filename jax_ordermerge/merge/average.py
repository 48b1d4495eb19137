"""Weighted sums of members: the average and the combination of task vectors. Float32, members added in fixed order."""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from pydantic import Field

Scale = Annotated[float, Field(allow_inf_nan=False)]


def member_weights(members: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return float32[M]: the given weights, or 1/M each.

    Example:
        >>> member_weights(jnp.zeros((4, 2)), None).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    count = members.shape[0]
    return jnp.full(count, 1 / count, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)


def task_vectors(members: jax.Array, base: jax.Array) -> list[jax.Array]:
    """Return tau_i = theta_i - theta_0, M arrays float32[*S].

    Apart and not stacked: what follows is elementwise, and then XLA makes one pass of it.

    Example:
        >>> [tau.tolist() for tau in task_vectors(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones(2))]
        [[0.0, 1.0], [2.0, 3.0]]
    """
    return [member.astype(jnp.float32) - base.astype(jnp.float32) for member in members]


def combine(terms: jax.Array | Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """Return sum_i w_i x_i, float32[*S], added in the order of the members.

    Args:
        terms: [M, *S], or M arrays [*S].
        weights: [M].

    Example:
        >>> combine(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 0.5])).tolist()
        [2.5, 4.0]
    """
    total = weights[0] * terms[0].astype(jnp.float32)
    for i in range(1, len(terms)):
        total = total + weights[i] * terms[i].astype(jnp.float32)
    return total


def average(
    members: jax.Array, *, base: jax.Array | None = None, weights: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """Weighted average: theta = sum_i w_i theta_i / sum_i w_i.

    Args:
        members: [M, *S], any floating dtype.
        base, key: not used.
        weights: [M], equal by default; the sum is not zero (`methods.check_weights` refuses that).

    Returns:
        float32[*S].

    Example:
        >>> average(jnp.array([[1.0, 2.0], [3.0, 6.0]]), weights=jnp.array([3.0, 1.0])).tolist()
        [1.5, 3.0]

    Source: Wortsman et al., "Model soups" (arXiv 2203.05482), uniform soup; mergekit's `linear`.
    """
    w = jnp.ones(members.shape[0], jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    return combine(members, w) / jnp.sum(w)


def task_arithmetic(
    members: jax.Array,
    *,
    base: jax.Array,
    weights: jax.Array | None = None,
    key: jax.Array | None = None,
    scale: Scale = 1.0,
) -> jax.Array:
    """Task arithmetic: theta = theta_0 + lambda sum_i w_i tau_i, with tau_i = theta_i - theta_0.

    Args:
        members: [M, *S], any floating dtype.
        base: [*S], theta_0.
        weights: [M], used as they are. 1/M by default, so that lambda = 1 is the average.
        key: not used.
        scale: lambda.

    Returns:
        float32[*S].

    Example:
        >>> task_arithmetic(jnp.array([[2.0], [4.0]]), base=jnp.array([1.0]), scale=0.5).tolist()
        [2.0]

    Source: Ilharco et al., "Editing models with task arithmetic" (arXiv 2212.04089), section 2.
    """
    w = member_weights(members, weights)
    return base.astype(jnp.float32) + scale * combine(task_vectors(members, base), w)
