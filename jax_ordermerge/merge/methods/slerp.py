"""Spherical interpolation of two models, along the arc between them.

An arc lies in the plane of its ends. Its coefficients thus follow from three inner products: per
tensor in float64 on the host, per row or column in float32 within each part.

Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; mergekit's `slerp` and
`nuslerp`.
"""

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jax_ordermerge.merge.methods.linear import apply_linear, gram_matrix
from jax_ordermerge.merge.methods.parameters import Of, Position, weights_or_ones
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import rounded, sum_along
from jax_ordermerge.merge.methods.table import METHODS, Method, Parameters, Unit

Granularity = Literal["tensor", "row", "column"]
Cosine = Annotated[float, Field(gt=0, le=1)]
Zero = Literal["line", "right_angle"]

# Cosines nearer to 1 leave no difference between arc and line in float32. Nearer to -1 the plane of
# the arc is rounding noise.
STRAIGHT = 1 - 2.0**-22


def prepare_slerp(
    tensor: Tensor, *, t: Position = 0.5, lerp_above: Cosine | None = None, zero: Zero = "line"
) -> Prepared:
    """Interpolate: theta = (sin((1-t) Omega) theta_1 + sin(t Omega) theta_2) / sin Omega.

    Omega is the angle between the models. Both keep their lengths in the formula, as in mergekit.
    Models of one direction, and opposite ones (which no single arc joins), are interpolated along
    the line (1-t) theta_1 + t theta_2.

    Args:
        tensor: of 2 members. Takes no weights.
        t: 0 is the first model (mergekit's base), 1 the second.
        lerp_above: take the line where |cos Omega| exceeds this. mergekit has 0.9995. None leaves
            only what float32 cannot distinguish.
        zero: a model of zeros has no direction: take the line, or (mergekit) an angle of 90
            degrees.
    """
    # why no 0.9995 by default: fine-tunes of one base have cosines on both sides of it, so that one
    # model would mix two formulas
    coefficients = _arc(gram_matrix(tensor, "members"), t, lerp_above, zero)
    return {"coefficients": coefficients, "of": "members"}


def prepare_nuslerp(
    tensor: Tensor,
    *,
    of: Of = "members",
    granularity: Granularity = "tensor",
    lerp_above: Cosine | None = None,
    zero: Zero = "line",
) -> Prepared:
    """Interpolate by weights: as `slerp` with t = w_2 / (w_1 + w_2), of models or task vectors.

    Args:
        tensor: of 2 members. Its weights are 1 each by default. Where their sum is 0, t is 1/2.
        of: interpolate the models, or their task vectors (and add the base).
        granularity: what has a direction of its own: the tensor, each row (along the last axis;
            mergekit's `nuslerp_flatten: false`), or each column (along the first axis; with
            `nuslerp_row_wise: true`). A vector is one row, and one column.
        lerp_above: as for `slerp`.
        zero: as for `slerp`. A task vector is zero where a member left everything at the base.
    """
    weights = weights_or_ones(tensor)
    t = weights[1] / weights.sum() if abs(weights.sum()) >= 1e-6 else 0.5
    if granularity == "tensor" or len(tensor.shape) < 2:
        coefficients = _arc(gram_matrix(tensor, of), t, lerp_above, zero)
        return {"coefficients": coefficients, "of": of, "granularity": "tensor"}
    return {
        "ends": np.array([1 - t, t], np.float32),
        # numbers as arrays: a recipe may give each layer its own without compiling again
        "above": np.float32(min(lerp_above or 1, STRAIGHT)),
        "zero": zero,
        "of": of,
        "granularity": granularity,
    }


def apply_nuslerp(part: Part, *, of: str, granularity: Granularity, **prepared: Any) -> jax.Array:
    """Combine linearly, or compute the arc of each row or column first."""
    if granularity == "tensor":
        return apply_linear(part, of=of, **prepared)
    first, second = part.task_vectors() if of == "task_vectors" else part.floats()
    axis = 0 if granularity == "column" else first.ndim - 1
    products = [
        sum_along(x * y, axis) for x, y in ((first, first), (second, second), (first, second))
    ]
    a, b = _arcs(products, **prepared)
    # rounded: a part of rows and the tensor are different programs
    merged = rounded(a * first) + rounded(b * second)
    return part.base_float() + merged if of == "task_vectors" else merged


def _arc(products: np.ndarray, t: float, lerp_above: float | None, zero: Zero) -> np.ndarray:
    """Return the coefficients of the two ends, float32[2], from their inner products [2, 2]."""
    lengths, ends = np.sqrt(np.diag(products)), np.array([1 - t, t])
    # divided by one length after the other: their product may overflow or underflow
    cosine = 0.0 if zero == "right_angle" else 1.0
    if lengths.all():
        cosine = float(np.clip(products[0, 1] / lengths[0] / lengths[1], -1, 1))
    if abs(cosine) > min(lerp_above or 1, STRAIGHT):
        return ends.astype(np.float32)
    angle = np.arccos(cosine)
    # no division by 0: |cos| is at most 1 - 2^-22 here
    return (np.sin(ends * angle) / np.sin(angle)).astype(np.float32)


def _arcs(
    products: list[jax.Array], ends: jax.Array, above: jax.Array, zero: Zero
) -> tuple[jax.Array, jax.Array]:
    """Return the coefficients as `_arc` does, for many arcs: products <a, a>, <b, b>, <a, b>."""
    # two roots: in float32 the product of two squared lengths may overflow or underflow
    lengths = jnp.sqrt(products[0]) * jnp.sqrt(products[1])
    no_direction = 0.0 if zero == "right_angle" else 1.0
    cosine = jnp.where(lengths > 0, jnp.clip(products[2] / lengths, -1, 1), no_direction)
    straight = jnp.abs(cosine) > above
    # From sine and cosine: in float32 arccos alone loses half of the digits of a small angle. The
    # sine is factored: 1 - cos^2 would round the square first and cancel near |cos| = 1.
    sine = jnp.sqrt((1 - cosine) * (1 + cosine))
    angle = jnp.arctan2(sine, cosine)
    a, b = (
        jnp.where(straight, end, jnp.sin(end * angle) / jnp.where(straight, 1, sine))
        for end in (ends[0], ends[1])
    )
    return a, b


def vector_unit(parameters: Parameters) -> Unit:
    """Return what a part may be where a tensor, each row or each column is one vector."""
    # the tensor's direction is known in advance; a row's is computed within a part that holds the
    # row; a column's needs all rows
    units: dict[str, Unit] = {"tensor": "element", "row": "row", "column": "tensor"}
    return units[parameters["granularity"]]


METHODS.register(
    "slerp",
    Method(
        prepare_slerp,
        apply_linear,
        "Shoemake, SIGGRAPH 1985",
        needs_base=lambda parameters: False,
        weights="none",
        members=(2, 2),
    ),
)
METHODS.register(
    "nuslerp",
    Method(
        prepare_nuslerp,
        apply_nuslerp,
        "mergekit",
        needs_base=lambda parameters: bool(parameters["of"] == "task_vectors"),
        members=(2, 2),
        unit=vector_unit,
    ),
)
