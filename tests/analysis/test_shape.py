"""Position effects of any shape: tests, shares of variance, sizes, and the simultaneous band."""

import json

import numpy as np
import pytest
from scipy import stats

from jax_ordermerge.analysis import imbalance, position_curves, position_effects, shape
from jax_ordermerge.analysis.result import Undetermined, asdict
from jax_ordermerge.data import order
from tests.analysis.simulated import DESIGNS, Design, simulate

SLOW = pytest.mark.slow


def test_a_bent_effect_without_a_slope_is_found():
    losses, x, _ = simulate(
        Design("sample", 8), samples=320, batch=16, icc=0.0, seed=0, slope=0.0, noise=0.05
    )
    bent = losses + 0.2 * (x[:, 0] - 0.5) ** 2
    slopes = position_effects.joint_effect(bent, x).coefficients
    assert slopes[0].p > 0.05
    first, second = shape.omnibus(bent, x, bins=10, permutations=400, seed=0)
    assert first.p < 1e-4 < 0.01 < second.p
    assert (first.epochs, first.holm) == ([1], pytest.approx(2 * first.p))
    # the scale is that of Wald's test with a step as the unit: about one degree per free bin
    assert 6 < first.freedom < 10.5
    with pytest.raises(Undetermined, match="one member"):
        shape.omnibus(losses[:1], x[:1], bins=10, permutations=9, seed=0)
    same = np.broadcast_to(x[:1], x.shape)
    with pytest.raises(Undetermined, match="same positions"):
        shape.omnibus(losses, same, bins=10, permutations=9, seed=0)


@pytest.mark.parametrize("members", [1, 2, 4])
def test_one_step_per_epoch_determines_nothing(members):
    losses = np.random.default_rng(0).normal(2, 0.5, (members, 40))
    document = asdict(
        imbalance.analyze(
            losses,
            np.zeros((members, 2, 40)),
            {"average": losses.mean(axis=0)},
            base_losses=losses[0] + 1,
            unit="batch",
            units=np.zeros(40, int),
            bootstrap=20,
            permutations=9,
        )
    )
    reason = "one member only" if members == 1 else "same positions"
    for key in ("fixed_effects", "omnibus", "explained"):
        assert reason in document[key]["reason"]
    json.dumps(document, allow_nan=False)


def levels(level, members, samples, batch, seed):
    settings = {"examples": samples, "batch": batch, "seed": seed, "members": members}
    return np.array(
        [
            [
                order.positions(
                    order.order_indices(level=level, member=m, epoch=0, **settings), samples
                )
            ]
            for m in range(members)
        ]
    )


@pytest.mark.parametrize(
    ("level", "members", "icc", "draws"),
    [
        ("sample", 2, 0.3, 100),
        *(
            pytest.param(level, members, icc, 600, marks=SLOW)
            for level in ("sample", "batch", "balanced", "reverse")
            for members in (2, 4)
            for icc in (0.0, 0.3)
        ),
    ],
)
def test_the_omnibus_test_keeps_its_size(level, members, icc, draws):
    """5 % and two and a half Monte Carlo errors: 0.009 each with 600 draws, 0.022 with 100."""
    rejected = 0
    for seed in range(draws):
        # every other population with a short last batch, where reversed steps do not coincide
        samples = 200 + 5 * (seed % 2)
        x = levels(level, members, samples, 10, seed)
        rng = np.random.default_rng(seed)
        last = -(-samples // 10) - 1
        steps = np.rint(x[:, 0] * last).astype(int)
        of_step = np.take_along_axis(rng.normal(size=(members, last + 1)), steps, axis=1)
        error = np.sqrt(1 - icc) * rng.normal(size=steps.shape) + np.sqrt(icc) * of_step
        losses = rng.normal(2, 3, samples) + error
        (test,) = shape.omnibus(losses, x, bins=10, permutations=199, seed=seed)
        rejected += test.p < 0.05
    assert rejected / draws <= 0.06 + 2.5 * np.sqrt(0.05 * 0.95 / draws)


def test_explained_variance_is_the_planted_share():
    """Slopes alone, and a bend: shares of the variance of a sample's loss between members."""
    losses, x, _ = simulate(
        Design("sample", 12), samples=2000, batch=20, icc=0.0, seed=0, slope=-0.2, noise=0.1
    )
    planted = 0.2**2 / 12 / (0.2**2 / 12 + 0.1**2)
    result = shape.explained(losses, x, bins=10)
    assert result.lines == pytest.approx(planted, abs=0.01)
    assert result.bins == pytest.approx(planted, abs=0.01)
    assert result.sd == pytest.approx(np.sqrt(0.2**2 / 12 + 0.1**2), rel=0.02)
    bent = losses + 0.2 * x[:, 0] + np.cos(2 * np.pi * x[:, 1])
    result = shape.explained(bent, x, bins=10)
    assert result.lines < 0.02
    assert result.bins == pytest.approx(0.95, abs=0.03)
    nothing = shape.explained(losses + 0.2 * x[:, 0], x, bins=10)
    assert abs(nothing.lines) < 0.002
    assert abs(nothing.bins) < 0.002


def test_explained_variance_is_adjusted_r_squared():
    losses, x, _ = simulate(DESIGNS["sample"], samples=60, batch=6, icc=0.0, seed=4)
    result = shape.explained(losses, x, bins=5)
    members, samples = losses.shape
    rows = [
        [
            *x[m, :, s],
            *(float(s == t) for t in range(samples)),
            *(float(m == t) for t in range(1, members)),
        ]
        for m in range(members)
        for s in range(samples)
    ]
    full, target = np.array(rows), losses.reshape(-1)

    def squares(design):
        return float(np.linalg.lstsq(design, target, rcond=None)[1][0])

    free = (members - 1) * (samples - 1)
    expected = 1 - squares(full) / (free - 2) / (squares(full[:, 2:]) / free)
    assert result.lines == pytest.approx(expected)


def test_sizes_by_the_base_loss_are_in_per_cent_of_the_loss():
    """An effect that is 4 % of the loss everywhere, as measured on real data."""
    rng = np.random.default_rng(0)
    losses, x, _ = simulate(Design("sample", 4), samples=800, batch=16, icc=0.0, seed=0, slope=0)
    difficulty = rng.gamma(2, 0.5, 800) + 0.2
    losses = difficulty * (1 - 0.04 * x[:, 0]) + rng.normal(0, 0.003, losses.shape)
    rows = shape.by_base_loss(losses, x, 3 + difficulty)
    assert [row.quartile for row in rows] == [1, 2, 3, 4]
    assert [row.samples for row in rows] == [200] * 4
    slopes = [row.coefficients[0].estimate for row in rows]
    assert slopes == sorted(slopes, reverse=True)
    for row in rows:
        assert row.coefficients[0].percent == pytest.approx(-4.1, abs=0.4)
    document = asdict(imbalance.analyze(losses, x, base_losses=3 + difficulty, bootstrap=20))
    (percent, _) = (row["percent"] for row in document["fixed_effects"]["coefficients"])
    estimate = document["fixed_effects"]["coefficients"][0]["estimate"]
    assert percent == pytest.approx(100 * estimate / losses.mean())
    assert [row["quartile"] for row in document["by_base_loss"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("draws", [40, pytest.param(400, marks=SLOW)])
def test_the_band_over_all_epochs_is_simultaneous(draws):
    """It holds the true curve everywhere in 95 % of the draws; pointwise bands in far fewer."""
    inside, pointwise = 0, 0
    for seed in range(draws):
        losses, x, _ = simulate(DESIGNS["sample"], samples=400, batch=10, icc=0.0, seed=seed)
        pooled = position_curves.curves(losses, x, {}, bins=8, resamples=300, seed=seed).pooled
        curve = pooled.trajectory
        truth = position_curves.curves(
            -0.05 * x[:, 0], x, {}, bins=8, resamples=2, seed=0
        ).pooled.within
        expected = [
            np.asarray(band.mean) - np.average(band.mean, weights=band.samples) for band in truth
        ]
        expected = np.concatenate([expected[0], np.zeros(8)])
        inside += bool(((curve.low <= expected) & (expected <= curve.high)).all())
        low, high = (
            np.concatenate([getattr(band, key) for band in pooled.within])
            - np.repeat([np.average(band.mean, weights=band.samples) for band in pooled.within], 8)
            for key in ("low", "high")
        )
        pointwise += bool(((low <= expected) & (expected <= high)).all())
    error = np.sqrt(0.05 * 0.95 / draws)
    assert inside / draws == pytest.approx(0.95, abs=0.02 + 2.5 * error)
    assert pointwise / draws < 0.8


def test_the_sizes_of_a_wald_test_agree_without_correlated_steps():
    """The permutation test against chi-squared of the same statistic, where that is right."""
    p_values = []
    for seed in range(20):
        losses, x, _ = simulate(
            Design("sample", 6, 1), samples=600, batch=5, icc=0, seed=seed, slope=0
        )
        (test,) = shape.omnibus(losses, x, bins=10, permutations=400, seed=seed)
        values = losses - losses.mean(axis=0) - losses.mean(axis=1, keepdims=True) + losses.mean()
        order_of = np.argsort(x[:, 0], axis=1, kind="stable")
        sums = np.take_along_axis(values, order_of, axis=1).reshape(6, 10, 60).sum(axis=(0, 2))
        variance = float((values**2).sum() / (5 * 599))
        # the mean of a sample over six members takes a sixth away
        wald = float((sums**2 / 360).sum()) / variance / (1 - 1 / 6)
        p_values.append((test.p, stats.chi2.sf(wald, 9)))
    np.testing.assert_allclose(*np.transpose(p_values), atol=0.12)
