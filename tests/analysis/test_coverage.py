"""Simulated coverage of the 95 % intervals, and size of the tests, by the designs of experiments.

A few draws of some designs by default, many of all with --slow. All that is reported of a draw is
measured at once: drawing and fitting cost more than the comparisons. With D draws a coverage of 0.95 has
the Monte Carlo error sqrt(0.95 * 0.05 / D): 0.018 with 150, 0.011 with 400.
"""

from typing import NamedTuple

import numpy as np
import pytest

from jax_ordermerge.analysis import clusters, position_curves, position_effects, resample
from jax_ordermerge.analysis.result import Missing
from tests.analysis.simulated import SLOPE, Design, simulate

FAST, SLOW = 150, 400
BANDS = 200  # draws that the bands are measured in: of five batches they cover 0.90 in all 400


class Case(NamedTuple):
    """A design of two epochs, and how its losses are drawn."""

    level: str
    members: int
    samples: int
    batch: int
    icc: float  # correlation of the errors of one step
    skewed: bool

    def draw(self, seed):
        """Return losses, positions and units, as `simulate`."""
        return simulate(
            Design(self.level, self.members),
            samples=self.samples,
            batch=self.batch,
            icc=self.icc,
            seed=seed,
            skewed=self.skewed,
        )


GRID = [
    Case("batch", 4, 320, 16, 0.1, False),
    Case("sample", 2, 320, 16, 0.1, False),
    Case("sample", 4, 320, 32, 0.3, True),
    Case("batch", 2, 160, 16, 0.0, False),
    Case("batch", 8, 160, 32, 0.3, False),
    Case("batch", 4, 512, 32, 0.3, True),
    Case("batch", 8, 512, 16, 0.1, True),
    Case("sample", 4, 320, 16, 0.0, True),
    Case("sample", 8, 160, 16, 0.1, False),
    Case("sample", 8, 512, 32, 0.3, False),
    Case("sample", 2, 512, 16, 0.3, True),
]


def grid(fast):
    """Return the first designs with few draws, and all with many as slow tests."""
    return [(case, FAST) for case in GRID[:fast]] + [
        pytest.param(case, SLOW, marks=pytest.mark.slow) for case in GRID
    ]


def name(value):
    return "-".join(map(str, value)) if isinstance(value, Case) else str(value)


def allowed(draws):
    # 0.93 to 0.97, and what chance adds to each of several such numbers in one test
    return 0.02 + 2.5 * np.sqrt(0.05 * 0.95 / draws)


class Outcome(NamedTuple):
    """Of one draw: which intervals hold the truth, and which true hypotheses are rejected.

    By what is reported, one entry per epoch. Of a band, the share of its bins that hold.
    """

    covered: dict[str, list[float]]
    rejected: dict[str, list[float]]


def holds(interval, truth):
    return interval.low <= truth <= interval.high


def effect_in_bins(position, bins):
    """Return the mean effect of epoch 1 in each bin, as the curves without difficulty have it."""
    values = position_curves.within_sample(SLOPE * position, position).ravel()
    numbers = resample.bin_numbers(position, bins).ravel()
    return np.bincount(numbers, values) / np.bincount(numbers)


def slopes_after_merging(losses, x, units, error):
    # a merge that halves the slope, with the errors of its members and some of its own
    merged = losses.mean(axis=0) - 0.5 * SLOPE * x[:, 0].mean(axis=0) + error
    effect = position_effects.merged_effect(merged, losses, x, None, units)
    covered = {}
    for name, first in (("change", -0.5), ("after", 0.5)):
        fit = getattr(effect, name)
        # of five batches, the mean positions of two epochs may be one line by chance
        covered[name] = (
            [np.nan, np.nan]
            if isinstance(fit, Missing)
            else [
                holds(row, truth)
                for row, truth in zip(fit.coefficients, (first * SLOPE, 0.0), strict=True)
            ]
        )
    return covered


def measure(case, seed):
    """Analyze one draw of a design."""
    losses, x, units = case.draw(seed)
    joint = position_effects.joint_effect(losses, x, units=units)
    error = np.random.default_rng(seed + 10**6).normal(0, 0.05, case.samples)
    curves = position_curves.curves(
        losses,
        x,
        {"merge": losses.mean(axis=0) + error},
        bins=5,
        resamples=199,
        seed=seed,
        units=units,
        correlations=joint.step_correlation,
    )
    # the truth of these orders: the effect alone; another epoch's is noise in this one
    early, late = effect_in_bins(x[:, 0], 2)
    bands = []
    for epoch, band in enumerate(curves.pooled.within):
        effect = effect_in_bins(x[:, 0], 5) if epoch == 0 else np.zeros(len(band.mean))
        expected = losses.mean() + effect - np.average(effect, weights=band.samples)
        bands.append(((band.low <= expected) & (expected <= band.high)).mean())
    covered = {
        "slope": [
            holds(row, truth) for row, truth in zip(joint.coefficients, (SLOPE, 0.0), strict=True)
        ],
        "gap": [
            holds(row, truth)
            for row, truth in zip(curves.pooled.early_late, (early - late, 0.0), strict=True)
        ],
        "band": bands,
    }
    covered |= slopes_after_merging(losses, x, units, error)
    excess = [row.excess.p < 0.05 for row in curves.merged["merge"].early_late]
    return Outcome(covered, {"slope": [joint.coefficients[1].p < 0.05], "excess": excess})


@pytest.mark.parametrize(("case", "draws"), grid(3), ids=name)
def test_intervals_cover_and_tests_keep_their_size(case, draws):
    outcomes = [measure(case, seed) for seed in range(draws)]
    covered = {
        name: np.array([outcome.covered[name] for outcome in outcomes], float)
        for name in outcomes[0].covered
    }
    # Bands are pointwise, their bins are not independent, and each holds few steps: only their mean
    # counts. Else each epoch counts: the errors of the last one's steps are correlated.
    band = covered.pop("band")[:BANDS]
    assert band.mean() == pytest.approx(0.95, abs=allowed(len(band)))
    assert all(np.isnan(values).mean() < 0.01 for values in covered.values())
    rates = {name: np.nanmean(values, axis=0) for name, values in covered.items()}
    assert not {k: rate for k, rate in rates.items() if abs(rate - 0.95).max() > allowed(draws)}
    sizes = {
        name: np.mean([outcome.rejected[name] for outcome in outcomes], axis=0)
        for name in outcomes[0].rejected
    }
    limit = 0.06 + 2.5 * np.sqrt(0.05 * 0.95 / draws)
    assert not {name: size for name, size in sizes.items() if size.max() > limit}


@pytest.mark.parametrize(
    ("level", "icc", "draws"),
    [
        ("sample", 0.1, FAST),
        *(
            pytest.param(level, icc, SLOW, marks=pytest.mark.slow)
            for level in ("sample", "batch")
            for icc in (0.0, 0.1, 0.3)
        ),
    ],
)
def test_permutation_of_steps_or_batches_keeps_its_size(level, icc, draws):
    rejected = 0
    for seed in range(draws):
        losses, x, units = simulate(
            Design(level, 1), samples=320, batch=16, icc=icc, seed=seed, slope=0.0, noise=0.5
        )
        steps = clusters.step_numbers(x[0, 1:]) if units is None else units[None]
        (p,) = clusters.permutation_p(
            losses,
            x[0, 1:],
            steps,
            permutations=199,
            generator=np.random.default_rng(seed),
        )[0]
        rejected += p < 0.05
    assert rejected / draws <= 0.06 + 2 * np.sqrt(0.05 * 0.95 / draws)


@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize(
    ("icc", "draws"), [(0.3, FAST), pytest.param(0.0, SLOW, marks=pytest.mark.slow)]
)
def test_slopes_of_one_member_cover(level, icc, draws):
    """Large errors of steps: the difficulty of samples would hide any others of one member."""
    covered = np.zeros(draws)
    for seed in range(draws):
        losses, x, units = simulate(
            Design(level, 1), samples=400, batch=20, icc=icc, seed=seed, slope=0.0, noise=1.0
        )
        slope = position_effects.marginal(losses[0], x[0, 1], units).slope
        covered[seed] = slope.low <= 0 <= slope.high
    assert covered.mean() == pytest.approx(0.95, abs=allowed(draws))
