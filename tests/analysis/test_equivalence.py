"""Equivalence and detectable differences: by their definitions, and simulated."""

import numpy as np
import pytest
from scipy import stats

from jax_ordermerge.analysis.equivalence import detectable, equivalence
from jax_ordermerge.errors import UserError


def test_equivalence_is_the_interval_of_90_per_cent_within_the_margin():
    rng = np.random.default_rng(0)
    for _ in range(200):
        estimate, se, freedom = rng.normal(0, 0.5), rng.uniform(0.05, 0.6), rng.integers(2, 50)
        half = stats.t.ppf(0.95, freedom) * se
        inside = estimate - half > -1 and estimate + half < 1
        assert equivalence(estimate, se, freedom, margin=1.0).holds == inside


def test_equivalence_is_two_one_sided_tests():
    values = np.random.default_rng(1).normal(0.1, 1, 40)
    result = equivalence(values.mean(), stats.sem(values), 39, margin=0.4)
    above = stats.ttest_1samp(values, -0.4, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.4, alternative="less").pvalue
    assert result.p == pytest.approx(max(above, below))
    for margin, se in ((0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (np.inf, 1.0)):
        with pytest.raises(UserError, match="above 0"):
            equivalence(0.0, se, 10, margin=margin)


def test_equivalence_keeps_its_size_at_the_margin():
    """True differences of exactly the margin: at most 5 % (error 0.5 % with 2,000 draws)."""
    values = np.random.default_rng(2).normal(0.5, 1, (2000, 60))
    holds = [equivalence(row.mean(), stats.sem(row), 59, margin=0.5).holds for row in values]
    assert np.mean(holds) <= 0.06


@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 400, 20_000, np.inf])
def test_a_detectable_difference_is_found_four_times_in_five(freedom):
    rng, se = np.random.default_rng(3), 0.3
    shift = detectable(se, freedom)
    # Student's t by its definition: a normal estimate over an independent error
    normal = rng.normal(shift, se, 40_000)
    scale = 1 if freedom > 1e6 else np.sqrt(rng.chisquare(freedom, 40_000) / freedom)
    power = np.mean(normal / (se * scale) > stats.t.ppf(0.975, freedom))
    assert power == pytest.approx(0.8, abs=0.01)
    assert detectable(0.0, 10) == 0
