"""Model Stock: the average, moved towards the base by how much the members disagree.

Source: Jang et al., "Model Stock: All we need is just a few fine-tuned models",
https://arxiv.org/abs/2403.19522, the interpolation ratio; mergekit's `model_stock`.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.merge.methods.linear import apply_linear, combine, gram_matrix
from jax_ordermerge.merge.methods.parameters import Finite, NonNegative
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import rounded, sum_along
from jax_ordermerge.merge.methods.slerp import vector_unit
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare(
    tensor: Tensor,
    *,
    granularity: Literal["tensor", "row"] = "tensor",
    norm_floor: NonNegative = 0.0,
    t_floor: Finite | None = 0.0,
) -> Prepared:
    """Model Stock: theta = theta_0 + t m with m = mean_i tau_i and t = M c / (1 + (M-1) c).

    c is the mean cosine between task vectors. A task vector that is zero has the cosine 0 with all
    others, so a tensor that no member changed stays at the base.

    Args:
        tensor: of at least 2 members. Takes no weights.
        granularity: one t per tensor, or per row (along the last axis; mergekit's
            `filter_wise: true`). A vector is one row.
        norm_floor: the least |tau_i| |tau_j| that divides in a cosine. mergekit has 1e-6, which
            sends small tensors to the base.
        t_floor: the least t. Where c < 0 the formula extrapolates away from the members, without
            limit as c nears -1 / (M-1). None allows this (mergekit), 0 gives the base there.
    """
    if granularity == "row" and len(tensor.shape) > 1:
        floors = np.array([norm_floor, -np.inf if t_floor is None else t_floor], np.float32)
        return {"floors": floors, "granularity": "row"}
    products = gram_matrix(tensor, "task_vectors")
    i, j = np.triu_indices(tensor.count, 1)
    # A zero task vector has zero products, so any positive divisor gives it the cosine 0. The clip
    # below undoes rounding beyond 1.
    divisors = np.maximum(np.sqrt(products[i, i] * products[j, j]), norm_floor)
    cosine = np.mean(np.clip(products[i, j] / np.where(divisors > 0, divisors, 1), -1, 1))
    below = 1 + (tensor.count - 1) * cosine
    # at the pole c = -1 / (M-1) the task vectors sum to nothing
    t = tensor.count * cosine / below if abs(below) >= 1e-6 else 0.0
    t = t if t_floor is None else max(t, t_floor)
    coefficients = np.full(tensor.count, t / tensor.count, np.float32)
    return {"coefficients": coefficients, "granularity": "tensor"}


def apply(part: Part, *, granularity: str, **prepared: Any) -> jax.Array:
    """Combine linearly, or compute the t of each row first."""
    if granularity == "tensor":
        return apply_linear(part, of="task_vectors", **prepared)
    task_vectors, count = part.task_vectors(), len(part.members)
    # a row is a vector along the last axis, which every part holds in full
    last_axis = task_vectors[0].ndim - 1
    products = [
        [sum_along(task_vectors[i] * task_vectors[j], last_axis) for j in range(i, count)]
        for i in range(count)
    ]
    t = _ratios(products, **prepared)
    mean = combine(task_vectors, jnp.full(count, 1 / count, jnp.float32))
    return part.base_float() + rounded(t * mean)


def _ratios(products: list[list[jax.Array]], floors: jax.Array) -> jax.Array:
    """Return t per row of the tensor, from the inner products of its task vectors.

    Args:
        products: <tau_i, tau_j>, the upper triangle row by row.
        floors: float32[2], the least product of norms and the least t.
    """
    count = len(products)
    # As in `prepare`, but in float32 and for every row: a part has complete rows, so that no sum
    # has to leave the device.
    norms = [jnp.sqrt(row[0]) for row in products]
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            divisor = jnp.maximum(norms[i] * norms[j], floors[0])
            cosines.append(jnp.clip(products[i][j - i] / jnp.where(divisor > 0, divisor, 1), -1, 1))
    total = functools.reduce(jnp.add, cosines)
    # M c / (1 + (M-1) c) with c = total / pairs and pairs = M (M-1) / 2. M times the divisor of
    # `prepare`, hence the pole within 1e-6 M; dividing by infinity gives t = 0.
    below = count + 2 * total
    t = 2 * count / (count - 1) * total / jnp.where(jnp.abs(below) < 1e-6 * count, jnp.inf, below)
    return jnp.maximum(t, floors[1])


METHODS.register(
    "model_stock",
    Method(
        prepare,
        apply,
        "arXiv 2403.19522",
        weights="none",
        members=(2, math.inf),
        unit=vector_unit,
    ),
)
