"""Spread and agreement of models, against numpy, by hand and by simulation."""

import numpy as np
import pytest

from jax_ordermerge.analysis.result import Undetermined
from jax_ordermerge.analysis.spread import agreement, spread


def test_spread_is_that_of_the_weighted_means():
    rng = np.random.default_rng(0)
    losses, tokens = rng.exponential(1.0, (5, 40)), rng.integers(1, 9, 40).astype(float)
    result = spread(losses, tokens)
    means = (losses * tokens).sum(axis=1) / tokens.sum()
    np.testing.assert_allclose(result.sd, np.std(means, ddof=1))
    variances = [np.var(losses[:, item], ddof=1) for item in range(40)]
    np.testing.assert_allclose(result.item_sd**2, np.average(variances, weights=tokens))
    assert result.low < result.sd < result.high


def test_the_interval_covers_the_standard_deviation():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(2000):
        result = spread(rng.normal(0, 0.3, (4, 1)) + np.arange(3))
        hits += result.low <= 0.3 <= result.high
    assert abs(hits / 2000 - 0.95) < 0.02


def test_agreement_by_hand():
    # 4 of 6 alike; p = 1/2, q = 1/3: 1/2 by chance
    pair = [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    result = agreement(pair)
    assert result.share == pytest.approx(5 / 6)
    assert result.kappa == pytest.approx((5 / 6 - 1 / 2) / (1 / 2))
    assert agreement([[1, 1], [1, 1]]).kappa is None
    three = agreement([*pair, [0, 0, 0, 1, 1, 1]])
    assert three.share == pytest.approx((5 / 6 + 0 + 1 / 6) / 3)


def test_one_model_has_no_spread():
    with pytest.raises(Undetermined):
        spread([[1.0, 2.0]])
    with pytest.raises(Undetermined):
        agreement([[True, False]])
