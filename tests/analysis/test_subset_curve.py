"""The loss by number of merged members, against populations whose truth is known."""

import itertools

import numpy as np
import pytest

from jax_ordermerge.analysis.result import Missing
from jax_ordermerge.analysis.subset_curve import subset_curve


def all_subsets(members):
    return [
        s for size in range(1, members + 1) for s in itertools.combinations(range(members), size)
    ]


def quadratic(rng, members, items=60, width=100):
    """Losses 1/2 (a_i . mean of the members)^2 of random members around a minimum at 0.

    In expectation, 1/2 (|mean|^2 + width sd^2 / size) / width: b = 1/2 for sd = 1.
    """
    curvature = rng.normal(size=(items, width)) / np.sqrt(width)
    parameters = rng.normal(0.3, 1.0, size=(members, width))
    difficulty = rng.exponential(1.0, items)
    return {
        subset: difficulty + 0.5 * (curvature @ parameters[list(subset)].mean(axis=0)) ** 2
        for subset in all_subsets(members)
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


@pytest.mark.slow
@pytest.mark.parametrize("members", [3, 4, 6])
def test_intervals_cover_the_truth(members):
    rng, hits = np.random.default_rng(members), []
    for _ in range(300):
        curve = subset_curve(quadratic(rng, members), np.ones(60), resamples=10)
        gains = [(point.gain, 0.5 * (1 / point.size - 1)) for point in curve.points[1:]]
        gains.append((curve.doubled.gain, -0.5 / (2 * members)))
        hits.append([gain.low <= truth <= gain.high for gain, truth in gains])
    # conservative: items and members both count what items and members have in common
    assert (np.mean(hits, axis=0) >= 0.93).all()
