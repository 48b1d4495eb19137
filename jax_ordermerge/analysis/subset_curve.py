"""How many members are worth it: the loss of merges of subsets of the members by their number.

Where the loss is quadratic around its minimum, the expected loss of an average of s members is
a + b / s, and so is that of a selection: both are a fixed part and a variance. Two sources of
error count, items and members. The error over members is the jackknife's, which leaves out one
member at a time; subsets overlap, so their spread is none.

Source: Efron, "Bootstrap methods: another look at the jackknife", 1979 (pseudo-values).
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
    without = [
        {size: mean(values) for size, values in _by_size(_without(losses, member)).items()}
        for member in range(members)
    ]
    points = []
    for size, values in by_size.items():
        count = sum(len(subset) == size for subset in losses)
        gain = None
        if size > 1:
            gain = difference(values, by_size[1])
            # without a member no subset is of all of them: the next size stands for it
            left = [row.get(size, row[max(row)]) - row[1] for row in without if len(row) > 1]
            gain = _over_members(gain, left, members)
        points.append(SubsetPoint(size, count, mean(values), gain))
    a, b = _fit({point.size: point.loss for point in points})
    fitted = [a + b / size for size in sizes]
    misfit = max(abs(point.loss - value) for point, value in zip(points, fitted, strict=True))

    def doubled() -> Doubling:
        slopes = [_fit(row)[1] for row in without if len(row) > 1]
        if len(slopes) < members:
            raise Undetermined("fewer than three members: no error over members is known")
        # b is linear in the losses of every item, so the gain has an error over items as well
        shares = _slope_shares(sizes)
        slope = sum(share * by_size[size] for share, size in zip(shares, sizes, strict=True))
        gain = difference(-slope / (2 * members), np.zeros(len(tokens)))
        gain = _over_members(gain, [-b / (2 * members) for b in slopes], members)
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


def _fit(losses: Mapping[int, float]) -> tuple[float, float]:
    sizes, values = list(losses), np.array(list(losses.values()))
    if len(sizes) < 2:
        return float(values[0]), 0.0
    b = float(_slope_shares(sizes) @ values)
    return float(values.mean() - b * (1 / np.array(sizes, np.float64)).mean()), b


def _over_members(gap: Difference, left_out: list[float], members: int) -> Difference:
    """Add the jackknife's error over members to an error over items."""
    if len(left_out) < members:  # two members: without one there is no merge
        return gap
    # Pseudo-values have the variance of independent observations, one for each member; only their
    # spread is used, and (k - 1) times the left-out estimates has the same.
    return paired.over_seeds(gap, (members - 1) * np.array(left_out))
