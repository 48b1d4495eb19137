"""TIES: trim small changes, elect a sign per element, average the members that agree.

Source: Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708, algorithm 1.
"""

import math
from typing import Any

import jax
import numpy as np

from jax_ordermerge.merge.methods import sparse_task_arithmetic
from jax_ordermerge.merge.methods.parameters import Densities, Finite, per_member
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method
from jax_ordermerge.merge.methods.top_k import find_largest, is_largest, magnitudes, places


def trim(tensor: Tensor, density: Densities) -> Prepared:
    """Find the max(1, floor(density n)) largest magnitudes of each task vector, exactly.

    Returns:
        The arguments of `apply_trim`; an empty dict where everything is kept.
    """
    # at least one, so that a tensor of few elements does not lose all
    size = math.prod(tensor.shape)
    keep = [max(1, math.floor(d * size)) for d in per_member(density, tensor.count).tolist()]
    # Why an exact number: a quantile as a threshold keeps all of the many bfloat16 values that tie.
    # A bfloat16 task vector of 11.5 M elements had 1,126 distinct magnitudes, and 217,990 elements
    # tied at the cut.
    return {} if min(keep) >= size else find_largest(tensor, np.array(keep), magnitudes)


def apply_trim(part: Part, **cut: Any) -> list[jax.Array]:
    """Return the task vectors without what `trim` drops."""
    place = places(part)
    masks = [is_largest(bits, place, cut, i) for i, bits in enumerate(magnitudes(part))]
    return sparse_task_arithmetic.apply_masks(part, masks)


def prepare(
    tensor: Tensor,
    *,
    density: Densities = 0.2,
    scale: Finite = 1.0,
    normalize: bool = True,
    rescale: sparse_task_arithmetic.Rescaling = "none",
) -> Prepared:
    """TIES: theta = theta_0 + lambda sum_{i in A} w_i trim(tau_i) / sum_{i in A} w_i.

    A are the members whose w_i trim(tau_i) has the elected sign.

    Args:
        tensor: its weights are 1/M by default.
        density: fraction of each task vector that is kept. See `top_k.Place` for ties at the cut.
        scale: lambda.
        normalize: divide by the weights of the members that agree: a weighted mean, not a sum.
        rescale: of the trimmed task vectors, see `sparse_task_arithmetic.prepare`.
    """
    # trimmed within each tensor like mergekit; the paper ranks all parameters of the model together
    return sparse_task_arithmetic.prepare(
        tensor,
        apply_trim,
        trim(tensor, density),
        density=density,
        rescale=rescale,
        scale=scale,
        elect=True,
        normalize=normalize,
    )


METHODS.register(
    "ties", Method(prepare, sparse_task_arithmetic.apply, "arXiv 2306.01708, algorithm 1")
)
