"""DARE: drop elements of the task vectors at random, and rescale the others.

Source: Yu et al., "Language Models are Super Mario", https://arxiv.org/abs/2311.03099, section 3.1
and equations 1 to 3.
"""

import functools

import jax
import numpy as np

from jax_ordermerge.hash_rng import random_bits
from jax_ordermerge.merge.methods import sparse_task_arithmetic
from jax_ordermerge.merge.methods.parameters import Densities, Finite, per_member
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method


def last_kept(probability: np.ndarray) -> np.ndarray:
    """Return round(p 2^32) - 1 as int64: hashes up to this are kept. A positive p is >= 2^-32."""
    # Inclusive, since p = 1 would be 2^32, which is no uint32. An integer on the host: mergekit
    # draws in the dtype of the tensor, where a density of 0.9 becomes 0.8984 in bfloat16.
    return np.maximum(np.round(probability * 2.0**32), 1).astype(np.int64) - 1


def drop(tensor: Tensor, density: Densities) -> Prepared:
    """Return the thresholds below which `apply_drop` keeps an element; an empty dict keeps all."""
    densities = per_member(density, tensor.count)
    # nothing to drop: the dense program is a sum, without a hash per element
    return {} if (densities == 1).all() else {"last": last_kept(densities).astype(np.uint32)}


def apply_drop(part: Part, *, last: jax.Array) -> list[jax.Array]:
    """Keep each element with probability `density`, independently.

    Element j of member i is kept where the hash of (key, j, round = i) lies below density 2^32
    (docs/random_choice.md).
    """
    # the member is the round of the hash, so that members drop independently
    index = part.indices()
    masks = [random_bits(part.key_bits, index, i) <= last[i] for i in range(len(part.members))]
    return sparse_task_arithmetic.apply_masks(part, masks)


def prepare(
    tensor: Tensor,
    *,
    elect: bool,
    density: Densities = 0.5,
    scale: Finite = 1.0,
    rescale: sparse_task_arithmetic.Rescaling = "density",
    normalize: bool = False,
) -> Prepared:
    """DARE: theta = theta_0 + lambda sum_i w_i m_i tau_i / density, m_ij ~ Bernoulli(density).

    Args:
        tensor: its weights are used as they are. 1/M by default.
        elect: add only the terms w_i m_i tau_i of the elected sign (`dare_ties`): DARE in place of
            the trim of TIES-Merging.
        density: probability to keep an element, 1 - the paper's drop rate p. The default is ours.
        scale: lambda.
        rescale: divide by the density (the paper), match the L1 norm (mergekit), or none.
        normalize: divide by the sum of the weights: with election, of the members that agree.
    """
    # The default divides by the density, which keeps the expectation (the paper); mergekit matches
    # the L1 norm instead, which `rescale: norm` does.
    return sparse_task_arithmetic.prepare(
        tensor,
        apply_drop,
        drop(tensor, density),
        density=density,
        rescale=rescale,
        scale=scale,
        elect=elect,
        normalize=normalize,
    )


METHODS.register(
    "dare_linear",
    Method(
        functools.partial(prepare, elect=False),
        sparse_task_arithmetic.apply,
        "arXiv 2311.03099, equations 1 to 3",
        draws="drop",
    ),
)
METHODS.register(
    "dare_ties",
    Method(
        functools.partial(prepare, elect=True),
        sparse_task_arithmetic.apply,
        "arXiv 2311.03099 with 2306.01708",
        draws="drop",
    ),
)
