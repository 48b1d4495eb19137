"""Two models on the same items: paired bootstrap, tests, corrections, and claims."""

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from jax_ordermerge.analysis.resample import BLOCK
from jax_ordermerge.analysis.result import TAILS, Estimate
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream_key_bits

Name = TypeVar("Name", bound=Hashable)

# p values below which a difference is called clear, or weak; above, it is not called one.
CLEAR, WEAK = 0.01, 0.05
FEW_ITEMS = 0.25  # of the variance in five items: what is said of the mean is said of these
_FEWEST = 8  # items; with fewer, intervals are Student's
_SMALLEST_P = 1e-25  # lower end of the search for a p value; far below any level


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference over `n` items, with the p value of its two-sided paired t-test.

    Attributes:
        median: of the differences, items counting equally.
        wilcoxon_p: of the signed-rank test that the differences are symmetric about zero.
        top_share: share of the variance that the five most extreme items hold. Above
            `FEW_ITEMS` the mean is a statement about these.
    """

    p: float
    n: int
    median: float | None = None
    wilcoxon_p: float | None = None
    top_share: float | None = None


@dataclass(frozen=True)
class Claim(Difference):
    """A difference to one of several rivals; `holm` is p corrected for their number."""

    holm: float = field(kw_only=True)

    @property
    def is_better(self) -> bool:
        """Whether the winner may be called better than the rival."""
        return self.estimate < 0 and self.holm < WEAK


@dataclass(frozen=True)
class McNemar:
    """McNemar's mid-p test: numbers of items that only one of the models answers correctly."""

    only_first: int
    only_second: int
    p: float


def difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Return the mean of `first - second` over items, with bootstrap interval and t-test.

    Args:
        first, second: [n], losses or scores of the same items in the same order; each may be a
            mean over several models.
        weights: [n], for example tokens per item. The estimate is then a ratio of means with the
            error of one. Items remain the unit of resampling.
        resamples: of the items.
        seed: of the run.

    Returns:
        `se` over items; `low`, `high` by the studentized bootstrap.

    Raises:
        UserError: different lengths, or fewer than two items.

    Example:
        >>> gap = difference([1.0, 2.0, 4.0, 3.0], [1.5, 2.0, 4.5, 4.0])
        >>> gap.estimate, round(gap.se, 3), gap.n
        (-0.5, 0.204, 4)
    """
    gaps = _gaps(first, second)
    count = gaps.size
    share = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if share.shape != gaps.shape or not (share > 0).all():
        raise UserError(
            f"a paired comparison of {count} items got {share.size} weights; "
            "expected one above 0 for each item"
        )
    # weights of mean 1 make the mean of `gaps * share` the ratio of sums
    share = share / share.mean()
    # The stream depends on the number of items, not on the models. Two comparisons on the same
    # items then share their resamples, and the result does not depend on what was compared before.
    generator = np.random.default_rng(stream_key_bits(seed, "analysis", "paired", count))
    estimate = float((gaps * share).mean())
    # the linearized error of a ratio; with equal weights the usual error of a mean
    error = float((share * (gaps - estimate)).std(ddof=1) / np.sqrt(count))
    step = max(1, BLOCK // count)
    blocks = [
        _studentized(gaps - estimate, share, generator.integers(0, count, (rows, count)))
        for rows in (min(step, resamples - start) for start in range(0, resamples, step))
    ]
    # Studentized: percentiles of resampled means cover 0.87 for 0.95 with 40 skewed items, since
    # the mean and its error rise together. A resample without variation says nothing.
    deviations = np.concatenate(blocks)
    deviations = deviations[np.isfinite(deviations)]
    left, right = np.quantile(deviations, TAILS) if deviations.size else (0.0, 0.0)
    if count < _FEWEST:
        # resamples of a handful of items repeat a few values: of two, the interval had no width
        left, right = (float(stats.t.ppf(tail, count - 1)) for tail in TAILS)
    # the right tail of the deviations bounds the mean from below
    low, high = estimate - right * error, estimate - left * error
    if error > 0:
        p = float(2 * stats.t.sf(abs(estimate / error), count - 1))
    else:
        # Without variance the t-test is undefined: use the probability that n signs agree.
        p = 1.0 if estimate == 0 else 2.0 ** (1 - count)
    squares = np.sort((share * (gaps - estimate)) ** 2)
    return Difference(
        estimate,
        error,
        float(low),
        float(high),
        p,
        count,
        median=float(np.median(gaps)),
        wilcoxon_p=float(stats.wilcoxon(gaps).pvalue) if gaps.any() else 1.0,
        top_share=float(squares[-5:].sum() / squares.sum()) if error > 0 else None,
    )


def _studentized(deviations: np.ndarray, share: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the mean of each resample over its own error, [P], from rows [P, n]."""
    # Sums of powers instead of residuals: one pass, and no array [P, n] of residuals. The
    # deviations are centred, so nothing large cancels.
    total = share[rows].sum(axis=1)
    mean = (share * deviations)[rows].sum(axis=1) / total
    squares = ((share * deviations) ** 2)[rows].sum(axis=1)
    squares -= 2 * mean * (share**2 * deviations)[rows].sum(axis=1)
    squares += mean**2 * (share**2)[rows].sum(axis=1)
    count = rows.shape[1]
    errors = np.sqrt(np.maximum(squares, 0) * count / (count - 1)) / total
    scale = np.abs(deviations).max()
    return np.divide(mean, errors, out=np.full_like(mean, np.nan), where=errors > 1e-9 * scale)


def over_seeds(gap: Difference, estimates: ArrayLike) -> Difference:
    """Add the spread between random seeds to the error, interval and p of a mean over seeds.

    The variance is the sum of the variance over items and the variance between seeds divided by
    their number.

    Args:
        gap: the mean over the seeds on each item, compared with another model.
        estimates: [S], the difference of each seed by itself, S >= 2.

    Example:
        >>> gap = difference([1.0, 2.0, 4.0, 3.0], [1.5, 2.0, 4.5, 4.0])
        >>> round(over_seeds(gap, [-0.4, -0.6]).se, 3), round(over_seeds(gap, [-0.5, -0.5]).se, 3)
        (0.227, 0.204)
    """
    by_seed = np.asarray(estimates, np.float64)
    return add_variance(gap, float(by_seed.var(ddof=1)) / by_seed.size, by_seed.size - 1)


def add_variance(gap: Difference, variance: float, freedom: int) -> Difference:
    """Add a variance of another source, estimated with `freedom` degrees, to that over items.

    Quantiles are the mean of Student's for items and for the other source, weighted by the two
    variances (Cochran's approximation), which is conservative.

    Example:
        >>> gap = difference([1.0, 2.0, 4.0, 3.0], [1.5, 2.0, 4.5, 4.0])
        >>> add_variance(gap, 0.0, 2) == gap, round(add_variance(gap, 0.01, 2).se, 3)
        (True, 0.227)

    Source: Cochran and Cox, "Experimental designs", 2nd edition 1957, section 4.14.
    """
    if variance == 0:
        return gap  # as of seeds of a method that draws nothing
    items = gap.se**2
    error = float(np.sqrt(items + variance))

    def quantile(level: float) -> float:
        of_items, of_other = (
            float(stats.t.isf(level / 2, degrees)) for degrees in (gap.n - 1, freedom)
        )
        return (items * of_items + variance * of_other) / (items + variance)

    half_width, observed = error * quantile(2 * TAILS[0]), abs(gap.estimate) / error
    p = _SMALLEST_P
    if quantile(p) >= observed:
        # the mixed quantile has no closed inverse; the root is searched for in log p
        log_p = optimize.brentq(
            lambda power: quantile(float(np.exp(power))) - observed, np.log(_SMALLEST_P), 0.0
        )
        p = float(np.exp(log_p))
    low, high = gap.estimate - half_width, gap.estimate + half_width
    return replace(gap, se=error, low=low, high=high, p=p)


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Test whether the items that only one of two models answers correctly favour either.

    Args:
        first, second: bool[n], correct or not on the same items.

    Returns:
        `p` is the mid-p: the two-sided binomial test less half of what it counts twice at the
        observed numbers. The exact test of so few items has a size of 2 % where 5 % are allowed.
        1 where the models never differ.

    Raises:
        UserError: different lengths, or fewer than two items.

    Example:
        >>> test = mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
        >>> test.only_first, test.only_second, round(test.p, 6)
        (6, 0, 0.015625)

    Source: McNemar, "Note on the sampling error of the difference between correlated
        proportions", 1947; Fagerland, Lydersen and Laake, "The McNemar test for binary
        matched-pairs data: mid-p and asymptotic are better than exact conditional", 2013.
    """
    # items on which both are right, or both wrong, say nothing about which model is better
    gaps = _gaps(np.asarray(first, bool), np.asarray(second, bool))
    only_first, only_second = int((gaps > 0).sum()), int((gaps < 0).sum())
    differing = only_first + only_second
    if not differing:
        return McNemar(0, 0, 1.0)
    fewer = min(only_first, only_second)
    observed = float(stats.binom.pmf(fewer, differing, 0.5))
    # With equal numbers both tails contain the observed one, which counts half in all.
    tied = only_first == only_second
    p = 1 - observed / 2 if tied else 2 * float(stats.binom.cdf(fewer - 1, differing, 0.5))
    return McNemar(only_first, only_second, p if tied else p + observed)


def holm(p_values: ArrayLike) -> list[float]:
    """Return p values corrected for their number, by Holm's step-down method.

    The probability that any true null hypothesis is rejected stays below the level, whatever the
    dependence between the tests.

    Args:
        p_values: [n].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    # p of rank r (from 0) is multiplied by n - r, and never falls below the one before it
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    raised = np.minimum(np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1)), 1.0)
    corrected = np.empty_like(raised)
    corrected[order] = raised
    return corrected.tolist()


def claims(
    pairs: Mapping[Name, tuple[ArrayLike, ArrayLike]],
    weights: ArrayLike | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[Name, Claim]:
    """Compare pairs of models on items that had no part in choosing them.

    However many candidates were tried, the search needs no correction here. The comparisons are
    several, so p values are corrected for their number.

    Args:
        pairs: losses [n] of a model and of its rival on the same items, by name.
        weights: [n], for example tokens per item.
        resamples, seed: of the bootstrap.

    Returns:
        Model less rival by the name of the pair. A pair with the same losses is left out.

    Example:
        >>> winner = [1.0, 2.0, 3.0, 4.0]
        >>> made = claims(
        ...     {"best_member": (winner, [1.5, 2.4, 3.5, 4.4]), "average": (winner, winner)}
        ... )
        >>> list(made), round(made["best_member"].estimate, 2), made["best_member"].is_better
        (['best_member'], -0.45, True)
    """
    gaps = {
        name: difference(model, rival, weights=weights, resamples=resamples, seed=seed)
        for name, (model, rival) in pairs.items()
        # the same model: a test of zero differences has no meaning
        if not np.array_equal(model, rival)
    }
    corrected = holm([gap.p for gap in gaps.values()])
    return {
        name: Claim(**asdict(gap), holm=p)
        for (name, gap), p in zip(gaps.items(), corrected, strict=True)
    }


def _gaps(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise UserError(
            f"a paired comparison got {x.size} and {y.size} items; "
            "evaluate both models on the same items"
        )
    if x.size < 2:
        raise UserError("a paired comparison needs at least two items; raise data.test_limit")
    return x - y
