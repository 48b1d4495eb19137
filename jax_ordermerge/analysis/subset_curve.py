"""How many members are worth it: the loss of merges of subsets of the members by their number.

Where the loss is quadratic around its minimum, the expected loss of an average of s members is
a + b / s, and so is that of a selection: both are a fixed part and a variance.

Items and members are two crossed samples. By Hoeffding's decomposition the variance of a mean over
both has three parts: of items, of members, and of how members differ from item to item. The error
over items has the first and the third part in it, since the members stay the same from item to
item. The jackknife, which leaves out one member at a time, has the second and the third; subsets
overlap, so their own spread is no error. What is added to the error over items is therefore the
jackknife's variance less the part of it that items make.

Source: Efron and Stein, "The jackknife estimate of variance", 1981; Cameron, Gelbach and Miller,
    "Robust inference with multiway clustering", 2011 (the part that both have counts once).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.paired import Difference
from jax_ordermerge.analysis.result import INLINE, Missing, Undetermined, or_missing

Losses = Mapping[tuple[int, ...], np.ndarray]  # [n] of the merge of each subset


@dataclass(frozen=True)
class SubsetPoint:
    """Merges of one number of members.

    Attributes:
        size: number of members.
        subsets: how many subsets of that size were merged.
        loss: mean over subsets and items.
        gain: loss less that of the mean member; absent at size 1.
    """

    size: int
    subsets: int
    loss: float
    gain: Difference | None = None


@dataclass(frozen=True)
class Doubling:
    """Twice as many members, by the fit: `loss` of so many, and the gain of doubling."""

    size: int
    loss: float
    gain: Difference = field(metadata=INLINE)


@dataclass(frozen=True)
class SubsetCurve:
    """The loss by number of members, and its fit a + b / size.

    Attributes:
        points: by size, ascending.
        a: fitted loss of infinitely many members.
        b: what the spread of the members costs a single one.
        misfit: largest distance of a point from the fit.
        doubled: what twice the members would bring.
    """

    points: list[SubsetPoint]
    a: float
    b: float
    misfit: float
    doubled: Doubling | Missing


def subset_curve(
    losses: Losses, tokens: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> SubsetCurve:
    """Return the loss of merges by their number of members.

    Args:
        losses: [n], losses of the merge of each subset on the same items. Subsets are tuples of
            members 0 to k - 1; there are all single members, and the subset of all of them.
        tokens: [n], token count of each item.
        resamples, seed: of the bootstrap of the items.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> items, members = 2 + rng.random(50), rng.normal(0, 1, (3, 50))
        >>> subsets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
        >>> merged = {s: items + members[list(s)].mean(axis=0) ** 2 for s in subsets}
        >>> curve = subset_curve(merged, np.ones(50))
        >>> [(point.size, point.subsets) for point in curve.points]
        [(1, 3), (2, 3), (3, 1)]
        >>> curve.b > 0, curve.doubled.size, curve.doubled.gain.estimate < 0
        (True, 6, True)
    """
    members = max(map(len, losses))
    by_size = _by_size(losses)
    sizes = list(by_size)

    def difference(first: np.ndarray, second: np.ndarray) -> Difference:
        return paired.difference(first, second, weights=tokens, resamples=resamples, seed=seed)

    def mean(values: np.ndarray) -> float:
        return float((values * tokens).sum() / tokens.sum())

    # what is left without each member, the basis of the jackknife
    without = [_by_size(_without(losses, member)) for member in range(members)]
    merges_are_left = all(len(row) > 1 for row in without)  # of two members none is
    points = []
    for size, values in by_size.items():
        count = sum(len(subset) == size for subset in losses)
        gain = None
        if size > 1:
            gain = difference(values, by_size[1])
            if merges_are_left:
                gain = _over_members(gain, [_gain(row, size) for row in without], tokens)
        points.append(SubsetPoint(size, count, mean(values), gain))
    a, b = _fit({point.size: point.loss for point in points})
    fitted = [a + b / size for size in sizes]
    misfit = max(abs(point.loss - value) for point, value in zip(points, fitted, strict=True))

    def doubled() -> Doubling:
        if not merges_are_left:
            raise Undetermined("fewer than three members: no error over members is known")
        # b is linear in the losses of every item, so the gain has an error over items as well
        gain = difference(-_slope(by_size) / (2 * members), np.zeros(len(tokens)))
        left = [-_slope(row) / (2 * members) for row in without]
        gain = _over_members(gain, left, tokens)
        return Doubling(2 * members, points[-1].loss + gain.estimate, gain)

    return SubsetCurve(points, a, b, misfit, or_missing(doubled))


def _without(losses: Losses, member: int) -> Losses:
    return {subset: values for subset, values in losses.items() if member not in subset}


def _by_size(losses: Losses) -> dict[int, np.ndarray]:
    """Return the mean over the subsets of each size, [n] by size, ascending."""
    sizes = sorted({len(subset) for subset in losses})
    return {
        size: np.mean([values for subset, values in losses.items() if len(subset) == size], axis=0)
        for size in sizes
    }


def _slope_shares(sizes: list[int]) -> np.ndarray:
    """Return how much each point counts in b of the least squares fit a + b / size."""
    x = 1 / np.array(sizes, np.float64)
    centred = x - x.mean()
    return centred / (centred**2).sum()


def _slope(by_size: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return b of the fit to the losses of each item, [n]."""
    shares = _slope_shares(list(by_size))
    rows = [share * row for share, row in zip(shares, by_size.values(), strict=True)]
    return np.sum(rows, axis=0)


def _fit(losses: Mapping[int, float]) -> tuple[float, float]:
    sizes, values = list(losses), np.array(list(losses.values()))
    if len(sizes) < 2:
        return float(values[0]), 0.0
    b = float(_slope_shares(sizes) @ values)
    return float(values.mean() - b * (1 / np.array(sizes, np.float64)).mean()), b


def _gain(by_size: Mapping[int, np.ndarray], size: int) -> np.ndarray:
    """Return the gain of merges of a size over single members, [n]."""
    # Without a member no subset is of all of them. The largest size that there is stands for it,
    # and its gain is extrapolated by the fit.
    nearest = size if size in by_size else max(by_size)
    gain = by_size[nearest] - by_size[1]
    return gain if nearest == size else gain * (1 - 1 / size) / (1 - 1 / nearest)


def _over_members(gap: Difference, left_out: list[np.ndarray], tokens: np.ndarray) -> Difference:
    """Add to an error over items the jackknife's error over members, less what both have in common.

    Args:
        gap: the estimate of all members.
        left_out: of each member, [n], the estimate without it on each item.
        tokens: [n], weights of the items.
    """
    members, items = len(left_out), len(tokens)
    share = tokens / tokens.mean()
    deviations = np.stack(left_out) - np.mean(left_out, axis=0)
    means = (share * deviations).mean(axis=1)
    # a squared mean is too large by its error over items, which is the part in common
    errors = (share * (deviations - means[:, None])).var(axis=1, ddof=1) / items
    variance = (members - 1) / members * float((means**2 - errors).sum())
    return paired.add_variance(gap, max(variance, 0.0), members - 1)
