"""All of analysis.json: planted effects, reasons in degenerate designs, plain finite JSON."""

import json

import numpy as np
import pytest
from scipy import stats

from jax_ordermerge.analysis import imbalance, position_effects, regression
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.errors import UserError

SLOPES = (-0.2, 0.0, 0.3)


def planted(samples=300, members=4, slopes=SLOPES, steps=None, seed=0, noise=0.05):
    """Return losses with a known position effect, merges that halve and keep it, and the base.

    Returns:
        losses [M, n], positions [M, E, n], merged losses by name, base losses [n].
    """
    rng = np.random.default_rng(seed)
    steps = steps or samples
    x = np.stack(
        [
            [np.floor(rng.permutation(samples) * steps / samples) for _ in slopes]
            for _ in range(members)
        ]
    )
    x = x / max(1, steps - 1)
    difficulty = rng.normal(2, 0.5, samples)
    losses = (
        difficulty + np.einsum("e,men->mn", slopes, x) + rng.normal(0, noise, (members, samples))
    )
    half = (
        difficulty
        + 0.5 * np.einsum("e,en->n", slopes, x.mean(axis=0))
        + rng.normal(0, noise, samples)
    )
    merged = {"half": half, "average": losses.mean(axis=0) + rng.normal(0, noise / 5, samples)}
    base = 5 + 0.8 * difficulty + rng.normal(0, 0.1, samples)
    return losses, x, merged, base


def run(losses, x, merged=None, base=None, **changes):
    settings = {"warmup_fraction": 0.03, "bootstrap": 100, "permutations": 99, "seed": 1} | changes
    return asdict(imbalance.analyze(losses, x, merged, base_losses=base, **settings))


@pytest.fixture(scope="module")
def data():
    return planted()


@pytest.fixture(scope="module")
def document(data):
    losses, x, merged, base = data
    return run(losses, x, merged, base)


def test_is_plain_finite_json_and_the_same_twice(data, document):
    losses, x, merged, base = data
    text = json.dumps(document, allow_nan=False)
    assert json.dumps(run(losses, x, merged, base)) == text
    assert json.dumps(run(losses, x, merged, base, seed=2)) != text


def test_planted_effects_come_out_of_the_fixed_effects(document):
    for coefficient, truth in zip(document["fixed_effects"]["coefficients"], SLOPES, strict=True):
        assert abs(coefficient["estimate"] - truth) < 4 * coefficient["se"]
        assert coefficient["se"] < 0.015
    first, second, _ = document["fixed_effects"]["coefficients"]
    assert first["epochs"] == [1]
    assert first["p"] < 1e-6 < 1e-4 < second["p"]
    assert document["fixed_effects"]["clusters"] == 300
    assert document["fixed_effects"]["residual_sd"] == pytest.approx(0.05, rel=0.15)


def test_fixed_effects_are_the_regression_of_the_same_arrays(data, document):
    losses, x, _, _ = data
    fit = regression.fixed_effects(losses, x.transpose(1, 0, 2))
    estimates = [c["estimate"] for c in document["fixed_effects"]["coefficients"]]
    np.testing.assert_allclose(estimates, fit.estimate, rtol=1e-12)


def test_one_members_statistics_are_scipys(data, document):
    losses, x, _, _ = data
    row = document["members"][2]["epochs"][0]
    line = stats.linregress(x[2, 0], losses[2])
    assert row["spearman"]["rho"] == pytest.approx(stats.spearmanr(x[2, 0], losses[2]).statistic)
    assert row["pearson"]["p"] == pytest.approx(line.pvalue)
    assert row["slope"]["estimate"] == pytest.approx(line.slope)
    order = np.argsort(x[2, 0])
    deciles = losses[2][order].reshape(10, 30).mean(axis=1)
    np.testing.assert_allclose(row["curve"]["mean"], deciles)
    assert row["decile_gap"]["estimate"] == pytest.approx(deciles[0] - deciles[-1])
    assert row["curve"]["low"][0] < deciles[0] < row["curve"]["high"][0]
    assert 0.01 <= row["permutation_p"] <= 1


def test_taking_difficulty_out_sharpens_the_pooled_curve(document):
    raw, clean = document["pooled"]["raw"][2], document["pooled"]["within"][2]
    width = [np.mean(np.subtract(c["high"], c["low"])) for c in (raw, clean)]
    assert width[1] < width[0] / 3
    slope = np.polyfit(clean["position"], clean["mean"], 1)[0]
    assert slope == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("design", "power"), [("independent", 2), ("independent", 1), ("reversed", 1)]
)
def test_the_pooled_curve_has_the_scale_of_the_effect_in_any_design(design, power):
    losses, x, _, _ = planted(members=2, samples=1000, slopes=(0.0,))
    if design == "reversed":
        x = np.stack([x[0], 1 - x[0]])
    (clean,) = run(losses + 0.5 * x[:, 0] ** power, x)["pooled"]["within"]
    rise = np.power(clean["position"], power)
    np.testing.assert_allclose(
        np.subtract(clean["mean"], clean["mean"][5]), 0.5 * (rise - rise[5]), atol=0.04
    )


def test_warmup_is_split_off(data, document):
    inside, after = document["fixed_effects_warmup"]["coefficients"][:2]
    assert (inside["part"], after["part"]) == ("warm-up", "after warm-up")
    assert abs(inside["estimate"] + 0.2) < 4 * inside["se"]
    assert abs(after["estimate"] + 0.2) < 4 * after["se"]
    assert inside["se"] > 5 * after["se"]
    warmup = document["members"][0]["warmup"]
    assert warmup["window"] == pytest.approx(0.09)
    assert warmup["inside"]["samples"] + warmup["after"]["samples"] == 300
    losses, x, _, _ = data
    assert warmup["after"]["mean_loss"] == pytest.approx(losses[0][x[0, 0] >= 0.09].mean())


def test_an_effect_in_the_warmup_only_is_found_there():
    losses, x, _, _ = planted(samples=1000, slopes=(0.0, 0.0, 0.0))
    bent = losses + 2.0 * np.minimum(x[:, 0], 0.3)
    inside, after = run(bent, x, warmup_fraction=0.1)["fixed_effects_warmup"]["coefficients"][:2]
    assert inside["estimate"] == pytest.approx(2.0, abs=4 * inside["se"])
    assert abs(after["estimate"]) < 4 * after["se"]


def test_merges_that_keep_and_halve_the_effect_are_told_apart(document):
    for name, remaining in (("half", 0.5), ("average", 1.0)):
        merged = document["merged"][name]
        for epoch, truth in enumerate(SLOPES):
            after, change = (merged[key]["coefficients"][epoch] for key in ("after", "change"))
            assert after["estimate"] == pytest.approx(remaining * truth, abs=4 * after["se"])
            assert change["estimate"] == pytest.approx(
                (remaining - 1) * truth, abs=4 * change["se"]
            )
            assert after["se"] < 0.05
        plain = merged["mean_position"]
        assert plain["covariates"] == ["base loss"]
        assert plain["coefficients"][2]["estimate"] == pytest.approx(
            remaining * 0.3, abs=4 * plain["coefficients"][2]["se"]
        )
        assert len(merged["by_member"]) == 4
        assert len(merged["by_member"][0]) == 3
    assert document["merged"]["half"]["change"]["coefficients"][2]["p"] < 0.01


def test_averaging_four_members_leaves_a_quarter_of_the_gap_between_early_and_late(document):
    row = document["merged"]["average"]["early_late"][2]
    # early half against late half: half of the slope in a member, a quarter of that in the average
    assert row["members"]["estimate"] - row["merged"]["estimate"] == pytest.approx(
        -row["difference"]["estimate"]
    )
    assert row["difference"]["estimate"] == pytest.approx(
        0.75 * 0.15, abs=4 * row["difference"]["se"]
    )
    assert row["members"]["estimate"] == pytest.approx(-0.15, abs=4 * row["members"]["se"])
    assert row["merged"]["estimate"] == pytest.approx(-0.15 / 4, abs=4 * row["merged"]["se"])
    assert max(row[key]["se"] for key in ("members", "merged", "difference")) < 0.01
    assert document["pooled"]["early_late"][2]["estimate"] == row["members"]["estimate"]


def test_change_and_after_cover_nominally():
    inside = np.zeros(2)
    for seed in range(200):
        losses, x, merged, _ = planted(samples=60, members=3, slopes=(-0.1,), seed=seed)
        effect = asdict(position_effects.merged_effect(merged["half"], losses, x, None))
        for row, (key, truth) in enumerate((("change", 0.05), ("after", -0.05))):
            c = effect[key]["coefficients"][0]
            inside[row] += c["low"] <= truth <= c["high"]
    low, high = stats.binom.interval(0.9999, 200, 0.95)
    assert (low <= inside).all()
    assert (inside <= high).all()


def test_one_member_has_its_own_statistics_and_says_what_is_missing():
    losses, x, merged, _ = planted(members=1)
    document = run(losses, x, merged)
    assert "one member" in document["fixed_effects"]["reason"]
    assert "one member" in document["pooled"]["within"][0]["reason"]
    assert "one member" in document["merged"]["half"]["after"]["reason"]
    assert document["members"][0]["epochs"][2]["slope"]["estimate"] == pytest.approx(0.3, abs=0.3)
    json.dumps(document, allow_nan=False)


def test_the_same_order_in_all_members():
    losses, x, merged, _ = planted()
    document = run(losses, np.broadcast_to(x[:1], x.shape), merged)
    assert "same positions in all members" in document["fixed_effects"]["reason"]
    assert "same positions in all members" in document["pooled"]["within"][0]["reason"]
    json.dumps(document, allow_nan=False)


def test_reversed_pairs_have_no_mean_position():
    losses, x, merged, _ = planted(members=2)
    x = np.stack([x[0], 1 - x[0]])
    document = run(losses, x, merged)
    assert "positions do not vary" in document["merged"]["half"]["change"]["reason"]
    assert "coefficients" in document["fixed_effects"]


def test_orders_that_never_change_share_one_coefficient():
    losses, x, _, _ = planted()
    document = run(losses, np.broadcast_to(x[:, :1], x.shape))
    (only,) = document["fixed_effects"]["coefficients"]
    assert only["epochs"] == [1, 2, 3]


def test_few_samples_few_steps_and_no_warmup():
    losses, x, merged, _ = planted(samples=12, slopes=(0.1,))
    document = run(losses, x, merged, warmup_fraction=0.0)
    assert document["members"][0]["epochs"][0]["decile_gap"] == {
        "reason": "12 samples are too few for 10 bins"
    }
    assert document["members"][0]["warmup"] == {"reason": "no warm-up"}
    assert "too few" in document["merged"]["half"]["early_late"][0]["reason"]
    assert "coefficients" in document["fixed_effects"]
    json.dumps(document, allow_nan=False)
    for samples in (1, 2, 3):
        losses, x, merged, base = planted(samples=samples, steps=1)
        json.dumps(run(losses, x, merged, base, warmup_fraction=0.5), allow_nan=False)
    losses, x, _, _ = planted(samples=100, steps=3)
    assert len(run(losses, x)["members"][0]["epochs"][0]["curve"]["mean"]) == 3


def test_constant_losses_are_no_crash():
    _, x, _, _ = planted(samples=40)
    document = run(np.ones((4, 40)), x, {"flat": np.ones(40)})
    assert document["members"][0]["epochs"][0]["reason"] == "the losses do not vary"
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"positions": a["positions"][:, :, :5]}, "do not match"),
        (lambda a: a | {"positions": a["positions"] + 1}, r"must lie in \[0, 1\]"),
        (lambda a: a | {"merged": {"x": np.ones(3)}}, "x has losses of shape"),
        (
            lambda a: a | {"losses": np.where(a["losses"] < 2, np.nan, a["losses"])},
            "losses of member 0 are not finite",
        ),
    ],
)
def test_arrays_that_cannot_be_right_are_refused(change, message):
    losses, x, merged, _ = planted(samples=20)
    arrays = change({"losses": losses, "positions": x, "merged": merged})
    with pytest.raises(UserError, match=message):
        run(arrays["losses"], arrays["positions"], arrays["merged"])
