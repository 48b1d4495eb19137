"""Regressions against explicit dummies and cluster sums, planted effects, coverage."""

import numpy as np
import pytest
from scipy import stats

from jax_ordermerge.analysis import regression
from jax_ordermerge.analysis.result import Undetermined


def panel(
    seed: int,
    members: int,
    epochs: int,
    samples: int,
    slopes: tuple[float, ...],
    noise: float = 0.1,
):
    rng = np.random.default_rng(seed)
    x = np.stack(
        [
            np.stack([rng.permutation(samples) / (samples - 1) for _ in range(members)])
            for _ in range(epochs)
        ]
    )
    difficulty, level = rng.normal(2, 0.5, samples), rng.normal(0, 0.2, (members, 1))
    # errors that hang together within a sample are what the clusters are for
    common = rng.normal(0, noise, samples) * (x[0] - 0.5)
    return difficulty + level + np.einsum("r,rmn->mn", np.array(slopes), x) + common + rng.normal(
        0, noise, x.shape[1:]
    ), x


def naive_fixed_effects(y: np.ndarray, x: np.ndarray):
    """Fit with a dummy per sample and member; the sandwich is summed sample by sample."""
    regressors, members, samples = x.shape
    rows = []
    for m in range(members):
        for s in range(samples):
            sample_dummy = [float(s == t) for t in range(samples)]
            member_dummy = [float(m == t) for t in range(1, members)]
            rows.append([*x[:, m, s], *sample_dummy, *member_dummy])
    design, target = np.array(rows), y.reshape(-1)
    cluster = np.tile(np.arange(samples), members)
    beta = np.linalg.lstsq(design, target, rcond=None)[0]
    residual = target - design @ beta
    bread = np.linalg.inv(design.T @ design)
    meat = np.zeros_like(bread)
    for s in range(samples):
        score = design[cluster == s].T @ residual[cluster == s]
        meat += np.outer(score, score)
    count = members * samples
    factor = samples / (samples - 1) * (count - 1) / (count - regressors - members)
    return beta[:regressors], (factor * bread @ meat @ bread)[:regressors, :regressors]


@pytest.mark.parametrize(("members", "epochs"), [(2, 1), (3, 2), (4, 3)])
def test_fixed_effects_equal_explicit_dummies_and_clusters(members, epochs):
    y, x = panel(members, members, epochs, 23, (-0.3, 0.1, 0.2)[:epochs])
    fit = regression.fixed_effects(y, x)
    estimate, covariance = naive_fixed_effects(y, x)
    np.testing.assert_allclose(fit.estimate, estimate, rtol=1e-9)
    np.testing.assert_allclose(fit.covariance, covariance, rtol=1e-8)
    np.testing.assert_allclose(
        fit.correction * fit.influence.T @ fit.influence, fit.covariance, rtol=1e-12
    )


def test_ols_equals_explicit_hc1():
    rng = np.random.default_rng(3)
    x, samples = rng.normal(size=(2, 40)), 40
    y = 1 + 2 * x[0] - x[1] + rng.normal(size=samples) * (1 + np.abs(x[0]))
    design = np.column_stack([np.ones(samples), *x])
    beta = np.linalg.solve(design.T @ design, design.T @ y)
    residual = y - design @ beta
    bread = np.linalg.inv(design.T @ design)
    covariance = bread @ (design.T * residual**2) @ design @ bread * samples / (samples - 3)
    fit = regression.ols(y, x)
    np.testing.assert_allclose(fit.estimate, beta[1:], rtol=1e-10)
    np.testing.assert_allclose(fit.covariance, covariance[1:, 1:], rtol=1e-9)
    np.testing.assert_allclose(
        fit.residual_sd, np.sqrt((residual**2).sum() / (samples - 3)), rtol=1e-10
    )


def test_the_difficulty_of_samples_cancels():
    y, x = panel(0, 4, 2, 50, (-0.3, 0.1))
    shifted = regression.fixed_effects(y + 100 * np.random.default_rng(1).normal(size=50), x)
    np.testing.assert_allclose(shifted.estimate, regression.fixed_effects(y, x).estimate, rtol=1e-8)


def test_planted_slopes_are_recovered_and_intervals_cover_nominally():
    inside, truth = np.zeros(2), np.array([-0.1, 0.0])
    for seed in range(300):
        fit = regression.fixed_effects(*panel(seed, 3, 2, 40, tuple(truth)))
        for r, effect in enumerate(fit.effects()):
            inside[r] += effect.low <= truth[r] <= effect.high
    # 300 simulations at 95 %: the number covered lies in this interval with probability 0.9999
    low, high = stats.binom.interval(0.9999, 300, 0.95)
    assert (low <= inside).all()
    assert (inside <= high).all()


def test_summarize_is_students_t():
    effect = regression.summarize(1.0, 0.25, 11)
    assert effect.z == 2.0
    assert effect.p == pytest.approx(2 * stats.t.sf(2.0, 10))
    assert effect.high - effect.estimate == pytest.approx(0.5 * stats.t.ppf(0.975, 10))


def test_what_cannot_be_determined_says_why():
    y, x = panel(0, 3, 2, 30, (0.1, 0.1))
    same = np.broadcast_to(x[:, :1], x.shape)
    cases = [
        (lambda: regression.fixed_effects(y[:1], x[:, :1]), "one member"),
        (lambda: regression.fixed_effects(y, same), "same positions in all members"),
        (lambda: regression.fixed_effects(y, np.stack([x[0], 1 - x[0]])), "linearly dependent"),
        (lambda: regression.fixed_effects(y[:, :2], x[:, :, :2]), "too few"),
        (lambda: regression.fixed_effects(np.ones_like(y), x), "do not vary"),
        (lambda: regression.ols(y[0], np.ones((1, 30))), "positions do not vary"),
        (lambda: regression.ols(np.ones(0), np.ones((1, 0))), "positions do not vary"),
        (lambda: regression.summarize(1.0, 0.0, 10), "no residual variation"),
    ]
    for call, reason in cases:
        with pytest.raises(Undetermined, match=reason):
            call()
