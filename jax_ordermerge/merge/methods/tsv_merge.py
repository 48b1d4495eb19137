"""TSV-Merge: the top singular vectors of each task vector, made orthogonal to those of the others.

Source: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging",
https://arxiv.org/abs/2412.00081, algorithm 1.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jax_ordermerge.merge.methods import spectral
from jax_ordermerge.merge.methods.parameters import Density, Finite
from jax_ordermerge.merge.methods.parts import AnyArray, Part, Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare(tensor: Tensor, *, density: Density | None = None, scale: Finite = 1.0) -> Prepared:
    """TSV-Merge: theta = theta_0 + alpha U' S V'^T.

    U = [U_1 .. U_M], S and V hold the top k singular vectors and values of each task vector side by
    side. U' and V' are the nearest matrices with orthonormal columns: P Q^T of U = P D Q^T.

    Tensors that are no matrices of a layer have theta = theta_0 + alpha mean_i tau_i.

    Args:
        tensor: takes no weights.
        density: share of the singular values that is kept of each task vector, at least one. None
            is 1/M, as in the paper: the members together then fill the rank of the matrix.
        scale: alpha.
    """
    # of no matrix the rank is not asked for, and a scalar has none
    rank = min(tensor.shape) if spectral.is_spectral(tensor) else 1
    # 1/M by a division of integers: 6 * (1 / 3) may round below 2
    top_k = rank // tensor.count if density is None else int(density * rank)
    weights = np.full(tensor.count, 1 / tensor.count, np.float32)
    return spectral.prepare(tensor, weights=weights, scale=np.float32(scale), top_k=max(1, top_k))


def merge(xp: ModuleType, task_vectors: Sequence[AnyArray], *, top_k: int) -> AnyArray:
    """Return U' S V'^T, [m, n].

    Args:
        xp: numpy or jax.numpy.
        task_vectors: M matrices [m, n].
        top_k: k.
    """
    left, values, right = [], [], []
    for task_vector in task_vectors:
        u, s, vt = spectral.svd(xp, task_vector)
        # vectors of values that are rounding are noise of length one: beside vectors of other
        # members they would count in full
        is_kept = spectral.significant(xp, s, task_vector.shape)[:top_k]
        left.append(u[:, :top_k] * is_kept[None])
        values.append(s[:top_k] * is_kept)
        right.append(vt[:top_k].T * is_kept[None])
    u, v = (spectral.polar(xp, xp.concatenate(side, axis=1)) for side in (left, right))
    return (u * xp.concatenate(values)[None]) @ v.T


def apply(part: Part, **prepared: Any) -> jax.Array:
    """Merge the whole tensor."""
    return spectral.apply(part, merge, **prepared)


METHODS.register(
    "tsv_merge",
    Method(
        prepare,
        apply,
        "arXiv 2412.00081, algorithm 1",
        weights="none",
        unit=spectral.unit,
        workspace=lambda members: 80,
    ),
)
