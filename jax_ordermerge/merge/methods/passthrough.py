"""Passthrough: a model as it is, e.g. for some layers of a recipe.

Source: mergekit's `passthrough`.
"""

import jax
import numpy as np

from jax_ordermerge.merge.methods.parameters import Finites, per_member
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare(tensor: Tensor, *, scale: Finites | None = None) -> Prepared:
    """Take a model as it is: theta = scale theta_1.

    Args:
        tensor: of one member. Takes no weights.
        scale: a factor. None keeps every bit.
    """
    # A recipe gives a list, one number per member; there is one member. `per_member` also refuses a
    # longer list.
    return {} if scale is None else {"scale": np.float32(per_member(scale, tensor.count)[0])}


def apply(part: Part, *, scale: jax.Array | None = None) -> jax.Array:
    """Return the member, multiplied if there is a factor."""
    # without a factor no arithmetic: even times 1 in float32 would quiet a NaN
    return part.members[0] if scale is None else scale * part.floats()[0]


METHODS.register(
    "passthrough",
    Method(
        prepare,
        apply,
        "mergekit",
        needs_base=lambda parameters: False,
        weights="none",
        members=(1, 1),
    ),
)
