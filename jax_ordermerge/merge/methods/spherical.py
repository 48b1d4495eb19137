"""Merges by direction and length: arcs (SLERP), means on the sphere, Model Stock.

The result lies in the span of the models, so their inner products, found in one pass, say everything: coefficients follow from them
in float64 on the host, and a part is a linear combination. Row by row and column by column, they are computed within the part.
"""

import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods.average import Of, Scale, combine, equal_weights, linear_part
from jax_ordermerge.merge.methods.parts import (
    BLOCK,
    Part,
    Tensor,
    block_sums,
    fold,
    gram_matrix,
    rounded,
)

Known = dict[str, Any]
Vectors = Literal["tensor", "row", "column"]
Cosine = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Zero = Literal["line", "right_angle"]

# nearer to 1 the arc and the line are one in float32; nearer to -1 the plane of the arc is rounding noise
STRAIGHT = 1 - 2.0**-22
OPPOSITE = np.pi - 1e-6  # an angle at which the direction from one point to the other is lost


# ---------------------------------------------------------------------------------------------------------------------------- arcs


def slerp(
    tensor: Tensor, *, t: Scale = 0.5, lerp_above: Cosine | None = None, zero: Zero = "line"
) -> Known:
    """Spherical interpolation: theta = (sin((1-t) Omega) theta_1 + sin(t Omega) theta_2) / sin Omega, Omega the angle between them.

    The two models keep their lengths in the formula, as in mergekit. t = 0 is the first model (mergekit's base), t = 1 the second.
    Models of one direction, and opposite ones (which no single arc joins), are interpolated along the line (1-t) theta_1 + t theta_2.

    Args:
        tensor: of 2 members. Takes no weights.
        t: how far to go from the first to the second.
        lerp_above: take the line where |cos Omega| is above it; mergekit has 0.9995. None leaves only what float32 cannot tell apart.
        zero: a model that is zero has no direction: take the line, or (mergekit) an angle of 90 degrees.

    Source: Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985); mergekit's `slerp`.
    """
    # why no 0.9995 by default: fine-tunes of one base have cosines on both sides of it, so that one model would mix two formulas
    _refuse_weights("slerp", tensor)
    return {
        "coefficients": _arc(gram_matrix(tensor, "members"), t, lerp_above, zero),
        "of": "members",
    }


def nuslerp(
    tensor: Tensor,
    *,
    of: Of = "members",
    granularity: Vectors = "tensor",
    lerp_above: Cosine | None = None,
    zero: Zero = "line",
) -> Known:
    """Spherical interpolation by weights: as `slerp` with t = w_2 / (w_1 + w_2), of models or of task vectors.

    Args:
        tensor: of 2 members. Its weights are 1 each by default; where their sum is 0, t is 1/2.
        of: interpolate the models, or their task vectors (and add the base).
        granularity: what has a direction of its own: the tensor, each row (along the last axis; mergekit's `nuslerp_flatten: false`),
            or each column (along the first axis; with `nuslerp_row_wise: true`). A vector is one row, and one column.
        lerp_above, zero: as for `slerp`; a task vector is zero where a member left everything at the base.

    Source: mergekit's `nuslerp`.
    """
    w = np.ones(2) if tensor.weights is None else tensor.weights
    t = w[1] / w.sum() if abs(w.sum()) >= 1e-6 else 0.5
    if granularity == "tensor" or len(tensor.shape) < 2:
        return {
            "coefficients": _arc(gram_matrix(tensor, of), t, lerp_above, zero),
            "of": of,
            "granularity": "tensor",
        }
    ends, above = np.array([1 - t, t], np.float32), np.float32(min(lerp_above or 1, STRAIGHT))
    return {"ends": ends, "above": above, "zero": zero, "of": of, "granularity": granularity}


def nuslerp_part(p: Part, *, of: str, granularity: Vectors, **known: Any) -> jax.Array:
    """Combine a part linearly, or find the arc of each row or column first."""
    if granularity == "tensor":
        return linear_part(p, of=of, **known)
    first, second = p.task_vectors() if of == "task_vectors" else p.floats()
    products = [
        _sums_along(x * y, granularity)
        for x, y in ((first, first), (second, second), (first, second))
    ]
    a, b = _arcs(products, **known)
    merged = rounded(a * first) + rounded(b * second)
    return p.base_float() + merged if of == "task_vectors" else merged


def _arc(products: np.ndarray, t: float, lerp_above: float | None, zero: Zero) -> np.ndarray:
    """Return the coefficients of the two ends, float32[2], from their inner products [2, 2]."""
    lengths, ends = np.sqrt(np.diag(products)), np.array([1 - t, t])
    cosine = 0.0 if zero == "right_angle" else 1.0
    if lengths.all():
        cosine = float(np.clip(products[0, 1] / lengths[0] / lengths[1], -1, 1))
    if abs(cosine) > min(lerp_above or 1, STRAIGHT):
        return ends.astype(np.float32)
    angle = np.arccos(cosine)
    return (np.sin(ends * angle) / np.sin(angle)).astype(np.float32)


def _arcs(
    products: list[jax.Array], ends: jax.Array, above: jax.Array, zero: Zero
) -> tuple[jax.Array, jax.Array]:
    """Return the coefficients of the two ends as `_arc` does, for many arcs at once: products <a, a>, <b, b>, <a, b>."""
    lengths = jnp.sqrt(products[0]) * jnp.sqrt(products[1])
    cosine = jnp.where(
        lengths > 0, jnp.clip(products[2] / lengths, -1, 1), 0.0 if zero == "right_angle" else 1.0
    )
    straight = jnp.abs(cosine) > above
    sine = jnp.sqrt((1 - cosine) * (1 + cosine))
    angle = jnp.arctan2(sine, cosine)
    a, b = (
        jnp.where(straight, end, jnp.sin(end * angle) / jnp.where(straight, 1, sine))
        for end in (ends[0], ends[1])
    )
    return a, b


# --------------------------------------------------------------------------------------------------------------- means on the sphere


def multislerp(
    tensor: Tensor, *, of: Of = "members", normalize: bool = True, eps: NotNegative = 1e-8
) -> Known:
    """The mean direction at the mean length: theta = (sum_i w_i |x_i|) m / |m|, m = sum_i w_i x_i / |x_i|, x_i models or task vectors.

    mergekit moves from m / |m| along the exponential map by the weighted mean of the logarithms at that point: but this mean is 0
    (projected on the tangent plane m vanishes), so nothing is left out here. An x_i that is zero has no direction, and shortens the
    result. Where the directions cancel, |m| below eps, the result is sum_i w_i x_i; so a tensor that no member changed stays at the
    base. (There mergekit does this for 2 models and stops with an error for more.)

    Args:
        tensor: its weights are 1/M by default.
        of: the models, or their task vectors (and add the base).
        normalize: divide the weights by their sum.
        eps: added to the lengths |x_i| that divide, and least |m| that is a direction.

    Source: mergekit's `multislerp`.
    """
    w = equal_weights(tensor)
    w = w / w.sum() if normalize else w
    products = gram_matrix(tensor, of)
    lengths = np.sqrt(np.diag(products))
    direction = w / np.where(lengths > 0, lengths + eps, 1)
    norm = np.sqrt(max(direction @ products @ direction, 0.0))
    # 1e-7: what rounding leaves of directions that cancel
    coefficients = w if norm < max(eps, 1e-7) else (w @ lengths) / norm * direction
    return {"coefficients": np.float32(coefficients), "of": of}


def karcher(
    tensor: Tensor,
    *,
    of: Of = "members",
    max_iter: Annotated[int, Field(ge=0)] = 10,
    tol: Positive = 1e-5,
) -> Known:
    """Karcher mean: theta = (sum_i w_i |x_i|) mu, mu the unit vector of least sum_i w_i angle(mu, x_i)^2.

    From mu = m / |m| as in `multislerp`, repeat mu <- exp_mu(sum_i w_i log_mu(x_i / |x_i|)). An x_i that is zero has no direction, and
    shortens the result; one that is opposite to mu is passed over. Where m is below `tol`, the first x_i is the start.

    Args:
        tensor: its weights are divided by their sum. 1/M by default.
        of: the models, or their task vectors (and add the base).
        max_iter: of the iterations, at most.
        tol: stop at a step shorter than this, in radians.

    Source: Karcher, "Riemannian center of mass and mollifier smoothing" (1977); mergekit's `karcher`, whose weights are equal.
    """
    w = equal_weights(tensor) / equal_weights(tensor).sum()
    products = gram_matrix(tensor, of)
    lengths = np.sqrt(np.diag(products))
    # why not mergekit's |x_i| > tol: a small tensor of that length would become zero
    valid = lengths > 0
    coefficients = np.zeros(tensor.count)
    if valid.any() and w[valid].sum() > 0:
        cosines = products[np.ix_(valid, valid)] / np.outer(lengths[valid], lengths[valid])
        coefficients[valid] = (
            (w @ lengths)
            * _spherical_mean(cosines, w[valid] / w[valid].sum(), max_iter, tol)
            / lengths[valid]
        )
    return {"coefficients": np.float32(coefficients), "of": of}


def _spherical_mean(cosines: np.ndarray, w: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """Return the Karcher mean of M unit vectors as its coefficients, float64[M]; a vector sum_i a_i u_i is its a throughout."""

    def length(a: np.ndarray) -> float:
        return float(np.sqrt(max(a @ cosines @ a, 0.0)))

    mean = w / length(w) if length(w) >= tol else np.eye(len(w))[0]
    for _ in range(max_iter):
        along = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(along)
        # why no cut at small angles as in mergekit: the factor angle / sin(angle) is smooth at 0
        factors = np.where(angles < OPPOSITE, w / np.sinc(angles / np.pi), 0)
        step = factors - (factors @ along) * mean
        size = length(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / length(mean)
    return mean


# ---------------------------------------------------------------------------------------------------------------------- Model Stock


def model_stock(
    tensor: Tensor,
    *,
    granularity: Literal["tensor", "row"] = "tensor",
    norm_floor: NotNegative = 0.0,
    t_floor: Scale | None = 0.0,
) -> Known:
    """Model Stock: theta = theta_0 + t m, m = mean_i tau_i, t = M c / (1 + (M-1) c), c the mean cosine between task vectors.

    A task vector that is zero has the cosine 0 with all others; a tensor that no member changed stays at the base.

    Args:
        tensor: of at least 2 members. Takes no weights.
        granularity: t for the tensor, or for each row (along the last axis; mergekit's `filter_wise: true`). A vector is one row.
        norm_floor: least |tau_i| |tau_j| that divides in a cosine. mergekit has 1e-6, which sends small tensors to the base.
        t_floor: least t. Where c < 0 the formula extrapolates away from the members, without limit as c nears -1 / (M-1); None
            allows it (mergekit), 0 gives the base there.

    Source: Jang et al., "Model Stock: All we need is just a few fine-tuned models" (arXiv 2403.19522), the interpolation ratio; mergekit's `model_stock`.
    """
    _refuse_weights("model_stock", tensor)
    if granularity == "row" and len(tensor.shape) > 1:
        floors = np.array([norm_floor, -np.inf if t_floor is None else t_floor], np.float32)
        return {"floors": floors, "granularity": "row"}
    products = gram_matrix(tensor, "task_vectors")
    i, j = np.triu_indices(tensor.count, 1)
    divisors = np.maximum(np.sqrt(products[i, i] * products[j, j]), norm_floor)
    cosine = np.mean(np.clip(products[i, j] / np.where(divisors > 0, divisors, 1), -1, 1))
    below = 1 + (tensor.count - 1) * cosine
    t = tensor.count * cosine / below if abs(below) >= 1e-6 else 0.0
    t = t if t_floor is None else max(t, t_floor)
    return {
        "coefficients": np.full(tensor.count, t / tensor.count, np.float32),
        "granularity": "tensor",
    }


def model_stock_part(p: Part, *, granularity: str, **known: Any) -> jax.Array:
    """Combine a part linearly, or find the t of each row first."""
    if granularity == "tensor":
        return linear_part(p, of="task_vectors", **known)
    task_vectors, count = p.task_vectors(), len(p.members)
    t = _stock_ratios(
        [
            [_sums_along(task_vectors[i] * task_vectors[j], "row") for j in range(i, count)]
            for i in range(count)
        ],
        **known,
    )
    return p.base_float() + rounded(
        t * combine(task_vectors, jnp.full(count, 1 / count, jnp.float32))
    )


def _stock_ratios(products: list[list[jax.Array]], floors: jax.Array) -> jax.Array:
    """Return t from <tau_i, tau_j>, the rows of the upper triangle."""
    count = len(products)
    norms = [jnp.sqrt(row[0]) for row in products]
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            divisor = jnp.maximum(norms[i] * norms[j], floors[0])
            cosines.append(jnp.clip(products[i][j - i] / jnp.where(divisor > 0, divisor, 1), -1, 1))
    total = functools.reduce(jnp.add, cosines)
    # M c / (1 + (M-1) c) with c = total / pairs, pairs = M (M-1) / 2
    below = count + 2 * total
    t = 2 * count / (count - 1) * total / jnp.where(jnp.abs(below) < 1e-6 * count, jnp.inf, below)
    return jnp.maximum(t, floors[1])


# -------------------------------------------------------------------------------------------------------------------------- helpers


def _sums_along(x: jax.Array, granularity: str) -> jax.Array:
    """Sum each row (last axis) or column (first axis) in one fixed order of additions, as `block_sums` does; the axis is kept.

    Args:
        x: float32[*s] of at least 2 axes.
    """
    axis = 0 if granularity == "column" else x.ndim - 1
    x = jnp.moveaxis(rounded(x), axis, -1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)])
    sums = fold(block_sums(x)).reshape(*x.shape[:-1], -1)
    while sums.shape[-1] > 1:
        half = -(-sums.shape[-1] // 2)
        rest = jnp.pad(sums[..., half:], [(0, 0)] * (x.ndim - 1) + [(0, 2 * half - sums.shape[-1])])
        sums = sums[..., :half] + rest
    return jnp.moveaxis(sums, -1, axis)


def _refuse_weights(name: str, tensor: Tensor) -> None:
    if tensor.weights is not None:
        raise UserError(
            f"merge method {name} takes no weights, {tensor.weights.tolist()} were given; leave them out"
        )
