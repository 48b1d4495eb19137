"""Weighted average of models.

Source: Wortsman et al., "Model soups", https://arxiv.org/abs/2203.05482, uniform soup; mergekit's
`linear`.
"""

import jax
import numpy as np

from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.parameters import weights_or_ones
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare(tensor: Tensor, *, normalize: bool = True) -> Prepared:
    """Weighted average: theta = sum_i w_i theta_i / sum_i w_i.

    Args:
        tensor: its weights are 1 each by default. `check_weights` refuses a sum of zero.
        normalize: false leaves out the division.
    """
    weights = weights_or_ones(tensor)
    # one division at the end: equal weights then give the correctly rounded mean, which weights of
    # 1/M would not
    divisor = weights.sum() if normalize else 1
    return {"weights": np.float32(weights), "divisor": np.float32(divisor)}


def apply(part: Part, *, weights: jax.Array, divisor: jax.Array) -> jax.Array:
    """Return sum_i w_i theta_i / divisor."""
    return combine(part.members, weights) / divisor


METHODS.register(
    "average",
    Method(
        prepare,
        apply,
        "arXiv 2203.05482, uniform soup",
        needs_base=lambda parameters: False,
        weights="mean",
    ),
)
