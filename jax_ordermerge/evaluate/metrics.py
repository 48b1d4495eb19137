"""Means over items with standard errors."""

import math
from collections.abc import Sequence

import numpy as np

from jax_ordermerge.errors import UserError


def accuracy(correct: Sequence[bool]) -> tuple[float, float]:
    """Return the share of correct answers and its standard error `sqrt(p (1 - p) / n)`.

    Raises:
        UserError: there are no answers.

    Example:
        >>> accuracy([True, True, True, False])
        (0.75, 0.21650635094610965)
    """
    # Without items the mean would be NaN, which looks like a result.
    if not len(correct):
        raise UserError("no answers to score; the task has no items, check its data and limit")
    share = float(np.mean(np.asarray(correct, bool)))
    return share, float(np.sqrt(share * (1 - share) / len(correct)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of at least one value and its standard error.

    Example:
        >>> mean_and_error([0.0, 1.0])
        (0.5, 0.5)
    """
    mean, count = sum(values) / len(values), len(values)
    squares = sum((value - mean) ** 2 for value in values)
    # One value has no spread; 0 instead of a division by 0.
    return mean, (squares / max(count - 1, 1) / count) ** 0.5


def perplexity(nats: float) -> float:
    """Return exp of a mean loss in nats, at most that of 700.

    Example:
        >>> perplexity(0.0), perplexity(1e9) == perplexity(700.0)
        (1.0, True)
    """
    # exp of more than 709 overflows float64 on a broken model, and JSON has no infinity
    return math.exp(min(nats, 700.0))


def ratio_and_error(numerators: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the ratio of two sums over items and its standard error.

    Items are the sampling unit. The error is that of the residuals `x_i - ratio * c_i` (the ratio
    estimator), because the counts vary between items as well.

    Example:
        >>> ratio_and_error([1.0, 3.0], [1, 1])
        (2.0, 1.0)
    """
    total, n = sum(counts), len(counts)
    # fsum, so that the order of the items does not matter
    ratio = math.fsum(numerators) / total
    residuals = [x - ratio * count for x, count in zip(numerators, counts, strict=True)]
    return ratio, math.sqrt(math.fsum(x * x for x in residuals) * n / max(n - 1, 1)) / total
