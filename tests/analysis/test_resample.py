"""Bins, bootstrap bands and permutation tests against loops, and their rates under the null."""

import numpy as np
import pytest
from scipy import stats

from jax_ordermerge.analysis import resample
from jax_ordermerge.analysis.resample import Job
from jax_ordermerge.analysis.result import Estimate, Undetermined


def test_bins_are_deciles_of_about_equal_size_and_keep_steps_together():
    position = np.floor(np.random.default_rng(0).permutation(100) / 4) / 24
    numbers = resample.bin_numbers(position, 10)
    assert set(numbers) == set(range(10))
    assert np.bincount(numbers).min() >= 8
    for step in np.unique(position):
        assert len(set(numbers[position == step])) == 1


def test_curve_means_are_plain_means_and_members_of_a_sample_stay_together():
    rng = np.random.default_rng(1)
    values, positions = (
        rng.normal(size=(3, 200)),
        np.stack([rng.permutation(200) / 199 for _ in range(3)]),
    )
    (curve,) = resample.curves([Job(values, positions, 5)], resamples=400, generator=rng)
    numbers = np.stack([resample.bin_numbers(p, 5) for p in positions])
    for u in range(5):
        assert curve.mean[u] == pytest.approx(values[numbers == u].mean())
        assert curve.position[u] == pytest.approx(positions[numbers == u].mean())
    # Values that depend on the sample only: the band must be as wide as that of one member.
    difficulty = np.broadcast_to(rng.normal(size=200), (3, 200))
    same = np.broadcast_to(positions[0], (3, 200))
    three_members, one_member = resample.curves(
        [Job(difficulty, same, 5), Job(difficulty[:1], same[:1], 5)],
        resamples=400,
        generator=np.random.default_rng(2),
    )
    np.testing.assert_allclose(three_members.replicates, one_member.replicates)


def test_bootstrap_spread_is_the_standard_error_whatever_the_block(monkeypatch):
    rng = np.random.default_rng(4)
    values, positions = rng.normal(size=(1, 600)), rng.permutation(600)[None] / 599
    monkeypatch.setattr(resample, "BLOCK", 2000 * 70)
    (curve,) = resample.curves(
        [Job(values, positions, 3)], resamples=2000, generator=np.random.default_rng(0)
    )
    numbers = resample.bin_numbers(positions[0], 3)
    expected = [values[0, numbers == u].std() / np.sqrt((numbers == u).sum()) for u in range(3)]
    np.testing.assert_allclose(curve.replicates.std(axis=0), expected, rtol=0.08)
    low, high = resample.band(curve.replicates)
    np.testing.assert_allclose((high - low) / 2, 1.96 * np.array(expected), rtol=0.12)


def test_a_curve_less_itself_has_no_gap():
    rng = np.random.default_rng(0)
    (curve,) = resample.curves(
        [Job(rng.normal(size=(1, 60)), rng.random((1, 60)), 4)], resamples=50, generator=rng
    )
    assert resample.gap(curve).estimate == curve.mean[0] - curve.mean[-1]
    assert resample.gap(curve, curve) == Estimate(0.0, 0.0, 0.0, 0.0)


def test_permutation_p_equals_a_loop_over_the_same_deals(monkeypatch):
    rng = np.random.default_rng(5)
    values, positions = rng.normal(size=(2, 25)), rng.random((3, 25))
    values[1] += 0.8 * positions[2]
    monkeypatch.setattr(resample, "BLOCK", 25 * 40)
    p_values = resample.permutation_p(
        values, positions, permutations=100, generator=np.random.default_rng(7)
    )
    generator, deals = np.random.default_rng(7), []
    for block in (40, 40, 20):
        deals += list(generator.permuted(np.tile(np.arange(25), (block, 1)), axis=1))
    for q in range(2):
        for c in range(3):
            observed = abs(np.corrcoef(values[q], positions[c])[0, 1])
            extreme = sum(
                abs(np.corrcoef(values[q][deal], positions[c])[0, 1]) >= observed - 1e-12
                for deal in deals
            )
            assert p_values[q, c] == pytest.approx((1 + extreme) / 101)


def test_permutation_p_is_uniform_under_the_null():
    rng = np.random.default_rng(6)
    p_values = resample.permutation_p(
        rng.normal(size=(200, 15)), rng.random((1, 15)), permutations=199, generator=rng
    )
    assert stats.kstest(p_values[:, 0], "uniform").pvalue > 0.001


def test_a_constant_row_is_no_evidence():
    rng = np.random.default_rng(6)
    assert resample.permutation_p(
        np.ones((1, 9)), rng.random((1, 9)), permutations=20, generator=rng
    ).tolist() == [[1.0]]


def test_too_few_samples_for_the_bins():
    with pytest.raises(Undetermined, match="5 samples are too few for 10 bins"):
        resample.bin_numbers(np.arange(5.0), 10)
