"""RAM: average the changes of each element over the members that made one.

Source: Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models",
https://arxiv.org/abs/2601.13572; mergekit's `ram` and `ramplus_tl`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.parameters import Finite, NonNegative
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import count_true
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare_ram(tensor: Tensor, *, epsilon: NonNegative = 1e-5) -> Prepared:
    """RAM: theta_j = theta_0j + sum_{i in C_j} tau_ij / |C_j|.

    C_j are the members that changed element j, |tau_ij| > epsilon. A change that one member alone
    made is taken as it is; changes of several members are averaged over these.

    Args:
        tensor: takes no weights.
        epsilon: the largest difference that is no change.
    """
    # `ramplus_tl` with factors of 1: one `apply` serves both
    return {"epsilon": np.float32(epsilon), "unique": np.ones(tensor.count, np.float32)}


def prepare_ramplus_tl(
    tensor: Tensor, *, r: Finite = 0.1, alpha: NonNegative = 0.2, epsilon: NonNegative = 1e-5
) -> Prepared:
    """RAM+ per tensor: `ram`, with unique changes scaled by 1 + r min(shared_i / unique_i, alpha).

    shared_i and unique_i count the elements that member i changed with others and alone.

    Args:
        tensor: takes no weights.
        r: how much unique changes are enlarged.
        alpha: the largest ratio.
        epsilon: the largest difference that is no change.
    """
    shared, unique = np.split(tensor.total(_shared_and_unique, np.float32(epsilon)), 2)
    # a member without unique changes has no element to which its factor applies
    factors = 1 + r * np.minimum(shared / np.maximum(unique, 1), alpha)
    return {"epsilon": np.float32(epsilon), "unique": np.float32(factors)}


def apply(part: Part, *, epsilon: jax.Array, unique: jax.Array) -> jax.Array:
    """Average the changes; `unique` are the factors of changes that one member alone made."""
    task_vectors = part.task_vectors()
    changed, count = _changed(task_vectors, epsilon)
    changes = [jnp.where(flag, tau, 0.0) for flag, tau in zip(changed, task_vectors, strict=True)]
    # where one member changed an element, the sum has one term, and 1 x tau is exact
    ones = jnp.ones(len(task_vectors), jnp.float32)
    # `where` computes both branches everywhere: without the maximum, elements that nobody changed
    # would divide by 0
    return part.base_float() + jnp.where(
        count > 1,
        combine(changes, ones) / jnp.maximum(count, 1).astype(jnp.float32),
        combine(changes, unique),
    )


def _changed(
    task_vectors: list[jax.Array], epsilon: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Return which elements each member changed, M arrays bool[*s], and by how many, int32[*s]."""
    # strictly greater, as in mergekit: with epsilon = 0 an equal element is no change
    changed = [jnp.abs(tau) > epsilon for tau in task_vectors]
    count = changed[0].astype(jnp.int32)
    for flag in changed[1:]:
        count = count + flag.astype(jnp.int32)
    return changed, count


def _shared_and_unique(part: Part, epsilon: jax.Array) -> jax.Array:
    changed, count = _changed(part.task_vectors(), epsilon)
    shared = [flag & (count > 1) for flag in changed]
    # both halves in one pass over the models
    return count_true(shared + [flag & (count == 1) for flag in changed])


METHODS.register("ram", Method(prepare_ram, apply, "arXiv 2601.13572", weights="none"))
METHODS.register(
    "ramplus_tl", Method(prepare_ramplus_tl, apply, "arXiv 2601.13572", weights="none")
)
