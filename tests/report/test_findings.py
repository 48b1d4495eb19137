"""Sentences say what the numbers bear: direction, strength, and what cannot be told."""

import numpy as np
import pytest

from jax_ordermerge.analysis import paired
from jax_ordermerge.report import findings


def model(name, kind, **more):
    return {"name": name, "kind": kind, "loss": 2.0, "validation_loss": None, "tasks": {}} | more


def items(losses, correct=None):
    tasks = (
        {}
        if correct is None
        else {"sums": [{"id": i, "correct": bool(c)} for i, c in enumerate(correct)]}
    )
    return {"losses": list(losses), "ids": list(range(len(losses))), "tasks": tasks}


@pytest.fixture
def run():
    rng = np.random.default_rng(0)
    hard = rng.normal(2, 0.5, 80)
    rows = {
        name: hard + rng.normal(0, 0.05, 80) + shift
        for name, shift in [("m0", 0), ("m1", 0.02), ("good", -0.1), ("bad", 0.1)]
    }
    right = {
        name: rng.random(80) < share
        for name, share in [("m0", 0.5), ("m1", 0.5), ("good", 0.95), ("bad", 0.05)]
    }
    models = [
        model(
            name,
            "member" if name[0] == "m" else "merge",
            loss=rows[name].mean(),
            tasks={"sums": {"accuracy": right[name].mean(), "se": 0.05, "n": 80}},
            validation_loss=2.0 - (name == "m1"),
        )
        for name in rows
    ]
    return models, {name: items(rows[name], right[name]) for name in rows}, rows, right


def test_comparisons_are_the_paired_ones(run):
    models, found, rows, right = run
    result = findings.compare(models, found, resamples=200, seed=3)
    assert result["best"] == {"name": "m1", "chosen_on": "validation"}
    good = result["merges"]["good"]
    mean = (rows["m0"] + rows["m1"]) / 2
    assert good["loss"]["mean_member"] == paired.difference(
        rows["good"], mean, resamples=200, seed=3
    )
    assert good["loss"]["best_member"] == paired.difference(
        rows["good"], rows["m1"], resamples=200, seed=3
    )
    assert good["tasks"]["sums"]["mcnemar"] == paired.mcnemar(right["good"], right["m1"])


def test_merges_are_compared_with_the_average_and_p_values_corrected_over_the_merges(run):
    models, found, rows, right = run
    names = {"good": "average", "bad": "bad"}
    renamed = [row | {"name": names.get(row["name"], row["name"])} for row in models]
    result = findings.compare(
        renamed, {names.get(name, name): row for name, row in found.items()}, resamples=200, seed=3
    )
    assert "average" not in result["merges"]["average"]["loss"]
    bad = result["merges"]["bad"]
    assert bad["loss"]["average"] == paired.difference(
        rows["bad"], rows["good"], resamples=200, seed=3
    )
    assert bad["tasks"]["sums"]["mcnemar_average"] == paired.mcnemar(right["bad"], right["good"])
    for name in ("mean_member", "best_member"):
        raw = [row["loss"][name]["p"] for row in result["merges"].values()]
        assert [row["loss"]["holm"][name] for row in result["merges"].values()] == paired.holm(raw)
    tested = [row["tasks"]["sums"]["mcnemar"]["p"] for row in result["merges"].values()]
    assert [
        row["tasks"]["sums"]["holm"]["best_member"] for row in result["merges"].values()
    ] == paired.holm(tested)
    told = findings.sentences(None, {"models": renamed}, result)
    assert (
        sum(
            text.startswith("bad,") and "clearly worse" in text and "than the average" in text
            for text in told
        )
        == 2
    )
    assert any("10 comparisons" in text for text in told)


def test_one_of_many_that_looks_good_by_chance_is_not_called_better():
    rng = np.random.default_rng(0)
    rows = {name: rng.normal(2, 1, 60) for name in ("m0", "m1", *(f"x{i}" for i in range(20)))}
    models = [model(name, "member" if name[0] == "m" else "merge") for name in rows]
    result = findings.compare(
        models, {name: items(losses) for name, losses in rows.items()}, resamples=50, seed=0
    )
    assert min(row["loss"]["mean_member"]["p"] for row in result["merges"].values()) < 0.05
    assert all(
        "not distinguishable" in text
        for text in findings.sentences(None, {"models": models}, result)
        if text[0] == "x"
    )


def seeds_of(*names):
    return {
        "merges": [
            {"name": name, "method": "selection", "seed": int(name[-1]), "parameters": {}}
            for name in names
        ]
    }


def test_merges_of_several_seeds_are_one_comparison_of_their_mean(run):
    models, found, rows, right = run
    rng = np.random.default_rng(1)
    drawn = {f"drawn-seed{seed}": rows["m0"] + rng.normal(0, 0.05, 80) for seed in (0, 1, 2)}
    answers = {name: rng.random(80) < 0.5 for name in drawn}
    tasks = {
        name: {"sums": {"accuracy": answers[name].mean(), "se": 0.05, "n": 80}} for name in drawn
    }
    models = [
        *models,
        *(model(name, "merge", loss=drawn[name].mean(), tasks=tasks[name]) for name in drawn),
    ]
    found |= {name: items(drawn[name], answers[name]) for name in drawn}
    result = findings.compare(models, found, resamples=100, seed=3, merge=seeds_of(*drawn))
    assert list(result["merges"]) == ["good", "bad", "drawn"]
    row = result["merges"]["drawn"]
    assert row["names"] == list(drawn)
    for gap, of_seeds, other in (
        (row["loss"], drawn, rows["m1"]),
        (row["tasks"]["sums"], answers, right["m1"].astype(float)),
    ):
        values = np.array(list(of_seeds.values()), float)
        alone = paired.difference(values.mean(axis=0), other, resamples=100, seed=3)
        assert gap["best_member"] == paired.over_seeds(alone, (values - other).mean(axis=1))
        assert gap["best_member"]["se"] > alone["se"]
    assert "mcnemar" not in row["tasks"]["sums"]
    for measure in ("loss", "tasks"):  # one test a method, not one a seed
        of = [
            one["loss"] if measure == "loss" else one["tasks"]["sums"]
            for one in result["merges"].values()
        ]
        raw = [
            gaps["mcnemar"]["p"] if "mcnemar" in gaps else gaps["best_member"]["p"] for gaps in of
        ]
        assert [gaps["holm"]["best_member"] for gaps in of] == paired.holm(raw)
    told = [
        text
        for text in findings.sentences(None, {"models": models}, result)
        if text.startswith("drawn")
    ]
    sd = np.std([losses.mean() for losses in drawn.values()], ddof=1)
    assert f"(mean of 3 merge seeds, sd {sd:.4f})" in told[0]
    assert "McNemar" not in told[1]


def test_only_merges_that_differ_in_the_seed_alone_are_one():
    merge = seeds_of("a-seed0", "a-seed1", "b-seed0", "c-seed3")
    merge["merges"][1]["parameters"] = {"resample": 1}
    assert findings.groups(merge) == {
        name: [name] for name in ("a-seed0", "a-seed1", "b-seed0", "c-seed3")
    }
    taken = {
        "merges": [*seeds_of("a-seed0", "a-seed1")["merges"], {"name": "a", "method": "average"}]
    }
    assert findings.groups(taken) == {"a-seed0, a-seed1": ["a-seed0", "a-seed1"], "a": ["a"]}
    assert findings.groups(None) == {}


def test_losses_are_compared_over_tokens_where_their_numbers_are_known(run):
    models, found, rows, _ = run
    tokens = list(range(1, 81))
    result = findings.compare(
        models,
        {name: row | {"tokens": tokens} for name, row in found.items()},
        resamples=50,
        seed=0,
    )
    expected = np.average(rows["bad"] - rows["m1"], weights=tokens)
    assert result["merges"]["bad"]["loss"]["best_member"]["estimate"] == pytest.approx(expected)


def test_better_is_less_loss_and_more_right_answers(run):
    models, found, _, _ = run
    result = findings.compare(models, found, resamples=200, seed=0)
    told = findings.sentences(None, {"models": models}, result)
    by_start = {
        (name, task): next(s for s in told if s.startswith(f"{name}, {task}"))
        for name in ("good", "bad")
        for task in ("held", "sums")
    }
    for (name, _), text in by_start.items():
        assert text.count("clearly better" if name == "good" else "clearly worse") == 2
    assert any("8 comparisons" in text for text in told)


def test_without_validation_the_choice_is_called_optimistic(run):
    models, found, _, _ = run
    plain = [row | {"validation_loss": None} for row in models]
    result = findings.compare(plain, found, resamples=100, seed=0)
    assert result["best"] == {"name": "m0", "chosen_on": "test"}
    assert any(
        "chosen on test: optimistic" in text
        for text in findings.sentences(None, {"models": plain}, result)
    )


def test_noise_is_not_distinguishable():
    rng = np.random.default_rng(4)
    noise = {name: rng.normal(2, 1, 60) for name in ("m0", "m1", "x")}
    models = [model("m0", "member"), model("m1", "member"), model("x", "merge")]
    told = findings.sentences(
        None,
        {"models": models},
        findings.compare(models, {n: items(v) for n, v in noise.items()}, resamples=200, seed=0),
    )
    assert next(text for text in told if text.startswith("x,")).count("not distinguishable") == 2


@pytest.mark.parametrize(
    ("estimate", "p", "words"),
    [
        (-0.04, 1e-9, "seen early end with the higher loss, clearly"),
        (0.03, 0.03, "seen late end with the higher loss, weakly"),
        (0.03, 0.2, "no effect on the final loss can be told from zero"),
    ],
)
def test_position_sentences(estimate, p, words):
    row = {"epochs": [1], "estimate": estimate, "se": 0.01, "z": estimate / 0.01, "p": p}
    analysis = {
        "fixed_effects": {"coefficients": [row]},
        "members": [{"sd_loss": 0.4}],
        "pooled": {"early_late": []},
        "merged": {},
    }
    first, scale = findings.sentences(analysis, None, {"best": None, "merges": {}})
    assert words in first
    assert f"{100 * abs(estimate) / 0.4:.1f} %" in scale


def test_closing_a_gap_is_told_beside_what_averaging_alone_would_do():
    gap = {"estimate": 0.02, "se": 0.001, "low": 0.018, "high": 0.022}
    row = {
        "merged": gap | {"estimate": 0.005},
        "difference": {"estimate": -0.015, "se": 0.001, "low": -0.017, "high": -0.013},
    }
    analysis = {
        "fixed_effects": {"reason": "because"},
        "members": [{"sd_loss": 0.4}] * 4,
        "pooled": {"early_late": [gap]},
        "merged": {"ties": {"early_late": [row]}},
    }
    none = {"best": None, "merges": {}}
    reason, text = findings.sentences(analysis, None, none)
    assert reason == "No fixed-effects estimate of the position effect: because."
    assert "ties +0.0050" in text
    assert "about +0.0050" in text
    analysis["pooled"]["early_late"] = [gap | {"low": -0.01}]
    assert "no gap between early and late" in findings.sentences(analysis, None, none)[1]


def test_no_members_nothing_to_compare():
    assert findings.compare([model("base", "base")], {}, resamples=10, seed=0) == {
        "best": None,
        "merges": {},
    }


@pytest.mark.parametrize(("zeros", "idle"), [([0.31, 0.4], False), ([0.0, 0.004], True)])
def test_task_vectors(zeros, idle):
    total = {"cosines": [[1, 0.8], [0.8, 1]], "unchanged": zeros}
    merge = {
        "merges": [{"diagnostics": {}}, {"diagnostics": {"total": total}}],
        "dtype": "bfloat16",
    }
    (text,) = findings.sentences(None, None, {"best": None, "merges": {}}, merge)
    assert "mean cosine of 0.800" in text
    assert f"{100 * zeros[0]:.1f} to {100 * zeros[1]:.1f} %" in text
    assert ("nothing to draw again" in text) is idle
