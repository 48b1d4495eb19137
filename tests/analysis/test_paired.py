"""Paired comparisons and claims: formulas, coverage, McNemar against a table worked by hand."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from jax_ordermerge.analysis import paired
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream_key_bits


def test_difference_is_the_mean_gap_and_its_interval_close_to_the_normal_one():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(2, 1, 500)
    first, second = difficulty + rng.normal(0.05, 0.1, 500), difficulty + rng.normal(0, 0.1, 500)
    result = paired.difference(first, second, resamples=4000)
    gaps = first - second
    assert result.estimate == pytest.approx(gaps.mean())
    assert result.se == pytest.approx(stats.sem(gaps))
    assert result.low == pytest.approx(gaps.mean() - 1.96 * result.se, abs=0.15 * result.se)
    assert result.high == pytest.approx(gaps.mean() + 1.96 * result.se, abs=0.15 * result.se)
    assert result.p == pytest.approx(stats.ttest_rel(first, second).pvalue)
    back = paired.difference(second, first, resamples=4000)
    assert back.low == pytest.approx(-result.high)


def test_equal_models_differ_by_nothing():
    assert paired.difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == paired.Difference(
        0.0, 0.0, 0.0, 0.0, p=1.0, n=3, median=0.0, wilcoxon_p=1.0
    )


def test_all_items_alike_are_as_sure_as_their_number():
    assert paired.difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]).p == 0.25


def test_interval_covers_and_p_rejects_nominally():
    rng, covered, rejected = np.random.default_rng(1), 0, 0
    for _ in range(300):
        result = paired.difference(rng.normal(size=50), rng.normal(size=50), resamples=300)
        covered += result.low <= 0 <= result.high
        rejected += result.p < 0.05
    assert 0.89 <= covered / 300 <= 0.985
    assert 0.015 <= rejected / 300 <= 0.11


def test_weights_make_a_ratio_of_means():
    rng = np.random.default_rng(2)
    weights = rng.integers(1, 40, 400)
    first, second = rng.normal(size=(2, 400)) / np.sqrt(weights)
    result = paired.difference(first, second, weights=weights, resamples=3000)
    gaps = first - second
    estimate = (gaps * weights).sum() / weights.sum()
    error = np.sqrt(((weights * (gaps - estimate)) ** 2).sum() * 400 / 399) / weights.sum()
    assert result.estimate == pytest.approx(estimate)
    assert result.se == pytest.approx(error)
    assert result.high - result.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    plain = paired.difference(first, second)
    assert asdict(paired.difference(first, second, weights=np.full(400, 7))) == pytest.approx(
        asdict(plain)
    )
    with pytest.raises(UserError, match="expected one above 0"):
        paired.difference([1, 2], [2, 3], weights=[1, 0])


def test_blocks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 30))
    expected = paired.difference(first, second, resamples=100)
    monkeypatch.setattr(paired, "BLOCK", 30 * 7)
    assert paired.difference(first, second, resamples=100) == expected


def naive_interval(gaps, weights, rows):
    """Return the studentized interval by its definition, resample by resample."""

    def fit(values, weight):
        estimate = np.average(values, weights=weight)
        residuals = weight / weight.mean() * (values - estimate)
        return estimate, residuals.std(ddof=1) / np.sqrt(len(values))

    estimate, error = fit(gaps, weights)
    resampled = [fit(gaps[row], weights[row]) for row in rows]
    deviations = [(value - estimate) / se for value, se in resampled if se > 1e-12]
    high, low = np.quantile(deviations, (0.025, 0.975))
    return estimate - low * error, estimate - high * error


@pytest.mark.parametrize("weighted", [False, True])
def test_intervals_are_studentized(weighted):
    rng = np.random.default_rng(0)
    gaps = rng.gamma(0.5, 1, 40) - 0.5
    weights = rng.integers(1, 20, 40) if weighted else np.ones(40)
    result = paired.difference(gaps, np.zeros(40), weights=weights, resamples=500, seed=4)
    generator = np.random.default_rng(stream_key_bits(4, "analysis", "paired", 40))
    low, high = naive_interval(gaps, weights, generator.integers(0, 40, (500, 40)))
    assert (result.low, result.high) == pytest.approx((low, high), rel=1e-9)
    # a long right tail: the interval reaches further on that side
    assert result.high - result.estimate > 1.2 * (result.estimate - result.low) or weighted


@pytest.mark.parametrize(
    ("items", "draws"),
    [(40, 200), *(pytest.param(n, 2000, marks=pytest.mark.slow) for n in (40, 100, 400))],
)
def test_intervals_cover_skewed_losses(items, draws):
    """Differences with a long tail, as of a lengthened average (kurtosis 19 on the quickstart).

    Percentile intervals cover 0.87 (n 40), 0.90 (100) and 0.92 (400). The Monte Carlo error is
    0.005 with 2,000 draws, 0.015 with 200.
    """
    rng, covered, by_percentile = np.random.default_rng(items), 0, 0
    for _ in range(draws):
        gaps = rng.gamma(0.3, 1, items) - 0.3
        result = paired.difference(gaps, np.zeros(items), resamples=399)
        covered += result.low <= 0 <= result.high
        means = gaps[rng.integers(0, items, (399, items))].mean(axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        by_percentile += low <= 0 <= high
    error = np.sqrt(0.05 * 0.95 / draws)
    assert 0.93 - 2.5 * error <= covered / draws <= 0.97 + 2.5 * error
    assert by_percentile < covered


@pytest.mark.parametrize("items", [2, 3, 7])
def test_intervals_of_a_handful_of_items_are_students(items):
    gaps = np.random.default_rng(items).normal(1, 1, items)
    result = paired.difference(gaps, np.zeros(items))
    expected = stats.ttest_1samp(gaps, 0).confidence_interval()
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))


def test_median_wilcoxon_and_the_items_that_decide():
    rng = np.random.default_rng(1)
    gaps = np.concatenate([rng.normal(0.01, 0.005, 95), [-3.0, -2.0, -1.0, -1.0, -1.0]])
    result = paired.difference(gaps, np.zeros(100))
    assert result.estimate < 0 < result.median == pytest.approx(np.median(gaps))
    assert result.wilcoxon_p == pytest.approx(stats.wilcoxon(gaps).pvalue)
    squares = (gaps - gaps.mean()) ** 2
    assert result.top_share == pytest.approx(np.sort(squares)[-5:].sum() / squares.sum())
    assert result.top_share > 0.9 > paired.FEW_ITEMS
    assert paired.difference(rng.normal(size=1000), np.zeros(1000)).top_share < 0.1


@pytest.mark.parametrize(("only_first", "only_second"), [(9, 3), (3, 9), (0, 4), (1, 1), (5, 5)])
def test_mcnemar_is_the_mid_p(only_first, only_second):
    first = [True] * only_first + [False] * only_second + [True] * 20 + [False] * 10
    second = [False] * only_first + [True] * only_second + [True] * 20 + [False] * 10
    result = paired.mcnemar(first, second)
    assert (result.only_first, result.only_second) == (only_first, only_second)
    differing, fewer = only_first + only_second, min(only_first, only_second)
    at = [math.comb(differing, k) / 2**differing for k in range(differing + 1)]
    # every number as far from the middle as the observed one counts, the observed ones half
    far = sum(p for k, p in enumerate(at) if min(k, differing - k) < fewer)
    same = sum(p for k, p in enumerate(at) if min(k, differing - k) == fewer)
    assert result.p == pytest.approx(far + same / 2)
    assert paired.mcnemar([True, False], [True, False]).p == 1.0


def test_other_items_are_refused():
    with pytest.raises(UserError, match="3 and 2 items"):
        paired.difference([1, 2, 3], [1, 2])
    with pytest.raises(UserError, match="at least two"):
        paired.mcnemar([True], [True])


@pytest.mark.parametrize("seed", range(20))
def test_holm_rejects_what_the_step_down_rule_rejects(seed):
    p_values = np.random.default_rng(seed).beta(0.4, 2, 7)
    for level in (0.01, 0.05, 0.2):
        rejected, left = set(), sorted(range(7), key=lambda i: p_values[i])
        while left and p_values[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert {i for i, p in enumerate(paired.holm(p_values)) if p <= level} == rejected


def test_a_planted_effect_is_detected_and_a_null_is_not():
    """1,000 evaluations of a merge that is better by 0.1, and of a merge that is not.

    The difficulty of the items is shared.
    """
    rng, covered, detected, claimed = np.random.default_rng(5), 0, 0, 0
    for _ in range(1000):
        member = rng.gamma(2, 1, 100)
        better, same = (member + rng.normal(shift, 0.3, 100) for shift in (-0.1, 0))
        effect, null = (
            paired.difference(losses, member, resamples=300) for losses in (better, same)
        )
        covered += effect.low <= -0.1 <= effect.high
        detected += effect.p < 0.05
        claimed += null.p < 0.05
    # binomial bands of four standard errors around 95 % and 5 %, and the power of the t-test
    assert 0.922 < covered / 1000 < 0.978
    assert 0.022 < claimed / 1000 < 0.078
    power = stats.nct.sf(stats.t.isf(0.025, 99), 99, 0.1 / 0.3 * 10)
    assert abs(detected / 1000 - power) < 4 * math.sqrt(power * (1 - power) / 1000)


def test_correct_answers_of_a_planted_effect():
    """McNemar's mid-p test keeps its level, and detects 12 points at 400 items."""
    rng, detected, claimed = np.random.default_rng(6), 0, 0
    for _ in range(1000):
        ability = rng.random((3, 400)) < rng.beta(2, 2, 400)
        better = ability[1] | (rng.random(400) < 0.24)
        detected += paired.mcnemar(better, ability[0]).p < 0.05
        claimed += paired.mcnemar(ability[2], ability[0]).p < 0.05
    assert claimed / 1000 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 1000)
    assert detected / 1000 > 0.9


@pytest.mark.parametrize("sd", [0.02, 0.2])
def test_the_spread_between_seeds_is_in_the_error(sd):
    """Three seeds of a method without an effect: at most 5 % are called a difference.

    By the errors over items it would be far more.
    """
    rng = np.random.default_rng(1)
    over_items, with_seeds = [], []
    for _ in range(600):
        effects = rng.normal(0, sd, (3, 1))
        values = rng.normal(0, 0.1, 40) + effects + rng.normal(0, 0.01, (3, 40))
        gap = paired.difference(values.mean(axis=0), np.zeros(40), resamples=1)
        over_items.append(gap.p < 0.05)
        total = paired.over_seeds(gap, values.mean(axis=1))
        with_seeds.append(total.p < 0.05)
        assert (total.low > 0 or total.high < 0) == (total.p < 0.05)
    assert np.mean(with_seeds) < 0.073  # 5 % and two and a half standard errors of 600 simulations
    if sd == 0.2:
        assert np.mean(over_items) > 0.5


def losses(shift, seed=0):
    difficulty = np.random.default_rng(9).normal(2, 0.5, 100)
    return difficulty + shift + np.random.default_rng(seed).normal(0, 0.02, 100)


def test_a_claim_is_the_paired_difference_corrected_for_its_rivals():
    winner = losses(0)
    rivals = {
        "best_member": losses(0.1, seed=1),
        "mean_member": losses(0.0, seed=2),
        "average": losses(-0.1, seed=3),
    }
    tokens = np.random.default_rng(4).integers(1, 50, 100)
    pairs = {name: (winner, row) for name, row in rivals.items()}
    claims = paired.claims(pairs, tokens)
    gaps = {name: paired.difference(winner, row, weights=tokens) for name, row in rivals.items()}
    corrected = paired.holm([gap.p for gap in gaps.values()])
    for (name, gap), p in zip(gaps.items(), corrected, strict=True):
        assert claims[name] == paired.Claim(**asdict(gap), holm=p)
    assert claims["best_member"].is_better
    assert not claims["mean_member"].is_better
    assert not claims["average"].is_better


def test_a_winner_that_is_its_rival_claims_nothing_against_it():
    winner = losses(0)
    pairs = {"best_member": (winner, winner), "average": (winner, losses(0.1, seed=1))}
    assert list(paired.claims(pairs)) == ["average"]


@pytest.mark.parametrize(("estimate", "holm"), [(-0.1, 0.2), (0.1, 0.001)])
def test_a_claim_needs_a_lower_loss_and_a_small_p(estimate, holm):
    assert not paired.Claim(estimate, 0.1, 0.0, 0.0, p=0.001, n=9, holm=holm).is_better
