"""How much several models differ: in their loss, in the losses of single items, in their answers.

Members that differ by order, by initialization or by both are compared by these numbers. Axis
letters here: `M` model, `n` item.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jax_ordermerge.analysis.result import TAILS, Undetermined


@dataclass(frozen=True)
class Spread:
    """Spread of the losses of several models.

    Attributes:
        models: their number M.
        sd: standard deviation between models of the loss.
        low, high: bounds of its 95 % interval, for losses that are normal over models.
        item_sd: the same of a single item: root of its mean variance between models.
        difficulty_sd: standard deviation between items of their mean over models.
    """

    models: int
    sd: float
    low: float
    high: float
    item_sd: float
    difficulty_sd: float


@dataclass(frozen=True)
class Agreement:
    """Agreement of several models on which items they answer correctly, mean over pairs.

    Attributes:
        share: of the items on which two models are both right or both wrong.
        kappa: Cohen's kappa, agreement beyond that of unrelated answers of the same accuracy.
            Pairs that unrelated answers would agree on always are left out; None without any.
    """

    share: float
    kappa: float | None


def spread(losses: ArrayLike, weights: np.ndarray | None = None) -> Spread:
    """Return the spread between models.

    Args:
        losses: [M, n] of the same items.
        weights: [n], for example tokens per item.

    Raises:
        Undetermined: fewer than two models or items.

    Example:
        >>> result = spread([[1.0, 2.0, 3.0], [1.2, 2.2, 3.2]])
        >>> round(result.sd, 3), round(result.low, 3), round(result.item_sd, 3)
        (0.141, 0.063, 0.141)
    """
    values = np.asarray(losses, np.float64)
    if min(values.shape) < 2:
        raise Undetermined("a spread needs two models and two items")
    count = len(values)
    sd = float(np.average(values, axis=1, weights=weights).std(ddof=1))
    # (M - 1) s^2 / sigma^2 is chi-squared on M - 1, so its upper tail gives the lower bound
    low, high = (
        sd * float(np.sqrt((count - 1) / stats.chi2.ppf(tail, count - 1))) for tail in TAILS[::-1]
    )
    item_sd = float(np.sqrt(np.average(values.var(axis=0, ddof=1), weights=weights)))
    return Spread(count, sd, low, high, item_sd, float(values.mean(axis=0).std(ddof=1)))


def agreement(correct: ArrayLike) -> Agreement:
    """Return the agreement of models on the same items.

    Args:
        correct: bool[M, n].

    Raises:
        Undetermined: fewer than two models, or no items.

    Example:
        >>> agreement([[1, 1, 0, 0], [1, 0, 0, 0]])
        Agreement(share=0.75, kappa=0.5)

    Source: Cohen, "A coefficient of agreement for nominal scales", 1960.
    """
    answers = np.asarray(correct, bool)
    if len(answers) < 2 or answers.shape[1] < 1:
        raise Undetermined("an agreement needs two models and an item")
    shares, kappas = [], []
    for first, second in itertools.combinations(answers, 2):
        share, p, q = (first == second).mean(), first.mean(), second.mean()
        by_chance = p * q + (1 - p) * (1 - q)
        shares.append(share)
        if by_chance < 1:
            kappas.append((share - by_chance) / (1 - by_chance))
    return Agreement(float(np.mean(shares)), float(np.mean(kappas)) if kappas else None)
