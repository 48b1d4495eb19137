"""Iso-C: the mean task vector with all its singular values made equal.

Source: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
Subspaces", https://arxiv.org/abs/2502.04959, algorithm 1.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jax_ordermerge.merge.methods import spectral
from jax_ordermerge.merge.methods.parameters import Finite, weights_or_mean
from jax_ordermerge.merge.methods.parts import AnyArray, Part, Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare(tensor: Tensor, *, scale: Finite = 1.0) -> Prepared:
    """Iso-C: theta = theta_0 + alpha s U V^T, with U S V^T = sum_i w_i tau_i and s the mean of S.

    The mean is over the values that are more than rounding: their sum, the nuclear norm, stays. The
    paper divides by the full rank, and fills the rest of it with vectors that rounding chooses.

    Tensors that are no matrices of a layer have theta = theta_0 + alpha sum_i w_i tau_i.

    Args:
        tensor: its weights are 1/M by default. With the sum of the paper, of weights 1, alpha means
            M times as much.
        scale: alpha.
    """
    return spectral.prepare(
        tensor, weights=np.float32(weights_or_mean(tensor)), scale=np.float32(scale)
    )


def merge(xp: ModuleType, task_vectors: Sequence[AnyArray], weights: AnyArray) -> AnyArray:
    """Return s U V^T, [m, n].

    Args:
        xp: numpy or jax.numpy.
        task_vectors: M matrices [m, n].
        weights: float32[M].
    """
    # one by one: numpy computes a task vector when it is read, and holds no list of them
    total = weights[0] * task_vectors[0]
    for index in range(1, len(task_vectors)):
        total = total + weights[index] * task_vectors[index]
    u, s, vt = spectral.svd(xp, total)
    is_significant = spectral.significant(xp, s, total.shape)
    # no value is significant where no member changed the matrix
    mean = (s * is_significant).sum() / xp.maximum(is_significant.sum(), 1)
    return mean * ((u * is_significant[None]) @ vt)


def apply(part: Part, *, weights: jax.Array, **prepared: Any) -> jax.Array:
    """Merge the whole tensor."""
    return spectral.apply(part, merge, [weights], weights=weights, **prepared)


METHODS.register(
    "iso_c",
    Method(
        prepare,
        apply,
        "arXiv 2502.04959, algorithm 1",
        unit=spectral.unit,
        workspace=lambda members: 64,
    ),
)
