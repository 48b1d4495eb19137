"""Numbers as text: p values, errors, intervals, and the words that a p value allows."""

import copy
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from jax_ordermerge.analysis.equivalence import detectable
from jax_ordermerge.analysis.paired import CLEAR, WEAK, Difference
from jax_ordermerge.analysis.result import Estimate
from jax_ordermerge.json_types import Json
from jax_ordermerge.report.document import Cell, Interval

# one constant, because pages count and compare verdicts by their text
INDISTINGUISHABLE = "not distinguishable"
NORMAL = 1.96  # standard errors on each side of a 95 % interval
LONGEST_ANSWER = 700  # characters; more would hide the other rows of a table


def p_text(p: float) -> str:
    """Return a p value with two digits.

    Example:
        >>> p_text(0.0312), p_text(1e-9)
        ('p = 0.031', 'p < 0.0001')
    """
    # below that the approximations behind the p value are worse than its digits
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def p_value(p: float) -> str:
    """Return a p value for a column of its own.

    Example:
        >>> p_value(0.0312), p_value(1e-9)
        ('0.031', '< 0.0001')
    """
    return p_text(p).removeprefix("p ").removeprefix("= ")


def p_texts(p: float, holm: float) -> str:
    """Return a p value, and beside it the corrected one where that is larger.

    Example:
        >>> p_texts(0.03, 0.03), p_texts(0.03, 0.06)
        ('p = 0.03', 'p = 0.03, by Holm = 0.06')
    """
    return p_text(p) + (f", by Holm {p_text(holm).removeprefix('p ')}" if holm > p else "")


def strength(p: float) -> str:
    """Return "clearly", "weakly" or "" for a p value.

    Example:
        >>> strength(0.001), strength(0.03), strength(0.3)
        ('clearly', 'weakly', '')
    """
    return "clearly" if p < CLEAR else "weakly" if p < WEAK else ""


def verdict(estimate: float, corrected: float, *, lower_is_better: bool = True) -> str:
    """Return the verdict on a difference, by its corrected p value.

    Example:
        >>> verdict(-0.1, 0.001), verdict(-0.1, 0.03, lower_is_better=False), verdict(0.1, 0.2)
        ('clearly better', 'weakly worse', 'not distinguishable')
    """
    # never "equal": a large p value is no evidence for equality
    if not strength(corrected):
        return INDISTINGUISHABLE
    return f"{strength(corrected)} {'better' if (estimate < 0) == lower_is_better else 'worse'}"


def versus(verdict: str, size: str, rival: str) -> str:
    """Return a clause about a model and its rival.

    Example:
        >>> versus("clearly better", "-0.1", "the average")
        'clearly better (-0.1) than the average'
    """
    return f"{verdict} ({size}) {'from' if verdict == INDISTINGUISHABLE else 'than'} {rival}"


def detectable_text(se: float, freedom: float, digits: int = 4) -> str:
    """Return what a comparison could have found, to stand beside one that found nothing.

    Example:
        >>> detectable_text(0.001, 399)
        'detectable from 0.0028'
    """
    return f"detectable from {detectable(se, freedom):.{digits}f}"


def undetected(corrected: float, se: float, freedom: float, digits: int = 4) -> str:
    """Return `detectable_text` after a comma where a test found nothing, else nothing.

    Example:
        >>> undetected(0.5, 0.001, 399), undetected(0.001, 0.001, 399)
        (', detectable from 0.0028', '')
    """
    if strength(corrected) or not se > 0:
        return ""
    return f", {detectable_text(se, freedom, digits)}"


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation, None for one value.

    Example:
        >>> spread([1.0, 3.0]), spread([1.0])
        ((2.0, 1.4142135623730951), (1.0, None))
    """
    # ddof=1: members and seeds are a sample of those that could have been trained
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def number(value: float | None, digits: int) -> str:
    """Return a number with a fixed number of digits, a dash for None.

    Example:
        >>> number(1.25, 1), number(None, 1)
        ('1.2', '–')
    """
    return "–" if value is None else f"{value:.{digits}f}"


def percents(shares: Sequence[float] | None) -> str:
    """Return shares in per cent, a dash where there are none.

    Example:
        >>> percents([0.125, 0.5]), percents(None)
        ('12.5 50.0', '–')
    """
    return " ".join(f"{100 * share:.1f}" for share in shares or ()) or "–"


def plus_minus(value: float | None, error: float | None, digits: int) -> Cell:
    """Return a value and its 95 % interval, from the standard error.

    Of one item both are undefined.

    Example:
        >>> str(plus_minus(1.5, 0.25, 2)), str(plus_minus(1.5, None, 2))
        ('1.50 [1.01, 1.99]', '1.50 undefined')
    """
    if value is None:
        return number(value, digits)
    if error is None:
        return Interval(number(value, digits), "undefined")
    low, high = value - NORMAL * error, value + NORMAL * error
    return Interval(number(value, digits), f"[{low:.{digits}f}, {high:.{digits}f}]")


def share_bounds(part: float, error: float | None, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of right answers.

    Example:
        >>> share_bounds(0.0, 0.0, 96)[0], round(share_bounds(0.0, 0.0, 96)[1], 3)
        (0.0, 0.038)
    """
    if error is None:  # of one item, where it is undefined
        return part, part
    if error > 0:
        return part - NORMAL * error, part + NORMAL * error
    # Where all answers are right, or none, the standard error is 0 but the share is not certain:
    # Wilson's interval.
    reach = NORMAL**2 / (count + NORMAL**2)
    return (0.0, reach) if part < 0.5 else (1 - reach, 1.0)


def share(part: float, error: float | None, count: int) -> Cell:
    """Return a share of right answers in per cent, and its 95 % interval.

    Example:
        >>> str(share(0.5, 0.05, 100)), str(share(0.0, 0.0, 400))
        ('50.0 [40.2, 59.8]', '0.0 [0.0, 1.0]')
    """
    if error is None:  # of one item
        return number(100 * part, 1)
    low, high = share_bounds(part, error, count)
    return Interval(f"{100 * part:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]")


def signed(row: Json, scale: float = 1, digits: int = 4) -> str:
    """Return a difference or slope of a file and its 95 % interval.

    Example:
        >>> signed({"estimate": 0.1, "low": 0.0, "high": 0.3})
        '+0.1000 [+0.0000, +0.3000]'
    """
    # the interval of the file, so that sentences and tables have the same one
    size = f"{scale * row['estimate']:+.{digits}f}"
    return f"{size} {bounds(scale * row['low'], scale * row['high'], digits)}"


def mean_row(rows: Sequence[Json]) -> Json:
    """Return the means of estimates, errors and bounds.

    Of merges that differ in their seed the mean error is an upper bound of the error of the mean,
    because they share the samples.

    Example:
        >>> rows = [
        ...     {"estimate": 1.0, "se": 1.0, "low": -1.0, "high": 3.0},
        ...     {"estimate": 2.0, "se": 2.0, "low": -2.0, "high": 6.0},
        ... ]
        >>> mean_row(rows)
        {'estimate': 1.5, 'se': 1.5, 'low': -1.5, 'high': 4.5}
    """
    return {key: fmean(row[key] for row in rows) for key in ("estimate", "se", "low", "high")}


def signed_interval(gap: Estimate, scale: float = 1, digits: int = 4) -> str:
    """Return a difference and its 95 % interval.

    Example:
        >>> signed_interval(Estimate(0.1, 0.02, 0.06, 0.14), 100, 1)
        '+10.0 [+6.0, +14.0]'
    """
    size = f"{scale * gap.estimate:+.{digits}f}"
    return f"{size} {bounds(scale * gap.low, scale * gap.high, digits)}"


def mean_sd(values: Sequence[float | None], digits: int) -> str:
    """Return the mean and, in brackets, the standard deviation; a dash where a value is None.

    Example:
        >>> mean_sd([1.0, 3.0], 2)
        '2.00 (1.41)'
    """
    # a mean over some of the models would not be comparable with that of another row
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return "–"
    mean, sd = spread(numbers)
    return number(mean, digits) + (f" ({sd:.{digits}f})" if sd is not None else "")


def bounds(low: float, high: float, digits: int = 4) -> str:
    """Return an interval.

    Example:
        >>> bounds(-0.1, 0.2, 1)
        '[-0.1, +0.2]'
    """
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def normal_bounds(estimate: float, error: float, digits: int = 4) -> str:
    """Return the 95 % interval of an estimate from its standard error.

    Example:
        >>> normal_bounds(0.1, 0.05, 3)
        '[+0.002, +0.198]'
    """
    return bounds(estimate - NORMAL * error, estimate + NORMAL * error, digits)


def interval(
    gap: Estimate, scale: float = 1, digits: int = 4, holm: float | None = None
) -> Interval:
    """Return a cell with estimate, interval and, of a paired difference, its p values.

    Example:
        >>> gap = Difference(0.1, 0.02, 0.06, 0.14, 0.002, 50)
        >>> str(interval(gap, 100, 1, holm=0.004))
        '+10.0 [+6.0, +14.0], p = 0.002, by Holm 0.004'
    """
    return Interval(
        f"{scale * gap.estimate:+.{digits}f}",
        bounds(scale * gap.low, scale * gap.high, digits),
        # a bootstrap gap has an interval, but no test
        p_value(gap.p) if isinstance(gap, Difference) else "",
        "" if holm is None else p_value(holm),
    )


def gap_or_reason(gap: Json) -> Cell:
    """Return a gap or slope of analysis.json, or the reason why it is undetermined.

    Example:
        >>> gap_or_reason({"reason": "one member only"})
        '– (one member only)'
        >>> str(gap_or_reason({"estimate": 0.1, "low": 0.0, "high": 0.2, "p": 0.05}))
        '+0.1000 [+0.0000, +0.2000], p = 0.05'
    """
    if "reason" in gap:
        return f"– ({gap['reason']})"
    p = p_value(gap["p"]) if "p" in gap else ""
    return Interval(f"{gap['estimate']:+.4f}", bounds(gap["low"], gap["high"]), p)


def late_less_early(gaps: Any) -> Any:
    """Return gaps of analysis.json, early less late there, with the sign that slopes have.

    Args:
        gaps: an estimate, or lists and objects of estimates.

    Example:
        >>> late_less_early([{"members": {"estimate": 0.1, "low": 0.0, "high": 0.3}, "epoch": 1}])
        [{'members': {'estimate': -0.1, 'low': -0.3, 'high': -0.0}, 'epoch': 1}]
    """
    if isinstance(gaps, list):
        return [late_less_early(gap) for gap in gaps]
    if not isinstance(gaps, dict):
        return gaps
    # a copy knows of which file it is a part, for the error where a key is missing
    turned = copy.copy(gaps)
    turned.update({key: late_less_early(value) for key, value in gaps.items()})
    if "estimate" in gaps:
        turned |= {"estimate": -gaps["estimate"], "low": -gaps["high"], "high": -gaps["low"]}
    return turned


def epochs(row: Json) -> str:
    """Return the epochs of a coefficient of analysis.json, which share one slope.

    Example:
        >>> epochs({"epochs": [1, 2]})
        '1 = 2'
    """
    # "1 = 2": without reshuffling the positions in both epochs are the same, with one slope
    return " = ".join(map(str, row["epochs"]))


def loss_unit(objective: Json) -> str:
    """Return the unit of the losses of an objective, a section of the config.

    Example:
        >>> loss_unit({}), loss_unit({"kind": "dpo", "loss": "ipo"})
        ('nats per token', 'squared nats per pair')
        >>> loss_unit({"kind": "dpo", "loss": "sigmoid"})
        'nats per pair'
    """
    # IPO squares the margin of a pair; the other losses are negative log-likelihoods
    if objective.get("kind", "sft") == "sft":
        return "nats per token"
    return "squared nats per pair" if objective.get("loss") == "ipo" else "nats per pair"


def shortened(text: str) -> str:
    """Return at most `LONGEST_ANSWER` characters of a text, and its length where it is cut.

    Example:
        >>> len(shortened("a" * 1000))
        720
    """
    if len(text) <= LONGEST_ANSWER:
        return text
    return f"{text[:LONGEST_ANSWER]} … ({len(text)} characters)"
