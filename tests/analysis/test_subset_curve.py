"""The loss by number of merged members, against populations whose truth is known."""

import itertools

import numpy as np
import pytest

from jax_ordermerge.analysis.result import Missing
from jax_ordermerge.analysis.subset_curve import subset_curve
from jax_ordermerge.search.subsets import choose_subsets


def all_subsets(members):
    return [
        s for size in range(1, members + 1) for s in itertools.combinations(range(members), size)
    ]


def quadratic(rng, members, subsets=None, items=60, width=100):
    """Losses 1/2 (a_i . mean of the members)^2 of random members around a minimum at 0.

    In expectation, 1/2 (|mean|^2 + width sd^2 / size) / width: b = 1/2 for sd = 1.
    """
    curvature = rng.normal(size=(items, width)) / np.sqrt(width)
    parameters = rng.normal(0.3, 1.0, size=(members, width))
    difficulty = rng.exponential(1.0, items)
    return {
        subset: difficulty + 0.5 * (curvature @ parameters[list(subset)].mean(axis=0)) ** 2
        for subset in subsets or all_subsets(members)
    }


def test_points_are_means_over_subsets_and_the_fit_is_least_squares():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, 60).astype(float)
    losses = quadratic(rng, 4)
    curve = subset_curve(losses, tokens, resamples=50)
    by_size = [
        np.mean(
            [np.average(losses[s], weights=tokens) for s in itertools.combinations(range(4), size)]
        )
        for size in (1, 2, 3, 4)
    ]
    np.testing.assert_allclose([point.loss for point in curve.points], by_size)
    np.testing.assert_allclose(
        [point.gain.estimate for point in curve.points[1:]], np.subtract(by_size[1:], by_size[0])
    )
    b, a = np.polyfit([1, 1 / 2, 1 / 3, 1 / 4], by_size, 1)
    np.testing.assert_allclose([curve.a, curve.b], [a, b])
    np.testing.assert_allclose(curve.doubled.gain.estimate, -b / 8)
    np.testing.assert_allclose(curve.doubled.loss, by_size[3] - b / 8)


def test_the_error_over_members_is_that_of_the_jackknife():
    # items without an error of their own: all have the same losses
    rng = np.random.default_rng(1)
    values = {subset: rng.normal() for subset in all_subsets(4)}
    curve = subset_curve({s: np.full(5, x) for s, x in values.items()}, np.ones(5), resamples=10)

    def gain(members):
        pairs = np.mean([values[pair] for pair in itertools.combinations(members, 2)])
        return pairs - np.mean([values[(member,)] for member in members])

    left_out = [gain([m for m in range(4) if m != out]) for out in range(4)]
    variance = 3 / 4 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)
    np.testing.assert_allclose(curve.points[1].gain.se, np.sqrt(variance))


def test_two_members_have_no_extrapolation():
    curve = subset_curve(quadratic(np.random.default_rng(2), 2), np.ones(60), resamples=10)
    assert isinstance(curve.doubled, Missing)
    assert len(curve.points) == 2


def test_the_error_that_items_and_members_share_counts_once():
    """By the analysis of variance of members x items, where the gain is additive over members."""
    rng = np.random.default_rng(3)
    members, items = 5, 40
    single = rng.normal(2, 1, items) + rng.normal(0, 1, (members, items))
    single += rng.normal(0, 0.5, (members, 1))
    # The gain of a pair is -1/4 of the sum of its members' losses. Left out, a member of four makes
    # 1/4 of the difference: the jackknife of a mean.
    losses = {(m,): single[m] for m in range(members)}
    for subset in all_subsets(members):
        if len(subset) > 1:
            losses[subset] = (1 - (1 - 1 / len(subset)) / 2) * single[list(subset)].mean(axis=0)
    curve = subset_curve(losses, np.ones(items), resamples=10)
    gains = -single / 4
    residuals = gains - gains.mean(axis=0) - gains.mean(axis=1, keepdims=True) + gains.mean()
    of_items = gains.mean(axis=0).var(ddof=1) / items
    of_members = gains.mean(axis=1).var(ddof=1) / members
    of_both = (residuals**2).sum() / ((members - 1) * (items - 1)) / (members * items)
    expected = np.sqrt(of_items + of_members - of_both)
    assert curve.points[1].gain.se == pytest.approx(expected, rel=1e-9)
    # of all members none is left out: the size below is extrapolated, exactly for this loss
    assert curve.points[-1].gain.se == pytest.approx(expected * (1 - 1 / 5) * 2, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("members", [3, 4, 6, 8])
def test_intervals_cover_the_truth(members):
    draws, rng, hits = 600, np.random.default_rng(members), []
    subsets = choose_subsets(members, seed=0)
    for _ in range(draws):
        curve = subset_curve(quadratic(rng, members, subsets), np.ones(60), resamples=99)
        gains = [(point.gain, 0.5 * (1 / point.size - 1)) for point in curve.points[1:]]
        gains.append((curve.doubled.gain, -0.5 / (2 * members)))
        hits.append([gain.low <= truth <= gain.high for gain, truth in gains])
    # 0.93 to 0.97, and two errors of the simulation
    assert np.abs(np.mean(hits, axis=0) - 0.95).max() <= 0.02 + 2 * np.sqrt(0.05 * 0.95 / draws)
