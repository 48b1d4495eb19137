"""Linear combinations of models, to which many methods reduce once their coefficients are known."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_ordermerge.merge.methods.parts import Part
from jax_ordermerge.merge.methods.reductions import rounded


def combine(terms: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """Return sum_i w_i x_i, float32[*s].

    The terms are added in the order of the members, and every operation rounds.

    Args:
        terms: M arrays [*s].
        weights: [M].

    Example:
        >>> combine([jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])], jnp.array([1.0, 0.5])).tolist()
        [2.5, 4.0]
    """
    # why not `tensordot`: XLA chooses the order of its additions by shape and device
    total = rounded(weights[0] * terms[0].astype(jnp.float32))
    for i in range(1, len(terms)):
        total = total + rounded(weights[i] * terms[i].astype(jnp.float32))
    return total


def apply_linear(part: Part, *, coefficients: jax.Array, of: str) -> jax.Array:
    """Return sum_i c_i theta_i, or theta_0 + sum_i c_i tau_i for task vectors."""
    if of == "task_vectors":
        return part.base_float() + combine(part.task_vectors(), coefficients)
    return combine(part.members, coefficients)
