"""Two models on the same items: paired bootstrap of losses or scores, McNemar's exact test of right and wrong answers."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from jax_ordermerge.analysis.resample import BLOCK, TAILS
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream_key_bits

_LEAST = 1e-25  # p values that are searched for go no lower


def difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Return the mean of `first - second` over items with standard error, bootstrap interval and t-test p.

    The resamples depend on the seed and the number of items only, so that all comparisons on one set of items share them.

    Args:
        first, second: [n], losses or scores of the same items in the same order; the mean over several models is fine.
        weights: [n], e.g. tokens an item: the weighted mean, with the error of a ratio of means; items stay what is resampled.
        resamples: of the items.
        seed: of the run.

    Returns:
        `estimate`, `se` (over items), `low`, `high` (95 %, percentile), `p` (paired t-test, two-sided), `n`.

    Raises:
        UserError: different lengths, or fewer than two items.

    Example:
        >>> found = difference([1.0, 2.0, 4.0, 3.0], [1.5, 2.0, 4.5, 4.0])
        >>> found["estimate"], round(found["se"], 3), found["n"]
        (-0.5, 0.204, 4)
    """
    gaps = _pair(first, second)
    count = gaps.size
    share = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if share.shape != gaps.shape or not (share > 0).all():
        raise UserError(
            f"a paired comparison of {count} items got {share.size} weights; expected one above 0 for each item"
        )
    share = share / share.mean()
    generator = np.random.default_rng(stream_key_bits(seed, "analysis", "paired", count))
    step = max(1, BLOCK // count)
    blocks = []
    for start in range(0, resamples, step):
        rows = generator.integers(0, count, (min(step, resamples - start), count))
        blocks.append((gaps * share)[rows].sum(axis=1) / share[rows].sum(axis=1))
    means = np.concatenate(blocks)
    low, high = np.quantile(means, TAILS)
    estimate = float((gaps * share).mean())
    error = float((share * (gaps - estimate)).std(ddof=1) / np.sqrt(count))
    if error > 0:
        p = float(2 * stats.t.sf(abs(estimate / error), count - 1))
    else:
        # all items differ alike: what is left is the chance that n signs agree
        p = 1.0 if estimate == 0 else 2.0 ** (1 - count)
    return {
        "estimate": estimate,
        "se": error,
        "low": float(low),
        "high": float(high),
        "p": p,
        "n": count,
    }


def over_seeds(gap: Mapping[str, float], estimates: ArrayLike) -> dict[str, float]:
    """Return a difference that is a mean over random seeds, with their spread in its error, interval and p.

    The variance is that over items and that between the seeds over their number. Its quantiles are the mean of Student's for items and for
    seeds, weighted by the two variances, which errs on the safe side.

    Args:
        gap: of `difference`, of the mean over the seeds on each item.
        estimates: [S], the difference with each seed alone, S >= 2.

    Returns:
        as `difference`.

    Example:
        >>> gap = difference([1.0, 2.0, 4.0, 3.0], [1.5, 2.0, 4.5, 4.0])
        >>> (
        ...     round(over_seeds(gap, [-0.4, -0.6])["se"], 3),
        ...     round(over_seeds(gap, [-0.5, -0.5])["se"], 3),
        ... )
        (0.227, 0.204)

    Source: Cochran and Cox, "Experimental designs", 2nd edition 1957, section 4.14.
    """
    each = np.asarray(estimates, np.float64)
    items, seeds = gap["se"] ** 2, float(each.var(ddof=1)) / each.size
    if seeds == 0:
        return dict(gap)
    error = float(np.sqrt(items + seeds))

    def quantile(level: float) -> float:
        of_items, of_seeds = (
            float(stats.t.isf(level / 2, freedom)) for freedom in (gap["n"] - 1, each.size - 1)
        )
        return (items * of_items + seeds * of_seeds) / (items + seeds)

    reach, found = error * quantile(2 * TAILS[0]), abs(gap["estimate"]) / error
    if quantile(_LEAST) < found:
        p = _LEAST
    else:
        p = float(
            np.exp(
                optimize.brentq(
                    lambda power: quantile(float(np.exp(power))) - found, np.log(_LEAST), 0.0
                )
            )
        )
    return {
        **gap,
        "se": error,
        "low": gap["estimate"] - reach,
        "high": gap["estimate"] + reach,
        "p": p,
    }


def mcnemar(first: ArrayLike, second: ArrayLike) -> dict[str, float]:
    """Return McNemar's exact test: do the items that only one of two models answers rightly fall to both sides alike?

    Args:
        first, second: bool[n], right or wrong on the same items.

    Returns:
        `only_first`, `only_second` (numbers of items) and the two-sided binomial `p`; 1 where the models never differ.

    Raises:
        UserError: different lengths, or fewer than two items.

    Example:
        >>> mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
        {'only_first': 6, 'only_second': 0, 'p': 0.03125}

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
    """
    gaps = _pair(np.asarray(first, bool), np.asarray(second, bool))
    only_first, only_second = int((gaps > 0).sum()), int((gaps < 0).sum())
    differing = only_first + only_second
    p = float(stats.binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}


def holm(p_values: ArrayLike) -> list[float]:
    """Return p values corrected for their number: the chance that any true null among them is rejected stays below the level.

    Args:
        p_values: [n], of n tests, however they depend on each other.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    raised = np.minimum(np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1)), 1.0)
    corrected = np.empty_like(raised)
    corrected[order] = raised
    return corrected.tolist()


def _pair(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.shape != two.shape or one.ndim != 1:
        raise UserError(
            f"a paired comparison got {one.size} and {two.size} items; evaluate both models on the same items"
        )
    if one.size < 2:
        raise UserError("a paired comparison needs at least two items; raise data.test_limit")
    return one - two
