"""Model Breadcrumbs: drop the largest and the smallest elements of the task vectors.

Source: Davari and Belilovsky, "Model Breadcrumbs", https://arxiv.org/abs/2312.06795, the masks of
section 3.
"""

import functools
import math
from typing import Any

import jax
import numpy as np

from jax_ordermerge.merge.methods import sparse_task_arithmetic
from jax_ordermerge.merge.methods.parameters import Count, Densities, Finite, Fractions, per_member
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method
from jax_ordermerge.merge.methods.top_k import find_largest, is_largest, magnitudes, places


def band(tensor: Tensor, density: Densities, gamma: Fractions, at_least: int) -> Prepared:
    """Find the floor(density n) magnitudes of each task vector below the floor(gamma n) largest.

    Where fewer are left below those, fewer of the largest are dropped. At least `at_least` elements
    are kept. So a tensor loses everything only if `at_least` is 0 and it has fewer than 1 / density
    elements.

    Returns:
        The arguments of `apply_band`; an empty dict where everything is kept.
    """
    size = math.prod(tensor.shape)
    densities = per_member(density, tensor.count)
    gammas = per_member(gamma, tensor.count)
    # Exact numbers and no quantiles: in bfloat16 many magnitudes tie, see `ties.trim`. What is kept
    # goes before what is dropped at the top, so that a small tensor is not emptied by gamma.
    keep = np.minimum(np.maximum(np.floor(densities * size), at_least), size).astype(np.int64)
    top = np.minimum(np.floor(gammas * size).astype(np.int64), size - keep)
    # a density of 1: no pass that counts, and the program without masks
    if keep.min() >= size:
        return {}
    # the band lies between two cuts: below the `top` largest, among the `top + keep` largest
    return find_largest(tensor, np.concatenate([top, top + keep]), _magnitudes_twice)


def _magnitudes_twice(part: Part) -> list[jax.Array]:
    # two cuts per member, found in the same passes
    return 2 * magnitudes(part)


def apply_band(part: Part, **cuts: Any) -> list[jax.Array]:
    """Return the task vectors without what `band` drops."""
    place, count = places(part), len(part.members)
    # cuts 0 .. M-1 are the lower ends of the tops, M .. 2M-1 those of the bands
    masks = [
        is_largest(bits, place, cuts, count + i) & ~is_largest(bits, place, cuts, i)
        for i, bits in enumerate(magnitudes(part))
    ]
    return sparse_task_arithmetic.apply_masks(part, masks)


def prepare(
    tensor: Tensor,
    *,
    elect: bool,
    density: Densities = 0.9,
    gamma: Fractions = 0.01,
    at_least: Count = 1,
    scale: Finite = 1.0,
    normalize: bool = False,
    rescale: sparse_task_arithmetic.Rescaling = "none",
) -> Prepared:
    """Model Breadcrumbs: theta = theta_0 + lambda sum_i w_i m_i tau_i, m_i a band of magnitudes.

    The parameters are mergekit's. The paper's beta, the quantile below which all is dropped, is
    1 - density - gamma. Masks are made within each tensor, as in the paper.

    Args:
        tensor: its weights are used as they are. 1/M by default.
        elect: add only the terms w_i m_i tau_i of the elected sign (`breadcrumbs_ties`): these
            masks in place of the trim of TIES-Merging.
        density: fraction of each task vector that is kept. The default is ours.
        gamma: fraction of the largest that is dropped; less where nothing is left to drop below.
        at_least: the least number of elements kept. mergekit: 0, so that a tensor of fewer than
            1 / density elements loses all.
        scale: lambda.
        normalize: divide by the sum of the weights: with election, of the members that agree.
        rescale: of the thinned task vectors, see `sparse_task_arithmetic.prepare`.
    """
    return sparse_task_arithmetic.prepare(
        tensor,
        apply_band,
        band(tensor, density, gamma, at_least),
        density=density,
        rescale=rescale,
        scale=scale,
        elect=elect,
        normalize=normalize,
    )


METHODS.register(
    "breadcrumbs",
    Method(
        functools.partial(prepare, elect=False), sparse_task_arithmetic.apply, "arXiv 2312.06795"
    ),
)
METHODS.register(
    "breadcrumbs_ties",
    Method(
        functools.partial(prepare, elect=True),
        sparse_task_arithmetic.apply,
        "arXiv 2312.06795 with 2306.01708",
    ),
)
