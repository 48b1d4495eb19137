"""Controls: averages as long as something that they are compared with.

Averaging shortens task vectors: with a cosine rho between M members of one length, the mean has the
length sqrt((1 + (M-1) rho) / M). Selection and resampling do not shorten. These two methods have
the direction of the average, so a comparison with them separates the effect of length from the
effect of selection. Both are ours.
"""

from typing import Literal

import jax
import numpy as np

from jax_ordermerge.merge.methods import selection, task_arithmetic
from jax_ordermerge.merge.methods.linear import gram, gram_matrix, symmetric
from jax_ordermerge.merge.methods.parameters import normalized_weights, quantize, weights_or_ones
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare_norm_matched(tensor: Tensor) -> Prepared:
    """Average at the members' length: theta = theta_0 + s m with m = sum_i w_i tau_i.

    s = sum_i w_i |tau_i| / |m|, per tensor.

    Args:
        tensor: its weights are divided by their sum. 1/M by default.
    """
    weights = normalized_weights(tensor)
    products = gram_matrix(tensor, "task_vectors")
    length = weights @ np.sqrt(np.diag(products))
    # |m|^2 is a quadratic form of the inner products, which rounding may leave below 0
    mean = np.sqrt(max(weights @ products @ weights, 0.0))
    # Where the task vectors cancel, m has no direction worth lengthening. So a tensor that no
    # member changed stays at the base.
    scale = length / mean if mean > 1e-3 * length else 1
    return {"weights": np.float32(weights), "scale": np.float32(scale)}


def prepare_lambda_matched(
    tensor: Tensor,
    *,
    resample: selection.Rounds = "exhaustive",
    resample_from: Literal["all", "others"] = "all",
) -> Prepared:
    """Average as long as a selection along it: theta = theta_0 + lambda m with m = sum_i p_i tau_i.

    lambda = <tau_sel, m> / |m|^2, per tensor. tau_sel is the task vector of `selection` with the
    same seed, weights and parameters. It is drawn again and not stored.

    Args:
        tensor: its weights are the probabilities p. 1/M by default.
        resample: of the selection, element by element. Without resampling lambda is 1 up to the
            noise of the draw.
        resample_from: of the selection.
    """
    p, weights = quantize(weights_or_ones(tensor)), normalized_weights(tensor)
    # one pass over the models gives the products with the selection as well
    products = symmetric(
        tensor.total(_gram_with_selected, p, resample=resample, resample_from=resample_from),
        tensor.count + 1,
    )
    # |m|^2 and <tau_sel, m>: the last row and column of the products are those of the selection
    square, along = weights @ products[:-1, :-1] @ weights, weights @ products[:-1, -1]
    scale = along / square if square > 0 else 1  # 1 where no member changed anything
    return {"weights": np.float32(weights), "scale": np.float32(scale)}


def _gram_with_selected(
    part: Part,
    probabilities: jax.Array,
    *,
    resample: int | str,
    resample_from: Literal["all", "others"],
) -> list[jax.Array]:
    """Return the inner products of the task vectors, that of the selection last."""
    selected = selection.apply(
        part,
        weights=probabilities,
        resample=resample,
        resample_from=resample_from,
        granularity="element",
    )
    return gram(part._replace(members=(*part.members, selected)), of="task_vectors")


METHODS.register(
    "norm_matched",
    Method(
        prepare_norm_matched,
        task_arithmetic.apply,
        "the average at the members' length",
        weights="mean",
    ),
)
METHODS.register(
    "lambda_matched",
    Method(
        prepare_lambda_matched,
        task_arithmetic.apply,
        "the average at the length of a selection",
        weights="probabilities",
        # the stream of `selection`: with one seed both draw the same members
        draws="select",
    ),
)
