"""Task arithmetic: a weighted sum of task vectors, added to the base.

Source: Ilharco et al., "Editing models with task arithmetic", https://arxiv.org/abs/2212.04089,
section 2.
"""

import jax
import numpy as np

from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.parameters import Finite, weights_or_mean
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import rounded
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare(tensor: Tensor, *, scale: Finite = 1.0, normalize: bool = False) -> Prepared:
    """Task arithmetic: theta = theta_0 + lambda sum_i w_i tau_i, with tau_i = theta_i - theta_0.

    Args:
        tensor: its weights are used as they are. 1/M by default: lambda = 1 is then the average,
            where the paper has a sum.
        scale: lambda.
        normalize: divide by the sum of the weights.
    """
    # 1/M and not 1: with a sum the length of the merged task vector would grow with M
    weights = weights_or_mean(tensor)
    divisor = weights.sum() if normalize else 1
    # divided in float64 and rounded once
    return {"weights": np.float32(weights), "scale": np.float32(scale / divisor)}


def apply(part: Part, *, weights: jax.Array, scale: jax.Array) -> jax.Array:
    """Return theta_0 + scale sum_i w_i tau_i."""
    return part.base_float() + rounded(scale * combine(part.task_vectors(), weights))


METHODS.register("task_arithmetic", Method(prepare, apply, "arXiv 2212.04089, section 2"))
