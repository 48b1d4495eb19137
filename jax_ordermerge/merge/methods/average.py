"""Weighted sums of models: theta = sum_i c_i theta_i, and theta_0 + sum_i c_i tau_i. Float32, members added in fixed order."""

import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods.parts import Part, Tensor, gram, gram_matrix, rounded
from jax_ordermerge.merge.methods.selection import Rounds, quantize, selection_part

Scale = Annotated[float, Field(allow_inf_nan=False)]
Of = Literal[
    "members", "task_vectors"
]  # what is merged: the models theta_i, or their task vectors, added to the base


def combine(terms: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """Return sum_i w_i x_i, float32[*s], added in the order of the members, each operation rounded.

    Args:
        terms: M arrays [*s].
        weights: [M].

    Example:
        >>> combine([jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])], jnp.array([1.0, 0.5])).tolist()
        [2.5, 4.0]
    """
    total = rounded(weights[0] * terms[0].astype(jnp.float32))
    for i in range(1, len(terms)):
        total = total + rounded(weights[i] * terms[i].astype(jnp.float32))
    return total


def equal_weights(tensor: Tensor) -> np.ndarray:
    """Return float64[M]: the weights as given, or 1/M each."""
    return np.full(tensor.count, 1 / tensor.count) if tensor.weights is None else tensor.weights


def linear_part(p: Part, *, coefficients: jax.Array, of: str) -> jax.Array:
    """Return sum_i c_i theta_i, or for task vectors theta_0 + sum_i c_i tau_i."""
    if of == "task_vectors":
        return p.base_float() + combine(p.task_vectors(), coefficients)
    return combine(p.members, coefficients)


def average(tensor: Tensor, *, normalize: bool = True) -> dict[str, Any]:
    """Weighted average: theta = sum_i w_i theta_i / sum_i w_i.

    Args:
        tensor: its weights are 1 each by default; the sum is not zero (`methods.check_weights` refuses that).
        normalize: false leaves out the division.

    Source: Wortsman et al., "Model soups" (arXiv 2203.05482), uniform soup; mergekit's `linear`.
    """
    w = np.ones(tensor.count) if tensor.weights is None else tensor.weights
    # w_i are multiplied in and one division follows: equal weights then give the correctly rounded mean
    return {"weights": np.float32(w), "divisor": np.float32(w.sum() if normalize else 1)}


def average_part(p: Part, *, weights: jax.Array, divisor: jax.Array) -> jax.Array:
    """Return sum_i w_i theta_i / divisor."""
    return combine(p.members, weights) / divisor


def task_arithmetic(
    tensor: Tensor, *, scale: Scale = 1.0, normalize: bool = False
) -> dict[str, Any]:
    """Task arithmetic: theta = theta_0 + lambda sum_i w_i tau_i, with tau_i = theta_i - theta_0.

    Args:
        tensor: its weights are used as they are. 1/M by default, so that lambda = 1 is the average.
        scale: lambda.
        normalize: divide by the sum of the weights.

    Source: Ilharco et al., "Editing models with task arithmetic" (arXiv 2212.04089), section 2.
    """
    w = equal_weights(tensor)
    return {"weights": np.float32(w), "scale": np.float32(scale / (w.sum() if normalize else 1))}


def task_arithmetic_part(p: Part, *, weights: jax.Array, scale: jax.Array) -> jax.Array:
    """Return theta_0 + scale sum_i w_i tau_i."""
    return p.base_float() + rounded(scale * combine(p.task_vectors(), weights))


def norm_matched(tensor: Tensor) -> dict[str, Any]:
    """The average at the members' length: theta = theta_0 + s m, m = sum_i w_i tau_i, s = sum_i w_i |tau_i| / |m|, tensor by tensor.

    Where the task vectors cancel, |m| below 1/1000 of the mean length, m has no direction worth lengthening and s is 1; so a
    tensor that no member changed stays at the base.

    Args:
        tensor: its weights are divided by their sum. 1/M by default.

    Source: ours. The average is shorter than its members, sqrt((1 + (M-1) rho) / M) at a cosine rho between them, and selection is
    not: this is the control that tells length from selection.
    """
    w = equal_weights(tensor) / equal_weights(tensor).sum()
    products = gram_matrix(tensor, "task_vectors")
    length, mean = w @ np.sqrt(np.diag(products)), np.sqrt(max(w @ products @ w, 0.0))
    return {
        "weights": np.float32(w),
        "scale": np.float32(length / mean if mean > 1e-3 * length else 1),
    }


def lambda_matched(
    tensor: Tensor,
    *,
    resample: Rounds = "exhaustive",
    resample_from: Literal["all", "others"] = "all",
) -> dict[str, Any]:
    """The average as long as a selection along it: theta = theta_0 + lambda m, lambda = <tau_sel, m> / |m|^2, m = sum_i p_i tau_i.

    tau_sel is the task vector of `selection` with the same seed, weights and parameters, drawn anew and not stored; lambda is found
    for each tensor. Where no member changed anything lambda is 1.

    Args:
        tensor: its weights are the probabilities p. 1/M by default.
        resample, resample_from: of the selection, element by element. Without resampling lambda is 1 up to the noise of the draw.

    Source: ours. Resampling lengthens the task vector; this is the control that is lengthened alike but selects nothing.
    """
    p = quantize(np.ones(tensor.count) if tensor.weights is None else tensor.weights)
    w = equal_weights(tensor) / equal_weights(tensor).sum()
    size = tensor.count + 1
    upper = np.zeros((size, size))
    upper[np.triu_indices(size)] = np.array(
        tensor.total(_gram_with_selected, p, resample=resample, resample_from=resample_from)
    )
    products = upper + np.triu(upper, 1).T
    square, along = w @ products[:-1, :-1] @ w, w @ products[:-1, -1]
    return {"weights": np.float32(w), "scale": np.float32(along / square if square > 0 else 1)}


def _gram_with_selected(
    p: Part,
    probabilities: jax.Array,
    *,
    resample: int | str,
    resample_from: Literal["all", "others"],
) -> list[jax.Array]:
    """Return the inner products of the task vectors, that of the selection the last."""
    selected = selection_part(
        p,
        weights=probabilities,
        resample=resample,
        resample_from=resample_from,
        granularity="element",
    )
    return gram(p._replace(members=(*p.members, selected)), of="task_vectors")


def fisher(tensor: Tensor) -> dict[str, Any]:
    """Fisher-weighted average: theta_j = sum_i w_i F_ij theta_ij / sum_i w_i F_ij, element by element.

    Where no member has any information (all F_ij are 0), the weights alone decide.

    Args:
        tensor: of M models followed by the diagonals of their M Fisher matrices (see `train/fisher.py`); its weights, 2M numbers of
            which the first M count, are 1 each by default.

    Raises:
        UserError: the number of models is odd.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging" (arXiv 2111.09832), equation 5.
    """
    if tensor.count % 2:
        raise UserError(
            f"merge method fisher takes models and as many Fisher diagonals after them; {tensor.count} were given"
        )
    w = np.ones(tensor.count) if tensor.weights is None else tensor.weights
    return {"weights": np.float32(w[: tensor.count // 2])}


def fisher_part(p: Part, *, weights: jax.Array) -> jax.Array:
    """Return the average of the first half of the members, weighted by the second."""
    half = len(p.members) // 2
    models, information = p.floats()[:half], p.floats()[half:]
    matter = [rounded(weights[i] * information[i]) for i in range(half)]
    total = functools.reduce(jnp.add, matter)
    weighted = functools.reduce(
        jnp.add, [rounded(f * x) for f, x in zip(matter, models, strict=True)]
    )
    plain = combine(models, weights) / jnp.sum(weights)
    return jnp.where(total > 0, weighted / jnp.where(total > 0, total, 1.0), plain)
