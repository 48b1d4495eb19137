"""Types of the methods' parameters, and how weights and per-member parameters are read."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods.parts import Tensor

# merges are computed in float32, where larger numbers are infinite
FLOAT32_MAX = float(np.finfo(np.float32).max)
Finite = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX, allow_inf_nan=False)]
NonNegative = Annotated[Finite, Field(ge=0)]
Positive = Annotated[Finite, Field(gt=0)]
# a density of 0 would keep nothing, and 1 / density is a factor
Density = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# a place between two models, both included
Position = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
# one number for all members, or one per member
Densities = Density | list[Density]
Fractions = Fraction | list[Fraction]
NonNegatives = NonNegative | list[NonNegative]
Finites = Finite | list[Finite]
# what is combined: the models theta_i, or the task vectors tau_i, whose result is added to the base
Of = Literal["members", "task_vectors"]

# 2^16, so that 16 random bits times a sum of units fit into 32 bits (docs/random_choice.md)
PROBABILITY_UNITS = 1 << 16  # probabilities are multiples of 2^-16


def per_member(value: float | list[float], members: int) -> np.ndarray:
    """Return a parameter as float64[M]. `table.check_weights` refuses lists of another length."""
    return np.broadcast_to(np.asarray(value, np.float64), members)


def weights_or_ones(tensor: Tensor) -> np.ndarray:
    """Return float64[M]: the weights as given, by default 1 each."""
    return np.ones(tensor.count) if tensor.weights is None else tensor.weights


def weights_or_mean(tensor: Tensor) -> np.ndarray:
    """Return float64[M]: the weights as given, by default 1/M each."""
    return np.full(tensor.count, 1 / tensor.count) if tensor.weights is None else tensor.weights


def normalized_weights(tensor: Tensor) -> np.ndarray:
    """Return float64[M]: the weights divided by their sum, by default 1/M each."""
    return weights_or_mean(tensor) / weights_or_mean(tensor).sum()


def quantize(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return probabilities as multiples of 2^-16, by the method of largest remainders.

    A draw from them is integer arithmetic throughout, so every device draws the same member.

    Args:
        weights: [M], not negative, with a positive sum.

    Returns:
        uint32[M] with sum 65536.

    Raises:
        UserError: a weight is negative, the sum is not positive, or a positive weight is too small
            to be drawn.

    Example:
        >>> quantize([1, 1, 1]).tolist(), quantize([0, 1]).tolist()
        ([21846, 21845, 21845], [0, 65536])
    """
    values = np.asarray(weights, np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise UserError(
            f"selection weights {values.tolist()}: probabilities are not negative and their sum is "
            "positive; change the weights"
        )
    # Rounding each probability alone would miss the sum 2^16. The floors fall short of it by fewer
    # than M units, which go to the largest remainders.
    exact = values / values.sum() * PROBABILITY_UNITS
    units = np.floor(exact).astype(np.int64)
    # stable: equal remainders go to the first members, on every platform
    by_remainder = np.argsort(-(exact - units), kind="stable")
    units[by_remainder[: PROBABILITY_UNITS - units.sum()]] += 1
    # an error: the user asks for a member, and it would silently never be drawn
    if ((units == 0) & (values > 0)).any():
        raise UserError(
            f"selection weights {values.tolist()}: a probability is below "
            f"1/{2 * PROBABILITY_UNITS}; make it 0 or larger"
        )
    return units.astype(np.uint32)
