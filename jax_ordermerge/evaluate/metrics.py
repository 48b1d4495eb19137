"""Means over items with standard errors."""

import math
from collections.abc import Sequence

import numpy as np

from jax_ordermerge.errors import UserError


def accuracy(correct: Sequence[bool]) -> tuple[float, float | None]:
    """Return the share of correct answers and its standard error `sqrt(p (1 - p) / n)`.

    One answer has no spread: its error is None, undefined.

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
    if len(correct) < 2:
        return share, None
    return share, float(np.sqrt(share * (1 - share) / len(correct)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of at least one value and its standard error, None for one value.

    Example:
        >>> mean_and_error([0.0, 1.0]), mean_and_error([1.0])
        ((0.5, 0.5), (1.0, None))
    """
    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, None
    squares = sum((value - mean) ** 2 for value in values)
    return mean, (squares / (count - 1) / count) ** 0.5


def perplexity(nats: float) -> float:
    """Return exp of a mean loss in nats, at most that of 700.

    Example:
        >>> perplexity(0.0), perplexity(1e9) == perplexity(700.0)
        (1.0, True)
    """
    # exp of more than 709 overflows float64 on a broken model, and JSON has no infinity
    return math.exp(min(nats, 700.0))


def ratio_and_error(
    numerators: Sequence[float], counts: Sequence[float]
) -> tuple[float, float | None]:
    """Return the ratio of two sums over items and its standard error, None for one item.

    Items are the sampling unit. The error is that of the residuals `x_i - ratio * c_i` (the ratio
    estimator), because the counts vary between items as well.

    Example:
        >>> ratio_and_error([1.0, 3.0], [1, 1])
        (2.0, 1.0)
    """
    total, n = sum(counts), len(counts)
    # fsum, so that the order of the items does not matter
    ratio = math.fsum(numerators) / total
    if n < 2:
        return ratio, None
    residuals = [x - ratio * count for x, count in zip(numerators, counts, strict=True)]
    return ratio, math.sqrt(math.fsum(x * x for x in residuals) * n / (n - 1)) / total


def percent_and_error(share: float, error: float | None, sign: str = "+-") -> str:
    """Return a share and its standard error in per cent.

    Example:
        >>> percent_and_error(0.5, 0.25), percent_and_error(1.0, None)
        ('50.0 % +- 25.0', '100.0 % +- undefined')
    """
    return f"{100 * share:.1f} % {sign} {'undefined' if error is None else f'{100 * error:.1f}'}"
