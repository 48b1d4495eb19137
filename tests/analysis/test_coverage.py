"""Simulated coverage of the 95 % intervals, and size of the tests, by the designs of experiments.

A few draws of some designs by default, many of all with --slow. With D draws a coverage of 0.95 has
the Monte Carlo error sqrt(0.95 * 0.05 / D): 0.018 with 150, 0.011 with 400.
"""

from typing import NamedTuple

import numpy as np
import pytest

from jax_ordermerge.analysis import clusters, position_curves, position_effects
from jax_ordermerge.analysis.result import Missing
from tests.analysis.simulated import SLOPE, Design, simulate

FAST, SLOW = 150, 400


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


@pytest.mark.parametrize(("case", "draws"), grid(3), ids=name)
def test_slopes_cover_and_their_tests_keep_their_size(case, draws):
    truth, covered, rejected = np.array([SLOPE, 0.0]), np.zeros((draws, 2)), np.zeros(draws)
    for seed in range(draws):
        losses, x, units = case.draw(seed)
        rows = position_effects.joint_effect(losses, x, units=units).coefficients
        covered[seed] = [row.low <= b <= row.high for row, b in zip(rows, truth, strict=True)]
        rejected[seed] = rows[1].p < 0.05
    # each epoch by itself: the errors of the last one's steps are correlated
    assert np.abs(covered.mean(axis=0) - 0.95).max() <= allowed(draws)
    assert rejected.mean() <= 0.06 + 2.5 * np.sqrt(0.05 * 0.95 / draws)


@pytest.mark.parametrize(("case", "draws"), grid(2), ids=name)
def test_slopes_after_merging_cover(case, draws):
    covered = np.full((draws, 2, 2), np.nan)
    for seed in range(draws):
        losses, x, units = case.draw(seed)
        # a merge that halves the slope, with the errors of its members and some of its own
        error = np.random.default_rng(seed + 10**6).normal(0, 0.05, case.samples)
        merged = losses.mean(axis=0) - 0.5 * SLOPE * x[:, 0].mean(axis=0) + error
        effect = position_effects.merged_effect(merged, losses, x, None, units)
        for kind, (fit, first) in enumerate(((effect.change, -0.5), (effect.after, 0.5))):
            for epoch, value in enumerate((first * SLOPE, 0.0)):
                # of five batches, the mean positions of two epochs may be one line by chance
                if isinstance(fit, Missing):
                    continue
                row = fit.coefficients[epoch]
                covered[seed, kind, epoch] = row.low <= value <= row.high
    assert np.isnan(covered).mean() < 0.01
    assert np.abs(np.nanmean(covered, axis=0) - 0.95).max() <= allowed(draws)


@pytest.mark.parametrize(("case", "draws"), grid(2), ids=name)
def test_gaps_of_early_and_late_samples_cover(case, draws):
    covered, excess = np.zeros((draws, 2)), np.zeros((draws, 2))
    for seed in range(draws):
        losses, x, units = case.draw(seed)
        joint = position_effects.joint_effect(losses, x, units=units)
        error = np.random.default_rng(seed + 10**6).normal(0, 0.05, case.samples)
        settings = {"bins": 10, "seed": seed, "units": units}
        result = position_curves.curves(
            losses,
            x,
            {"merge": losses.mean(axis=0) + error},
            resamples=199,
            correlations=joint.step_correlation,
            **settings,
        )
        # the truth of these orders: the same gap of the effect alone
        truth = position_curves.curves(SLOPE * x[:, 0], x, {}, resamples=2, **settings)
        for epoch in range(2):
            gap, merged = (
                result.pooled.early_late[epoch],
                result.merged["merge"].early_late[epoch].excess,
            )
            # another epoch's effect is noise in this one
            value = truth.pooled.early_late[0].estimate if epoch == 0 else 0.0
            covered[seed, epoch] = gap.low <= value <= gap.high
            excess[seed, epoch] = merged.p < 0.05
    assert np.abs(covered.mean(axis=0) - 0.95).max() <= allowed(draws)
    assert excess.mean(axis=0).max() <= 0.06 + 2.5 * np.sqrt(0.05 * 0.95 / draws)


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


@pytest.mark.parametrize(("case", "draws"), grid(2), ids=name)
def test_bands_of_the_curves_cover(case, draws):
    """The mean over the bins: the bands are pointwise."""
    draws, bins = min(draws, 200), 5
    covered = np.zeros((draws, 2))
    for seed in range(draws):
        losses, x, units = case.draw(seed)
        joint = position_effects.joint_effect(losses, x, units=units)
        settings = {"bins": bins, "seed": seed, "units": units}
        curves = position_curves.curves(
            losses, x, {}, resamples=199, correlations=joint.step_correlation, **settings
        )
        truth = position_curves.curves(SLOPE * x[:, 0], x, {}, resamples=2, **settings)
        for epoch, band in enumerate(curves.pooled.within):
            effect = truth.pooled.within[0].mean if epoch == 0 else np.zeros(len(band.mean))
            expected = losses.mean() + effect - np.average(effect, weights=band.samples)
            inside = (band.low <= expected) & (expected <= band.high)
            covered[seed, epoch] = inside.mean()
    # bins are not independent, and each holds few steps
    assert covered.mean() == pytest.approx(0.95, abs=allowed(draws))


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
