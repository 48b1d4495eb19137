"""SCE: select elements by their variance over the members, calculate weights, erase a minority.

Source: Wan et al., "FuseChat", https://arxiv.org/abs/2408.07990; mergekit's `sce`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.parameters import Count, Density, NonNegative
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import block_sums, count_true, rounded
from jax_ordermerge.merge.methods.table import METHODS, Method
from jax_ordermerge.merge.methods.top_k import find_largest, is_largest, places


def prepare(
    tensor: Tensor,
    *,
    select_topk: Density = 1.0,
    at_least: Count = 1,
    floor: NonNegative = 0.0,
) -> Prepared:
    """SCE: theta = theta_0 + sum_{i in A} eta_i s tau_i / sum_{i in A} eta_i.

    s_j is 1 for the elements of largest variance over the members (select). The weight of a member
    is the energy of its task vector, eta_i = mean_j (s_j tau_ij)^2 / sum of these means
    (calculate). A are the members whose s tau_i has the sign of sum_i s tau_i (erase).

    Args:
        tensor: of M members. Takes no weights.
        select_topk: fraction of the elements of positive variance that is selected. 1 selects all
            elements.
        at_least: the least number selected. mergekit: 0, which leaves a tensor of few elements at
            the base.
        floor: where the sum of the means is below it the weights are 1/M, and no divisor is below
            it. mergekit has 1e-6, so that fine-tunes of common size, where tau^2 is 1e-8, all get
            the weight 1/M. By default only exact zeros do.
    """
    cut: Prepared = {}
    if select_topk < 1:
        varied = int(tensor.total(_count_varied))
        # in float32 as in mergekit
        keep = min(max(int(np.float32(varied) * np.float32(select_topk)), at_least), varied)
        cut = find_largest(tensor, np.array([keep]), _variances)
    # a second pass: the energies are those of the selected elements
    energies = tensor.total(_energies, cut, selects=bool(cut))
    total = energies.sum()
    # a sum that overflowed does not determine the weights either
    usable = 0 < total < math.inf and total >= floor * math.prod(tensor.shape)
    eta = energies / total if usable else np.full(tensor.count, 1 / tensor.count)
    return {"weights": np.float32(eta), "floor": np.float32(floor), "selects": bool(cut), **cut}


def apply(
    part: Part, *, weights: jax.Array, floor: jax.Array, selects: bool, **cut: jax.Array
) -> jax.Array:
    """Add the selected elements that agree in sign, weighted."""
    task_vectors = _selected(part, cut, selects)
    # the sign is elected by the task vectors themselves, and not by the weighted ones as in TIES
    positive = combine(task_vectors, jnp.ones(len(task_vectors), jnp.float32)) >= 0
    # strict: an exact zero agrees with no sign, so its member does not count in the divisor
    agree = [jnp.where(positive, tau > 0, tau < 0) for tau in task_vectors]
    total = combine(
        [jnp.where(flag, tau, 0.0) for flag, tau in zip(agree, task_vectors, strict=True)], weights
    )
    # in one program with `total`: the agreeing weights are summed in the same order
    divisor = jnp.maximum(combine(agree, weights), floor)
    return part.base_float() + total / jnp.where(divisor == 0, 1.0, divisor)


def _selected(part: Part, cut: Prepared, selects: bool) -> list[jax.Array]:
    task_vectors = part.task_vectors()
    if not selects:
        return task_vectors
    selected = is_largest(_variance(task_vectors), places(part), cut, 0)
    return [jnp.where(selected, tau, 0.0) for tau in task_vectors]


def _variance(task_vectors: list[jax.Array]) -> jax.Array:
    """Return the bits of M times the variance over the members, uint32[*s].

    It is 0 where all members agree, and where it underflows.
    """
    # differences from the first member: where all agree these are exactly 0, and a variance about a
    # rounded mean would not be
    shifted = [tau - task_vectors[0] for tau in task_vectors]
    # rounded: one program finds the cut and another uses it; both must agree to the last bit
    mean = rounded(functools.reduce(jnp.add, shifted) * jnp.float32(1 / len(task_vectors)))
    square = functools.reduce(jnp.add, [rounded((x - mean) * (x - mean)) for x in shifted])
    # Without the division by M, which does not change the order. No square is negative, so the
    # order of the bits is that of the numbers.
    return jax.lax.bitcast_convert_type(square, jnp.uint32)


def _variances(part: Part) -> list[jax.Array]:
    return [_variance(part.task_vectors())]


def _count_varied(part: Part) -> jax.Array:
    return count_true([_variance(part.task_vectors()) > 0])[0]


def _energies(part: Part, cut: Prepared, *, selects: bool) -> jax.Array:
    return jnp.stack([block_sums(tau * tau) for tau in _selected(part, cut, selects)])


METHODS.register("sce", Method(prepare, apply, "arXiv 2408.07990", weights="none"))
