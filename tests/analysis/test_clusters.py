"""Errors by what was assigned: against explicit dummies, refits without a batch, plain loops."""

import numpy as np
import pytest
from scipy import stats

from jax_ordermerge.analysis import clusters, imbalance, position_effects, regression
from jax_ordermerge.analysis.result import Undetermined, asdict
from tests.analysis.simulated import DESIGNS, simulate


def dummies(y, x):
    """Return the design with a dummy per sample and member, and the target, observation by row."""
    _, members, samples = x.shape
    rows = [
        [
            *x[:, m, s],
            *(float(s == t) for t in range(samples)),
            *(float(m == t) for t in range(1, members)),
        ]
        for m in range(members)
        for s in range(samples)
    ]
    return np.array(rows), y.reshape(-1)


def test_fixed_batches_are_left_out_one_by_one():
    losses, positions, units = simulate(DESIGNS["batch"], samples=40, batch=5, icc=0.2, seed=3)
    x = positions.transpose(1, 0, 2)
    fit = regression.fixed_effects(losses, x, units)
    design, target = dummies(losses, x)
    count, of_row = x.shape[0], np.tile(units, len(losses))
    full = np.linalg.lstsq(design, target, rcond=None)[0][:count]
    np.testing.assert_allclose(fit.estimate, full, rtol=1e-9)
    groups = int(units.max()) + 1
    variance = np.zeros((count, count))
    for unit in range(groups):
        rest = of_row != unit
        without = np.linalg.lstsq(design[rest], target[rest], rcond=None)[0][:count]
        variance += np.outer(full - without, full - without)
    np.testing.assert_allclose(fit.covariance, ((groups - 1) / groups) ** 2 * variance, rtol=1e-6)
    effect = fit.effects()[0]
    half = stats.t.ppf(0.975, groups - 1) * np.sqrt(fit.covariance[0, 0])
    assert (effect.low, effect.high) == pytest.approx((full[0] - half, full[0] + half))


@pytest.mark.parametrize("icc", [0.0, 0.3])
def test_two_way_errors_are_the_sums_over_samples_and_steps(icc):
    losses, positions, _ = simulate(DESIGNS["sample"], samples=60, batch=6, icc=icc, seed=1)
    x = positions.transpose(1, 0, 2)
    members, samples = losses.shape
    fit = regression.fixed_effects(losses, x)
    design, target = dummies(losses, x)
    beta = np.linalg.lstsq(design, target, rcond=None)[0]
    residual = target - design @ beta
    bread = np.linalg.pinv(design.T @ design)
    scores = (design * residual[:, None] @ bread)[:, 0]  # of the first coefficient
    of_sample = np.tile(np.arange(samples), members)
    steps = clusters.step_numbers(positions[:, 0])
    of_step = np.concatenate([row + 100 * m for m, row in enumerate(steps)])
    one, two = 0.0, 0.0
    for sample in range(samples):
        one += scores[of_sample == sample].sum() ** 2
    cells = np.unique(of_step)
    for cell in cells:
        two += scores[of_step == cell].sum() ** 2 - (scores[of_step == cell] ** 2).sum()
    # the residual is short of 1 / M of what the step did, and of what was fitted
    two *= cells.size / (cells.size - members - 2) / (1 - 1 / members) ** 2
    count = members * samples
    one *= samples / (samples - 1) * (count - 1) / (count - members - 2)
    pooled = fit._moulton(0, steps)
    plain, clustered = fit.effects()[0], fit.effects([steps])[0]
    assert plain.se == pytest.approx(np.sqrt(one))
    assert clustered.se == pytest.approx(np.sqrt(one + max(two, pooled, 0)))
    assert clustered.se >= plain.se


def test_the_pooled_step_variance_is_that_of_the_quadratic_form():
    losses, positions, _ = simulate(DESIGNS["sample"], samples=60, batch=6, icc=0.3, seed=2)
    x = positions.transpose(1, 0, 2)
    fit = regression.fixed_effects(losses, x)
    steps = clusters.step_numbers(positions[:, 1])
    icc, _ = clusters.step_correlation(fit.residuals, steps, 2)
    centred = regression.within(x)
    inverse = np.linalg.inv(np.einsum("rmn,qmn->rq", centred, centred))
    weight = np.einsum("r,rmn->mn", inverse[1], centred)  # of each error in the second slope
    same = steps[:, :, None] == steps[:, None, :]
    shared = np.einsum("ms,mst,mt->", weight, same, weight) - (weight**2).sum()
    assert fit._moulton(1, steps) == pytest.approx(icc * fit.residual_sd**2 * shared)


def test_steps_of_one_sample_share_nothing():
    rng = np.random.default_rng(0)
    x = np.stack([[rng.permutation(30) / 29 for _ in range(3)] for _ in range(2)])
    fit = regression.fixed_effects(rng.normal(size=(3, 30)), x)
    steps = [clusters.step_numbers(row) for row in x]
    assert fit.effects(steps) == fit.effects()
    with pytest.raises(Undetermined, match="steps of one sample"):
        clusters.step_correlation(fit.residuals, steps[0])


@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize("members", [2, 6])
def test_the_correlation_of_steps_is_the_planted_one(level, members):
    """Mean of 60 draws at 0, 0.1 and 0.3; the spread of one is about 0.05, so the error 0.007."""
    for planted in (0.0, 0.1, 0.3):
        rows = []
        for seed in range(60):
            design = DESIGNS[level]._replace(members=members)
            losses, x, units = simulate(design, samples=320, batch=16, icc=planted, seed=seed)
            effect = position_effects.joint_effect(losses, x, units=units)
            rows.append(effect.step_correlation[-1])
        assert np.mean([row.icc for row in rows]) == pytest.approx(planted, abs=0.03)
        rejected = np.mean([row.p < 0.05 for row in rows])
        assert rejected <= 0.15 if planted == 0 else rejected > 0.6


def test_permutation_of_groups_equals_a_loop():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), [4, 4, 4, 4, 4, 2])[rng.permutation(22)]
    position, values = groups / 5, rng.normal(size=(2, 22))
    p_values = clusters.permutation_p(
        values, position[None], groups[None], permutations=200, generator=np.random.default_rng(3)
    )
    deals, sizes = clusters.permute_groups(groups, 200, np.random.default_rng(3))
    assert (deals[:, 5] == 5).all()  # the short step keeps its place
    assert len(set(map(tuple, deals))) > 50
    assert sizes.tolist() == [4, 4, 4, 4, 4, 2]
    for row in range(2):
        centred = values[row] - values[row].mean()
        observed = abs(centred @ position)
        extreme = sum(abs(centred @ (deal[groups] / 5)) >= observed - 1e-12 for deal in deals)
        assert p_values[row, 0] == pytest.approx((1 + extreme) / 201)


def test_the_analysis_counts_batches_where_batches_were_put_in_order():
    losses, x, units = simulate(DESIGNS["batch"], samples=320, batch=16, icc=0.1, seed=0)
    settings = {"bootstrap": 50, "permutations": 19}
    by_batch = asdict(imbalance.analyze(losses, x, unit="batch", units=units, **settings))
    by_sample = asdict(imbalance.analyze(losses, x, **settings))
    assert (by_batch["design"]["unit"], by_batch["design"]["units"]) == ("batch", 20)
    assert (by_sample["design"]["unit"], by_sample["design"]["units"]) == ("sample", 320)
    assert by_batch["fixed_effects"]["clusters"] == 20
    assert by_batch["fixed_effects"]["coefficients"][0]["estimate"] == pytest.approx(
        by_sample["fixed_effects"]["coefficients"][0]["estimate"]
    )
    first = [document["members"][0]["epochs"][0] for document in (by_batch, by_sample)]
    assert "permutation_p_steps" not in first[0]
    assert 0.05 <= first[1]["permutation_p_steps"] <= 1
    assert first[0]["pearson"]["r"] == first[1]["pearson"]["r"]
    assert first[0]["pearson"]["p"] != first[1]["pearson"]["p"]
    assert [row["epoch"] for row in by_batch["fixed_effects"]["step_correlation"]] == [1, 2]
