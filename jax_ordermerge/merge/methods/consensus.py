"""Consensus Merging: keep the elements that enough members use.

Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
https://arxiv.org/abs/2405.07813: TALL-masks and Consensus Merging.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.parameters import (
    Finite,
    NonNegatives,
    per_member,
    weights_or_mean,
)
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import rounded
from jax_ordermerge.merge.methods.table import METHODS, Method, Parameters


def prepare(
    tensor: Tensor,
    *,
    threshold: NonNegatives = 0.4,
    k: Annotated[int, Field(ge=1)] = 2,
    scale: Finite = 1.0,
) -> Prepared:
    """Consensus Merging: theta = theta_0 + scale / M c tau, with tau = M sum_i w_i tau_i.

    c_j is 1 where at least k members use element j. Member i uses it where
    |tau_ij| >= lambda_i |tau_j - tau_ij| (its TALL mask): its own change is no small part of the
    sum.

    Args:
        tensor: of at least k members. Its weights are 1/M by default; tau is then the sum of the
            task vectors, as in the paper.
        threshold: lambda, one for all members or one each. The paper chooses it on validation data;
            the default is ours.
        k: how many members must use an element. 1 drops elements that no member uses, 2 also those
            that only one uses.
        scale: 1 gives the average where c is 1. The paper's coefficient of the sum is scale / M.
    """
    # k is an array, not a Python int: another k would compile another program
    return {
        "weights": np.float32(weights_or_mean(tensor) * tensor.count),
        "scale": np.float32(scale / tensor.count),
        "threshold": np.float32(per_member(threshold, tensor.count)),
        "k": np.int32(k),
    }


def apply(
    part: Part, *, weights: jax.Array, scale: jax.Array, threshold: jax.Array, k: jax.Array
) -> jax.Array:
    """Add the multi-task vector where enough members use it."""
    task_vectors = part.task_vectors()
    # M times the mean, since the masks compare with the sum of the task vectors, as in the paper
    multi_task = combine(task_vectors, weights)
    # a count, since the masks need not be stored: each is used once
    users = jnp.zeros(multi_task.shape, jnp.int32)
    # the product is only compared: no addition follows that XLA could fuse it with (see `rounded`)
    for i, tau in enumerate(task_vectors):
        users = users + (jnp.abs(tau) >= threshold[i] * jnp.abs(multi_task - tau)).astype(jnp.int32)
    # theta_0 + (scale / M) c tau
    return part.base_float() + rounded(scale * jnp.where(users >= k, multi_task, 0.0))


def _check(parameters: Parameters, members: int, weights: np.ndarray | None) -> None:
    k = parameters["k"]
    if k > members:
        raise UserError(
            f"merge method consensus: k = {k} of {members} members keeps nothing; "
            f"give a k up to {members}"
        )


METHODS.register("consensus", Method(prepare, apply, "arXiv 2405.07813", check=_check))
