"""KnOTS-TIES: TIES in a basis that the task vectors share.

Source: Stoica et al., "Model merging with SVD to tie the Knots", https://arxiv.org/abs/2410.19735,
section 4.
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


def prepare(tensor: Tensor, *, density: Density = 0.2, scale: Finite = 1.0) -> Prepared:
    """KnOTS-TIES: theta = theta_0 + alpha U ties(C_1 .. C_M), with [tau_1 .. tau_M] = U S V^T.

    C_i = S V_i^T are the coordinates of tau_i in the basis U. `ties` keeps the largest magnitudes
    of each C_i, elects a sign per element, and averages the members that have it.

    Tensors that are no matrices of a layer have theta = theta_0 + alpha mean_i tau_i.

    Args:
        tensor: takes no weights.
        density: share of the coordinates of each member that is kept, at least one.
        scale: alpha.
    """
    # per matrix, as our `ties`; the paper ranks the coordinates of all matrices together
    weights = np.full(tensor.count, 1 / tensor.count, np.float32)
    return spectral.prepare(
        tensor, weights=weights, scale=np.float32(scale), density=np.float32(density)
    )


def merge(xp: ModuleType, task_vectors: Sequence[AnyArray], density: AnyArray) -> AnyArray:
    """Return U ties(C_1 .. C_M), [m, n].

    Args:
        xp: numpy or jax.numpy.
        task_vectors: M matrices [m, n].
        density: float32.
    """
    u, s = spectral.left_vectors(xp, task_vectors)
    rows, columns = task_vectors[0].shape
    is_kept = spectral.significant(xp, s, (rows, columns * len(task_vectors)))
    # masked and not cut: where jax traces, shapes cannot depend on values
    basis = u * is_kept[None]
    # U^T tau_i = S V_i^T, so V is not needed
    coordinates = [basis.T @ task_vector for task_vector in task_vectors]
    return basis @ _elect(xp, coordinates, density * (is_kept.sum() * columns))


def merge_factors(
    factors: Sequence[tuple[np.ndarray, np.ndarray]], density: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `merge` returns of the matrices B_i A_i, as factors B [m, R] and A [R, n].

    R is the sum of the ranks, or m if that is less. No matrix [m, n] is decomposed, or formed.

    Args:
        factors: B_i [m, r_i] and A_i [r_i, n], float64.
        density: as in `merge`.

    Example:
        >>> b, a = np.array([[1.0], [0.0]]), np.array([[2.0, 0.0, 1.0]])
        >>> left, right = merge_factors([(b, a), (3 * b, a)], 1.0)
        >>> (left @ right).round(6).tolist()
        [[4.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    """
    # B_i = Q R_i, so the singular vectors of B_i A_i side by side are Q times those of R_i A_i
    q, triangle = np.linalg.qr(np.hstack([b for b, _ in factors]))
    ends = np.cumsum([b.shape[1] for b, _ in factors])[:-1]
    pieces = np.split(triangle, ends, axis=1)
    reduced = [piece @ a for piece, (_, a) in zip(pieces, factors, strict=True)]
    u, s = spectral.left_vectors(np, reduced)
    columns = reduced[0].shape[1]
    is_kept = spectral.significant(np, s, (len(q), columns * len(factors)))
    basis = u * is_kept[None]
    coordinates = [basis.T @ task_vector for task_vector in reduced]
    return q @ basis, _elect(np, coordinates, density * (is_kept.sum() * columns))


def _elect(xp: ModuleType, coordinates: Sequence[AnyArray], count: AnyArray) -> AnyArray:
    """Return the mean of the members that have the elected sign, of their largest coordinates.

    Args:
        xp: numpy or jax.numpy.
        coordinates: M matrices [r, n].
        count: how many are kept of each member, to be rounded. It is a part of what the basis
            spans: rows of zeros beyond the rank are no coordinates.
    """
    number = xp.maximum(xp.round(count), 1).astype(int)
    # the sign of the sum, as in TIES: large coordinates count for more than many small ones
    trimmed = [_trim(xp, values, number) for values in coordinates]
    sign = xp.sign(sum(trimmed))
    total, agreeing = xp.zeros_like(sign), xp.zeros_like(sign)
    for values in trimmed:
        agrees = (xp.sign(values) == sign) & (sign != 0)
        total = total + xp.where(agrees, values, 0)
        agreeing = agreeing + agrees
    # the mean over those that agree: others would shrink it, which TIES is to avoid
    return total / xp.maximum(agreeing, 1)


def _trim(xp: ModuleType, coordinates: AnyArray, count: AnyArray) -> AnyArray:
    """Return coordinates with all but the largest magnitudes set to zero."""
    magnitudes = xp.abs(coordinates)
    ascending = xp.sort(magnitudes.ravel())
    # coordinates are results of arithmetic: ties at the cut are rare, and are kept
    return xp.where(magnitudes >= ascending[ascending.size - count], coordinates, 0)


def apply(part: Part, *, density: jax.Array, **prepared: Any) -> jax.Array:
    """Merge the whole tensor."""
    return spectral.apply(part, merge, [density], **prepared)


METHODS.register(
    "knots",
    Method(
        prepare,
        apply,
        "arXiv 2410.19735, section 4",
        weights="none",
        unit=spectral.unit,
        workspace=lambda members: 64 + 24 * members,
    ),
)
