"""Means of directions on the sphere, at the mean length of the models.

The result lies in the span of the models. Its coefficients thus follow from their inner products,
in float64 on the host, and `apply` is a linear combination.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from jax_ordermerge.merge.methods.linear import apply_linear, gram_matrix
from jax_ordermerge.merge.methods.parameters import (
    NonNegative,
    Of,
    Positive,
    normalized_weights,
    weights_or_mean,
)
from jax_ordermerge.merge.methods.parts import Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method, Parameters

OPPOSITE = np.pi - 1e-6  # at this angle the direction from one point to the other is lost


def prepare_multislerp(
    tensor: Tensor, *, of: Of = "members", normalize: bool = True, eps: NonNegative = 1e-8
) -> Prepared:
    """Mean direction at the mean length: theta = (sum_i w_i |x_i|) m / |m|.

    m = sum_i w_i x_i / |x_i|, x_i the models or the task vectors. An x_i that is zero has no
    direction, and shortens the result.

    mergekit moves from m / |m| along the exponential map by the weighted mean of the logarithms at
    that point. This mean is 0, since m vanishes when projected on the tangent plane. Nothing is
    thus left out here.

    Args:
        tensor: its weights are 1/M by default.
        of: the models, or their task vectors (and add the base).
        normalize: divide the weights by their sum.
        eps: added to the lengths |x_i| that divide, and the least |m| that is a direction.

    Source: mergekit's `multislerp`.
    """
    weights = normalized_weights(tensor) if normalize else weights_or_mean(tensor)
    products = gram_matrix(tensor, of)
    lengths = np.sqrt(np.diag(products))
    direction = weights / np.where(lengths > 0, lengths + eps, 1)
    norm = np.sqrt(max(direction @ products @ direction, 0.0))
    # Where the directions cancel (rounding leaves up to 1e-7) the result is sum_i w_i x_i, so that
    # a tensor that no member changed stays at the base. mergekit does so for 2 models and stops
    # with an error for more.
    cancels = norm < max(eps, 1e-7)
    coefficients = weights if cancels else (weights @ lengths) / norm * direction
    return {"coefficients": np.float32(coefficients), "of": of}


def prepare_karcher(
    tensor: Tensor,
    *,
    of: Of = "members",
    max_iter: Annotated[int, Field(ge=0)] = 10,
    tol: Positive = 1e-5,
) -> Prepared:
    """Karcher mean: theta = (sum_i w_i |x_i|) mu, mu the unit vector of least sum_i w_i angle^2.

    The angle is that between mu and x_i. From mu = m / |m| as in `multislerp`, repeat
    mu <- exp_mu(sum_i w_i log_mu(x_i / |x_i|)). An x_i that is zero has no direction, and shortens
    the result. One that is opposite to mu is skipped. Where |m| is below `tol`, the first x_i is
    the start.

    Args:
        tensor: its weights are divided by their sum. 1/M by default. mergekit has equal weights
            only.
        of: the models, or their task vectors (and add the base).
        max_iter: the largest number of iterations.
        tol: stop at a step shorter than this, in radians.

    Source: Karcher, "Riemannian center of mass and mollifier smoothing", CPAM 30 (1977); mergekit's
    `karcher`.
    """
    weights, products = normalized_weights(tensor), gram_matrix(tensor, of)
    lengths = np.sqrt(np.diag(products))
    # why not mergekit's |x_i| > tol: a small tensor of that length would become zero
    valid = lengths > 0
    coefficients = np.zeros(tensor.count)
    if valid.any() and weights[valid].sum() > 0:
        # everything below happens in the span of the models: M x M numbers instead of tensors
        cosines = products[np.ix_(valid, valid)] / np.outer(lengths[valid], lengths[valid])
        directed = weights[valid] / weights[valid].sum()
        mean = _mean_direction(cosines, directed, max_iter, tol)
        # all weights count in the length: models without a direction shorten the result
        coefficients[valid] = (weights @ lengths) * mean / lengths[valid]
    return {"coefficients": np.float32(coefficients), "of": of}


def _mean_direction(
    cosines: np.ndarray, weights: np.ndarray, max_iter: int, tol: float
) -> np.ndarray:
    """Return the Karcher mean sum_i a_i u_i of M unit vectors u_i, as its coefficients a.

    Args:
        cosines: <u_i, u_j>, float64[M, M]. All vectors here are coefficients of the u_i.
        weights: float64[M], with the sum 1.
        max_iter: see `prepare_karcher`.
        tol: see `prepare_karcher`.
    """

    def length(a: np.ndarray) -> float:
        return float(np.sqrt(max(a @ cosines @ a, 0.0)))

    mean = np.eye(len(weights))[0]
    if length(weights) >= tol:
        mean = weights / length(weights)
    for _ in range(max_iter):
        along = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(along)
        # Why no cut at small angles as in mergekit: the factor angle / sin(angle) is smooth at 0.
        # log_mu(u) = (angle / sin(angle)) (u - cos(angle) mu), and
        # numpy's sinc(x) is sin(pi x) / (pi x).
        factors = np.where(angles < OPPOSITE, weights / np.sinc(angles / np.pi), 0)
        # the sum of the logarithms: its part along the mean is removed
        step = factors - (factors @ along) * mean
        size = length(step)
        if size < tol:
            break
        # exp_mu(v) = cos(|v|) mu + sin(|v|) v / |v|
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / length(mean)  # rounding would add up over the iterations
    return mean


def _of_task_vectors(parameters: Parameters) -> bool:
    return bool(parameters["of"] == "task_vectors")


METHODS.register(
    "multislerp",
    Method(
        prepare_multislerp, apply_linear, "mergekit", needs_base=_of_task_vectors, weights="mean"
    ),
)
METHODS.register(
    "karcher",
    Method(
        prepare_karcher,
        apply_linear,
        "Karcher, CPAM 30 (1977)",
        needs_base=_of_task_vectors,
        weights="mean",
    ),
)
