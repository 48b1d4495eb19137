"""DELLA: drop elements of the task vectors at random, small ones more often (MagPrune).

Source: Deep et al., "DELLA-Merging", https://arxiv.org/abs/2406.11617: drop, elect, fuse.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.errors import UserError
from jax_ordermerge.hash_rng import random_bits
from jax_ordermerge.merge.methods import sparse_task_arithmetic
from jax_ordermerge.merge.methods.dare import last_kept
from jax_ordermerge.merge.methods.parameters import Densities, Finite, Fractions, per_member
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.row_ranks import row_ranks
from jax_ordermerge.merge.methods.table import METHODS, Method, Parameters
from jax_ordermerge.merge.methods.top_k import magnitudes

Rescaling = Literal["probability", "norm", "none"]


def _middle_and_half(
    density: Densities, epsilon: Fractions, members: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and half the range of the probabilities of each member, float64[M] each."""
    middle = per_member(density, members)
    # a density of 1 keeps all, whatever epsilon
    return middle, np.where(middle == 1, 0, per_member(epsilon, members))


def _check(parameters: Parameters, members: int, weights: np.ndarray | None) -> None:
    """Refuse probabilities outside of (0, 1]."""
    middle, half = _middle_and_half(parameters["density"], parameters["epsilon"], members)
    for d, e in zip(middle.tolist(), half.tolist(), strict=True):
        if d - e <= 0 or d + e > 1:
            raise UserError(
                f"density = {d} and epsilon = {e} give probabilities from {d - e:.4g} to "
                f"{d + e:.4g}; choose epsilon below {min(d, 1 - d):.4g}"
            )


def sample(tensor: Tensor, density: Densities, epsilon: Fractions) -> Prepared:
    """Return the thresholds of `apply_sample`; an empty dict keeps all, as a density of 1 does.

    An element whose magnitude has the rank r = 0 .. n-1 in its row of n is kept with probability
    p = density - epsilon + 2 epsilon r / (n - 1), in steps of 2^-32; density where n = 1. The
    paper's drop rate is 1 - p.
    """
    middle, half = _middle_and_half(density, epsilon, tensor.count)
    if (middle == 1).all():
        return {}
    # rows as in mergekit: what one index of the first axis holds
    width = math.prod(tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape)
    # a row of one element has one rank and no spread of probabilities; mergekit stops there
    half = half if width > 1 else 0 * half
    low = last_kept(middle - half)
    # whole steps: the threshold of a rank is then exact in uint32 arithmetic
    step = (last_kept(middle + half) - low) // max(width - 1, 1)
    return {"low": low.astype(np.uint32), "step": step.astype(np.uint32)}


def _thresholds(part: Part, low: jax.Array, step: jax.Array) -> list[jax.Array]:
    """Return the largest hash that is kept of every element, M arrays uint32[*s]."""
    # no overflow: rank n - 1 gives at most the threshold of density + epsilon, below 2^32
    return [low[i] + step[i] * row_ranks(bits) for i, bits in enumerate(magnitudes(part))]


def apply_sample(part: Part, *, low: jax.Array, step: jax.Array) -> list[jax.Array]:
    """Keep element j of member i where the hash of (key, j, round = i) lies below p 2^32."""
    index = part.indices()
    masks = [
        random_bits(part.key_bits, index, i) <= threshold
        for i, threshold in enumerate(_thresholds(part, low, step))
    ]
    return sparse_task_arithmetic.apply_masks(part, masks)


def apply_sample_unbiased(part: Part, *, low: jax.Array, step: jax.Array) -> list[jax.Array]:
    """As `apply_sample`, with each kept element divided by its probability p."""
    index, thinned = part.indices(), []
    for i, (threshold, tau) in enumerate(
        zip(_thresholds(part, low, step), part.task_vectors(), strict=True)
    ):
        # The p of the threshold itself, in whole steps, since it was drawn with. The + 1 counts the
        # hash that is equal to the threshold, which is kept as well.
        probability = (threshold.astype(jnp.float32) + 1) * jnp.float32(2.0**-32)
        keep = random_bits(part.key_bits, index, i) <= threshold
        thinned.append(jnp.where(keep, tau / probability, 0.0))
    return thinned


def _prepare(
    tensor: Tensor, density: Densities, epsilon: Fractions, rescale: Rescaling, **settings: Any
) -> Prepared:
    return sparse_task_arithmetic.prepare(
        tensor,
        apply_sample_unbiased if rescale == "probability" else apply_sample,
        sample(tensor, density, epsilon),
        density=density,
        # the division by p is part of the thinning
        rescale="norm" if rescale == "norm" else "none",
        **settings,
    )


def prepare(
    tensor: Tensor,
    *,
    density: Densities = 0.5,
    epsilon: Fractions = 0.15,
    scale: Finite = 1.0,
    normalize: bool = True,
    rescale: Rescaling = "probability",
) -> Prepared:
    """DELLA: theta = theta_0 + lambda sum_{i in A} w_i m_i tau_i / p_i (/ sum_{i in A} w_i).

    A are the members of the elected sign. m_ij ~ Bernoulli(p_ij), with p_ij from density - epsilon
    for the smallest magnitude of a row to density + epsilon for the largest.

    Args:
        tensor: its weights are 1/M by default.
        density: mean probability to keep an element, 1 - the paper's drop rate. The default is
            ours.
        epsilon: half the range of the probabilities.
        scale: lambda.
        normalize: divide by the weights of the members that agree (mergekit's default).
        rescale: divide by each element's own probability (the paper), match the L1 norm of the task
            vector (mergekit), or none.
    """
    return _prepare(tensor, density, epsilon, rescale, scale=scale, elect=True, normalize=normalize)


def prepare_linear(
    tensor: Tensor,
    *,
    density: Densities = 0.5,
    epsilon: Fractions = 0.15,
    scale: Finite = 1.0,
    normalize: bool = False,
    rescale: Rescaling = "probability",
) -> Prepared:
    """DELLA without sign election: theta = theta_0 + lambda sum_i w_i m_i tau_i / p_i.

    Arguments as `prepare`. `normalize` divides by the sum of the weights.

    Source: as `prepare`, without the step "elect"; mergekit's `della_linear`.
    """
    return _prepare(
        tensor, density, epsilon, rescale, scale=scale, elect=False, normalize=normalize
    )


METHODS.register(
    "della",
    Method(
        prepare,
        sparse_task_arithmetic.apply,
        "arXiv 2406.11617",
        draws="drop",
        unit=lambda parameters: "row",
        check=_check,
    ),
)
METHODS.register(
    "della_linear",
    Method(
        prepare_linear,
        sparse_task_arithmetic.apply,
        "arXiv 2406.11617 without election",
        draws="drop",
        unit=lambda parameters: "row",
        check=_check,
    ),
)
