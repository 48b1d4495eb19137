"""Paired comparisons of a run, and sentences that say no more than the numbers support."""

from pathlib import Path

import numpy as np
import pytest

from jax_ordermerge.analysis import equivalence, paired
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.report import differences, findings
from jax_ordermerge.report.run import Run


def make_run(models=None, items=None, *, resamples=100, seed=0, **files):
    """Return a run with these files, as if read from a directory."""
    config = {"evaluation": {"bootstrap": resamples}, "seed": seed}
    if models is not None:
        files["evaluations"] = {"models": models}
    return Run(RunLayout(Path("run")), config, items=items or {}, **files)


def make_model(name, kind, **values):
    return {"name": name, "kind": kind, "loss": 2.0, "validation_loss": None, "tasks": {}} | values


def make_items(losses, correct=None):
    tasks = (
        {}
        if correct is None
        else {"sums": [{"id": i, "correct": bool(c)} for i, c in enumerate(correct)]}
    )
    return {"losses": list(losses), "ids": list(range(len(losses))), "tasks": tasks}


@pytest.fixture
def planted():
    """Two members, a merge that is better and one that is worse: models, items, losses, answers."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(2, 0.5, 80)
    losses = {
        name: difficulty + rng.normal(0, 0.05, 80) + shift
        for name, shift in [("m0", 0), ("m1", 0.02), ("good", -0.1), ("bad", 0.1)]
    }
    correct = {
        name: rng.random(80) < share
        for name, share in [("m0", 0.5), ("m1", 0.5), ("good", 0.95), ("bad", 0.05)]
    }
    models = [
        make_model(
            name,
            "member" if name[0] == "m" else "merge",
            loss=losses[name].mean(),
            tasks={"sums": {"accuracy": correct[name].mean(), "se": 0.05, "n": 80}},
            validation_loss=2.0 - (name == "m1"),
        )
        for name in losses
    ]
    items = {name: make_items(losses[name], correct[name]) for name in losses}
    return models, items, losses, correct


def test_comparisons_are_the_paired_ones(planted):
    models, items, losses, correct = planted
    comparison = differences.compare(models, items, resamples=200, seed=3)
    assert comparison.best == differences.BestMember("m1", "validation")
    good = comparison.merges["good"]
    mean = (losses["m0"] + losses["m1"]) / 2
    assert good.loss.gaps["mean_member"] == paired.difference(
        losses["good"], mean, resamples=200, seed=3
    )
    assert good.loss.gaps["best_member"] == paired.difference(
        losses["good"], losses["m1"], resamples=200, seed=3
    )
    assert good.measures["sums"].mcnemar["best_member"] == paired.mcnemar(
        correct["good"], correct["m1"]
    )


def test_merges_are_compared_with_the_average_and_p_values_corrected_over_the_merges(planted):
    models, items, losses, correct = planted
    names = {"good": "average", "bad": "bad"}
    renamed = [row | {"name": names.get(row["name"], row["name"])} for row in models]
    run = make_run(
        renamed, {names.get(name, name): row for name, row in items.items()}, resamples=200, seed=3
    )
    merges = run.comparison.merges
    assert "average" not in merges["average"].loss.gaps
    bad = merges["bad"]
    assert bad.loss.gaps["average"] == paired.difference(
        losses["bad"], losses["good"], resamples=200, seed=3
    )
    assert bad.measures["sums"].mcnemar["average"] == paired.mcnemar(
        correct["bad"], correct["good"]
    )
    # one family: both measures, all rivals, McNemar's p where single models are compared
    tests = [
        (measure, rival)
        for merge in merges.values()
        for measure in merge.measures.values()
        for rival in measure.gaps
    ]
    p_values = [(measure.mcnemar.get(rival) or measure.gaps[rival]).p for measure, rival in tests]
    assert len(p_values) == 10
    assert [measure.holm[rival] for measure, rival in tests] == paired.holm(p_values)
    sentences = findings.sentences(run)
    worse = [
        text
        for text in sentences
        if text.startswith("bad,") and "clearly worse" in text and "than the average" in text
    ]
    assert len(worse) == 2
    assert any("10 comparisons" in text for text in sentences)


def test_one_of_many_that_looks_good_by_chance_is_not_called_better():
    rng = np.random.default_rng(0)
    losses = {name: rng.normal(2, 1, 60) for name in ("m0", "m1", *(f"x{i}" for i in range(20)))}
    models = [make_model(name, "member" if name[0] == "m" else "merge") for name in losses]
    run = make_run(models, {name: make_items(row) for name, row in losses.items()}, resamples=50)
    p_values = [merge.loss.gaps["mean_member"].p for merge in run.comparison.merges.values()]
    assert min(p_values) < 0.05
    sentences = [text for text in findings.sentences(run) if text[0] == "x"]
    assert len(sentences) == 20
    assert all("not distinguishable" in text for text in sentences)


def merge_file(*names):
    return {
        "merges": [
            {"name": name, "method": "selection", "seed": int(name[-1]), "parameters": {}}
            for name in names
        ]
    }


def test_merges_of_several_seeds_are_one_comparison_of_their_mean(planted):
    models, items, losses, correct = planted
    rng = np.random.default_rng(1)
    drawn = {f"drawn-seed{seed}": losses["m0"] + rng.normal(0, 0.05, 80) for seed in (0, 1, 2)}
    answers = {name: rng.random(80) < 0.5 for name in drawn}
    for name, values in drawn.items():
        tasks = {"sums": {"accuracy": answers[name].mean(), "se": 0.05, "n": 80}}
        models.append(make_model(name, "merge", loss=values.mean(), tasks=tasks))
        items[name] = make_items(values, answers[name])
    run = make_run(models, items, seed=3, merge=merge_file(*drawn))
    merges = run.comparison.merges
    assert list(merges) == ["good", "bad", "drawn"]
    assert merges["drawn"].names == list(drawn)
    for task, by_seed, rival in (
        (None, drawn, losses["m1"]),
        ("sums", answers, correct["m1"].astype(float)),
    ):
        values = np.array(list(by_seed.values()), float)
        of_mean = paired.difference(values.mean(axis=0), rival, resamples=100, seed=3)
        gap = merges["drawn"].measures[task].gaps["best_member"]
        assert gap == paired.over_seeds(of_mean, (values - rival).mean(axis=1))
        assert gap.se > of_mean.se
    # one test per method, not one per seed
    tests = [
        (measure, rival)
        for merge in merges.values()
        for measure in merge.measures.values()
        for rival in measure.gaps
    ]
    corrected = paired.holm([measure.p(rival) for measure, rival in tests])
    assert len(tests) == 3 * 2 * 2
    assert [measure.holm[rival] for measure, rival in tests] == corrected
    assert merges["drawn"].measures["sums"].mcnemar == {}
    sentences = [
        text
        for text in findings.sentences(make_run(models, items, seed=3, merge=merge_file(*drawn)))
        if text.startswith("drawn")
    ]
    sd = np.std([values.mean() for values in drawn.values()], ddof=1)
    assert f"(mean of 3 merge seeds, sd {sd:.4f})" in sentences[0]
    assert "McNemar" not in sentences[1]


def test_only_merges_that_differ_in_nothing_but_the_seed_are_a_group():
    merge = merge_file("a-seed0", "a-seed1", "b-seed0", "c-seed3")
    merge["merges"][1]["parameters"] = {"resample": 1}
    names = [row["name"] for row in merge["merges"]]
    ungrouped = {name: [name] for name in names}
    assert (
        differences.seed_groups(names, merge) == differences.seed_groups(names, None) == ungrouped
    )
    stem_in_use = {
        "merges": [*merge_file("a-seed0", "a-seed1")["merges"], {"name": "a", "method": "average"}]
    }
    assert differences.seed_groups(["a-seed0", "a-seed1", "a"], stem_in_use) == {
        "a-seed0, a-seed1": ["a-seed0", "a-seed1"],
        "a": ["a"],
    }


def test_losses_are_compared_over_tokens_where_their_numbers_are_stored(planted):
    models, items, losses, _ = planted
    tokens = list(range(1, 81))
    comparison = differences.compare(
        models,
        {name: row | {"tokens": tokens} for name, row in items.items()},
        resamples=50,
        seed=0,
    )
    expected = np.average(losses["bad"] - losses["m1"], weights=tokens)
    gap = comparison.merges["bad"].loss.gaps["best_member"]
    assert gap.estimate == pytest.approx(expected)


def test_better_is_less_loss_and_more_correct_answers(planted):
    models, items, _, _ = planted
    sentences = findings.sentences(make_run(models, items, resamples=200))
    for name, verdict in (("good", "clearly better"), ("bad", "clearly worse")):
        for measure in ("held-out", "sums"):
            (text,) = [text for text in sentences if text.startswith(f"{name}, {measure}")]
            assert text.count(verdict) == 2
    assert any("8 comparisons" in text for text in sentences)


def test_without_validation_the_choice_is_called_optimistic(planted):
    models, items, _, _ = planted
    run = make_run([row | {"validation_loss": None} for row in models], items)
    assert run.comparison.best == differences.BestMember("m0", "test")
    assert any("chosen on test: optimistic" in text for text in findings.sentences(run))


def test_noise_is_not_distinguishable():
    rng = np.random.default_rng(4)
    losses = {name: rng.normal(2, 1, 60) for name in ("m0", "m1", "x")}
    models = [make_model("m0", "member"), make_model("m1", "member"), make_model("x", "merge")]
    items = {name: make_items(row) for name, row in losses.items()}
    sentences = findings.sentences(make_run(models, items, resamples=200))
    text = next(text for text in sentences if text.startswith("x,"))
    assert text.count("not distinguishable") == 2
    # beside each stands what this comparison could have found
    gaps = make_run(models, items, resamples=200).comparison.merges["x"].loss.gaps.values()
    for gap in gaps:
        smallest = equivalence.detectable(gap.se, 59)
        assert f"detectable from {smallest:.4f}) from" in text


def test_a_mean_that_five_items_decide_is_said_to_be_one(planted):
    models, items, losses, _ = planted
    few = losses["m1"] + 0.001
    few[:5] -= 4.0
    models.append(make_model("few", "merge", loss=few.mean()))
    items["few"] = make_items(few)
    sentences = findings.sentences(make_run(models, items))
    (text,) = [text for text in sentences if text.startswith("few, held-out")]
    assert "Caution: five items make up" in text
    words = "% of the variance of the difference from the best member by loss (median +0.0010, "
    assert words + "Wilcoxon p" in text


@pytest.mark.parametrize(
    ("estimate", "p", "words"),
    [
        (-0.04, 1e-9, "seen early end with the higher loss, clearly"),
        (0.03, 0.03, "seen late end with the higher loss, weakly"),
        (0.03, 0.2, "no effect on the final loss is distinguishable from zero"),
    ],
)
def test_position_sentences(estimate, p, words):
    row = {"epochs": [1], "estimate": estimate, "se": 0.01, "z": estimate / 0.01, "p": p}
    # of Student's t with few batches, wider than 1.96 errors: what the tables show
    low, high = row["low"], row["high"] = estimate - 0.0276, estimate + 0.0276
    analysis = {
        "fixed_effects": {"coefficients": [row]},
        "members": [{"sd_loss": 0.4}],
        "pooled": {"early_late": []},
        "merged": {},
    }
    first, scale = findings.sentences(make_run(analysis=analysis))
    assert words in first
    assert f"[{low:+.4f}, {high:+.4f}] nats per token" in first
    assert f"{100 * abs(estimate) / 0.4:.1f} %" in scale


def test_position_verdicts_are_corrected_over_the_epochs():
    row = {"se": 0.01, "z": 2.0, "low": 0.01, "high": 0.05, "estimate": 0.03}
    rows = [row | {"epochs": [epoch], "p": p} for epoch, p in ((1, 0.03), (2, 0.008))]
    analysis = {
        "fixed_effects": {"coefficients": rows},
        "members": [{"sd_loss": 0.4}],
        "pooled": {"early_late": []},
        "merged": {},
    }
    first, second, _ = findings.sentences(make_run(analysis=analysis))
    # by hand: the smaller p counts twice, as in the first sentence of the page
    assert "the higher loss, weakly (" in first
    assert "p = 0.03)" in first
    assert "the higher loss, weakly (" in second
    assert "p = 0.008, by Holm = 0.016)" in second


@pytest.mark.parametrize(
    ("excess", "words"),
    [
        (
            0.0001,
            "ties not distinguishable from it, detectable from 0.0028 (-0.0001 [-0.0021, +0.0019]",
        ),
        (-0.004, "ties clearly smaller (+0.0040 [+0.0020, +0.0060]"),
        (0.004, "ties clearly larger (-0.0040 [-0.0060, -0.0020]"),
    ],
)
def test_a_closed_gap_is_tested_against_what_averaging_alone_leaves(excess, words):
    gap = {"estimate": 0.02, "se": 0.001, "low": 0.018, "high": 0.022}
    expected = {key: value / 16 for key, value in gap.items()}
    row = {
        "merged": gap | {"estimate": 0.00125 + excess},
        "excess": {"estimate": excess, "se": 0.001, "low": excess - 0.002, "high": excess + 0.002},
    }
    analysis = {
        "design": {"samples": 400},
        "fixed_effects": {"reason": "because"},
        "members": [{"sd_loss": 0.4}] * 4,
        "pooled": {"early_late": [gap | {"share_left": 1 / 16, "expected": expected}]},
        "merged": {"ties": {"early_late": [row]}},
    }
    reason, text, test = findings.sentences(make_run(analysis=analysis))
    assert reason == "No fixed-effects estimate of the position effect: because."
    # late less early, as slopes are; the file has the opposite sign
    assert f"ties {-0.00125 - excess:+.4f} [-0.0220, -0.0180]" in text
    # of balanced orders a sixteenth, where a quarter was expected of any four orders
    assert "keeps 6.2 % of it: -0.0013 is expected" in text
    assert words in test
    analysis["pooled"]["early_late"][0]["low"] = -0.01
    assert "no gap between early and late" in findings.sentences(make_run(analysis=analysis))[1]


def test_without_members_nothing_is_compared():
    comparison = differences.compare([make_model("base", "base")], {}, resamples=10, seed=0)
    assert comparison == differences.Comparison(None, {})


@pytest.mark.parametrize(("zeros", "idle"), [([0.31, 0.4], False), ([0.0, 0.004], True)])
def test_task_vectors(zeros, idle):
    total = {"cosines": [[1, 0.8], [0.8, 1]], "unchanged": zeros}
    rows = [
        {"name": "first", "method": "average", "diagnostics": {}},
        {"name": "second", "method": "average", "diagnostics": {"total": total}},
    ]
    (text,) = findings.sentences(make_run(merge={"merges": rows, "dtype": "bfloat16"}))
    assert "mean cosine of 0.800" in text
    assert f"{100 * zeros[0]:.1f} to {100 * zeros[1]:.1f} %" in text
    assert ("nothing to draw again" in text) is idle
