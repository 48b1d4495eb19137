"""Hypotheses: planted effects are found by scipy's tests, gates close, and deviations are named."""

import csv
import dataclasses
import io
import pathlib

import numpy as np
import pytest
import yaml
from scipy import stats

from jax_ordermerge.analysis.result import Missing
from jax_ordermerge.config import load_config, to_dict
from jax_ordermerge.config.hypotheses import Hypotheses, Plan, read_hypotheses
from jax_ordermerge.config.section import parse
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.report import document, hypotheses
from jax_ordermerge.report.run import Run

AVERAGE = {"model": "average", "rival": "mean_member"}
PLAN = {
    "title": "A plan",
    "settings": {"population.members": 2, "training.epochs": 3},
    "runs": {"a": {"population.level": "sample"}, "b": {}, "c": {}},
    "hypotheses": [
        {
            "name": "H1",
            "claim": "early is worse",
            "runs": ["a", "b", "c"],
            "decide": "mean",
            "parts": [{"slope": 1, "test": "less"}],
        },
        {
            "name": "H2",
            "claim": "the average is better",
            "runs": ["a", "b", "c"],
            "decide": "mean",
            "parts": [AVERAGE | {"test": "less", "at": "own"}],
            "told": [AVERAGE | {"test": "two-sided"}],
        },
        {
            "name": "H3",
            "claim": "a is like b",
            "runs": [["a", "b"]],
            "decide": "each",
            "parts": [AVERAGE | {"test": "equivalent", "margin": "half"}],
        },
        {
            "name": "H4",
            "claim": "selection",
            "runs": ["a"],
            "decide": "mean",
            "parts": [
                {"model": "drawn", "rival": "single", "test": "two-sided", "margin": 0.5},
                {"model": "drawn", "rival": "best_member", "measure": "sums", "test": "two-sided"},
            ],
        },
        {
            "name": "H5",
            "claim": "shown only",
            "runs": ["a"],
            "decide": "told",
            "told": [{"model": "average", "at": "own", "test": "two-sided"}],
        },
    ],
}


def population(folder, rng, *, slope, gain):
    """Return results of one population of members 0 and 1; the average is better by `gain`."""
    members = rng.normal(2, 0.01, 2)
    losses = dict(zip(("member_0", "member_1"), members, strict=True))
    losses |= {"average": members.mean() - gain, "drawn-seed0": 1.9, "drawn-seed1": 1.8}
    tasks = {"member_0": 0.3, "member_1": 0.3, "average": 0.3, "drawn-seed0": 0.5}
    models = [
        {
            "name": name,
            "kind": "member" if name.startswith("member") else "merge",
            "loss": float(loss),
            "validation_loss": float(loss),
            "tasks": {"sums": {"accuracy": tasks.get(name, 0.7) + rng.normal(0, 0.01)}},
        }
        for name, loss in losses.items()
    ]
    rows = [{"name": name, "loss": float(loss)} for name, loss in losses.items()]
    # each line has a second point, which is better by 0.1 on validation and on test
    rows += [{"name": f"{name}, lambda 1.1", "loss": float(x) - 0.1} for name, x in losses.items()]
    rows.append({"name": "one run of 2 times the epochs", "loss": float(1.5 + rng.normal(0, 0.01))})
    own = {name: {"lambda": 1.1, "control": f"{name}, lambda 1.1"} for name in losses}
    return Run(
        layout=RunLayout(folder),
        config={"population": {"members": 2}},
        analysis={"fixed_effects": {"coefficients": [{"epochs": [1], "estimate": slope}]}},
        evaluations={"models": models},
        merge={
            "merges": [{"name": "average", "method": "average", "seed": 0}]
            + [{"name": f"drawn-seed{x}", "method": "selection", "seed": x} for x in (0, 1)]
        },
        controls={
            "rows": rows,
            "lambdas": {"own": own, "best_member": {"line": "member_0"}},
        },
    )


def make(folder, name, slopes, gains, seed=0):
    rng = np.random.default_rng(seed)
    first, *rest = (
        population(folder, rng, slope=slope, gain=gain)
        for slope, gain in zip(slopes, gains, strict=True)
    )
    config = {
        "name": name,
        "population": {"members": 2, "level": "sample"},
        "training": {"epochs": 3},
    }
    return dataclasses.replace(first, config=config, populations=rest)


SLOPES = {"a": [-0.2, -0.1, -0.15], "b": [-0.3, -0.1, -0.2], "c": [-0.1, -0.05, -0.2]}
GAINS = {"a": [0.03, 0.05, 0.04], "b": [0.04, 0.05, 0.06], "c": [0.02, 0.01, 0.05]}


@pytest.fixture
def runs(tmp_path):
    return [
        make(tmp_path, name, SLOPES[name], GAINS[name], seed)
        for seed, name in enumerate(sorted(SLOPES))
    ]


def plan(**changes):
    return parse(Hypotheses, PLAN | changes, "plan")


def test_estimates_and_p_values_are_those_of_scipy(runs):
    first, second, third, fourth, _ = hypotheses.evaluate(plan(), runs)
    for name, slopes in SLOPES.items():
        test = first.parts[0].runs[name]
        expected = stats.ttest_1samp(slopes, 0, alternative="less")
        assert test.p == pytest.approx(expected.pvalue)
        assert test.size.estimate == pytest.approx(np.mean(slopes))
    # equal weights and Hartung and Knapp's error: the t-test over the runs
    means = [np.mean(slopes) for slopes in SLOPES.values()]
    expected = stats.ttest_1samp(means, 0, alternative="less")
    assert first.parts[0].mean.p == pytest.approx(expected.pvalue)
    assert first.outcome == second.outcome == "supported"
    for name, gains in GAINS.items():
        for part in (second.parts[0], second.secondary[0]):
            assert part.runs[name].populations == pytest.approx([-gain for gain in gains])
    pair = third.parts[0].runs["a less b"]
    expected = stats.ttest_ind([-x for x in GAINS["a"]], [-x for x in GAINS["b"]], equal_var=False)
    assert pair.p == pytest.approx(expected.pvalue)
    assert (pair.size.low, pair.size.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert pair.margin == pytest.approx(np.mean(GAINS["b"]) / 2)
    assert np.mean(pair.populations) == pytest.approx(pair.size.estimate)
    # two one-sided tests at the margin, written out
    beyond = stats.t.sf((pair.size.estimate + pair.margin) / pair.size.se, expected.df)
    above = stats.t.cdf((pair.size.estimate - pair.margin) / pair.size.se, expected.df)
    assert pair.p_equivalent == pytest.approx(max(beyond, above))
    loss, task = (part.runs["a"] for part in fourth.parts)
    singles = [r["loss"] for run in [runs[0], *runs[0].populations] for r in run.controls["rows"]]
    assert loss.populations == pytest.approx([1.85 - x for x in singles if 1.4 < x < 1.6])
    assert task.size.estimate == pytest.approx(0.6 - 0.3, abs=0.03)


def test_after_the_first_that_fails_nothing_is_tested(runs):
    outcomes = [(x.outcome, x.blocked_by) for x in hypotheses.evaluate(plan(), runs)]
    assert outcomes == [
        ("supported", None),
        ("supported", None),
        ("not determined", None),
        ("supported", "H3"),
        (None, "H3"),
    ]


@pytest.mark.parametrize(
    ("part", "slopes", "verdict"),
    [
        ({"test": "less"}, [0.2, 0.1, 0.15], "contradicted"),
        ({"test": "greater"}, [0.2, 0.1, 0.15], "supported"),
        ({"test": "less"}, [-0.2, 0.3, 0.0], "not determined"),
        ({"test": "two-sided"}, [-0.2, 0.3, 0.0], "not determined"),
        ({"test": "two-sided"}, [0.2, 0.1, 0.15], "supported (higher)"),
        ({"test": "two-sided"}, [-0.2, -0.1, -0.15], "supported (lower)"),
        ({"test": "two-sided", "margin": 2.0}, [0.2, 0.1, 0.15], "supported (higher, equivalent)"),
        ({"test": "two-sided", "margin": 2.0}, [-0.2, 0.3, 0.0], "supported (equivalent)"),
        ({"test": "equivalent", "margin": 2.0}, [-0.2, 0.3, 0.0], "supported (equivalent)"),
        ({"test": "equivalent", "margin": 0.01}, [0.2, 0.21, 0.22], "contradicted"),
        ({"test": "equivalent", "margin": 0.01}, [-0.2, 0.3, 0.0], "not determined"),
        ({"test": "less"}, [0.1, np.nan, 0.15], "not determined"),
        ({"test": "less", "slope": 2}, [0.1, 0.1, 0.15], "not determined"),  # its fit failed
    ],
)
def test_outcomes_of_one_run(tmp_path, part, slopes, verdict):
    hypothesis = PLAN["hypotheses"][0] | {"runs": ["a"], "parts": [{"slope": 1} | part]}
    small = plan(runs={"a": {}}, hypotheses=[hypothesis])
    run = make(tmp_path, "a", slopes, [0.1] * 3)
    [result] = hypotheses.evaluate(small, [run])
    outcome, _, finding = verdict.partition(" (")
    assert result.outcome == outcome
    test = result.parts[0].runs["a"]
    assert isinstance(test, Missing) or test.verdict == verdict
    # what was found stands beside the outcome, also on top of the page
    page = document.render_markdown(
        "R", hypotheses.build(Plan(small, "", "p"), [result], [run], "forest"), pictures="."
    )
    label = "slope by position, epoch 1, a"
    row = f"| H1 | early is worse | {outcome}"
    assert f"{row} ({label}: {finding} |" in page if finding else row in page


def test_the_page_names_digest_outcomes_and_deviations(runs):
    raw = plan(settings={"population.members": 4})
    blocks = hypotheses.build(
        Plan(raw, "abc123", "plan.yaml"), hypotheses.evaluate(raw, runs), runs, "forest"
    )
    page = document.render_markdown("Results", blocks, pictures=".")
    assert "plan.yaml (SHA-256 abc123)" in page
    assert "| H1 | early is worse | supported |" in page
    assert "not tested, since H3 failed; by itself supported" in page
    assert "Deviation: a has population.members = 2, written down was 4." in page
    assert "Deviation: b has no results" not in page
    [picture] = document.pictures_of(blocks)
    assert "H2 · loss: average less mean_member, each at its own lambda" in picture.svg
    agreed = document.render_markdown(
        "R", hypotheses.build(Plan(plan(), "", "p"), [], runs, "forest"), pictures="."
    )
    assert "All runs have the settings that were written down" in agreed


def test_a_population_without_results_is_named(runs):
    lost = dataclasses.replace(runs[0].populations[1], evaluations=None)
    runs[0] = dataclasses.replace(runs[0], populations=[runs[0].populations[0], lost])
    tested = hypotheses.evaluate(plan(), runs)
    assert tested[1].outcome == "not determined"
    assert "population 2: no lambda line of mean_member" in tested[1].parts[0].runs["a"].reason
    blocks = hypotheses.build(Plan(plan(), "", "p"), tested, runs, "forest")
    page = document.render_markdown("R", blocks, pictures=".")
    assert "Deviation: a has no results of population 2." in page


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"model": "avrage"}, r"H1: model = avrage: no run has it \(did you mean 'average'\?\)"),
        ({"model": "average", "rival": "singel"}, r"rival = singel: .*mean 'single'"),
        ({"model": "average", "measure": "sum"}, r"measure = sum: .*mean 'sums'"),
        ({"slope": 4}, "H1: slope = 4; the runs have 3 epochs"),
    ],
)
def test_names_that_no_run_has_are_refused(runs, part, message):
    hypothesis = PLAN["hypotheses"][0] | {"parts": [part | {"test": "less"}]}
    with pytest.raises(UserError, match=message):
        hypotheses.evaluate(plan(hypotheses=[hypothesis]), runs)


def test_every_estimate_is_in_the_csv(runs):
    rows = list(csv.DictReader(io.StringIO(hypotheses.to_csv(hypotheses.evaluate(plan(), runs)))))
    slopes = [row for row in rows if row["hypothesis"] == "H1"]
    assert len(slopes) == 3 * (3 + 1) + 1
    found = [float(x["estimate"]) for x in slopes if (x["run"], x["population"]) == ("b", "1")]
    assert found == [SLOPES["b"][1]]
    over = [row for row in rows if row["run"] == "all runs"]
    assert [row["decides"] for row in over if row["hypothesis"] == "H2"] == ["yes", "no"]


def test_runs_that_the_hypotheses_do_not_name_are_refused(runs):
    with pytest.raises(UserError, match="about the runs a, b, c; given a, b; give these runs"):
        hypotheses.evaluate(plan(), runs[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": [{"slope": 1, "model": "average", "test": "less"}]}, "either slope or model"),
        ({"parts": [{"slope": 1, "test": "less", "margin": 1}]}, "expected two-sided or equiv"),
        ({"parts": [{"slope": 1, "test": "equivalent"}]}, "expected a margin"),
        ({"parts": [{"slope": 1, "test": "two-sided", "margin": "half"}]}, "expected pairs"),
        ({"parts": [{"slope": 1, "test": "two-sided", "margin": -1}]}, "margin"),
        ({"parts": [{"model": "a", "measure": "sums", "at": "own", "test": "less"}]}, "loss alone"),
        ({"parts": []}, "expected parts to decide by"),
        ({"decide": "told"}, "expected parts to decide by"),
        ({"runs": ["a", ["a", "b"]]}, "and not both"),
        ({"runs": ["d"]}, "d: expected names among runs"),
        ({"part": []}, "unknown key hypotheses.0.part"),
    ],
)
def test_a_file_that_says_something_else_is_one_line(tmp_path, change, message):
    file = tmp_path / "plan.yaml"
    raw = PLAN | {"hypotheses": [PLAN["hypotheses"][0] | change]}
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=message) as caught:
        read_hypotheses(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "file", sorted((CONFIGS / "hypotheses").glob("*.yaml")), ids=lambda x: x.stem
)
def test_published_hypotheses_are_about_published_configs(file):
    written = read_hypotheses(file).hypotheses
    configs = [to_dict(load_config(path)) for path in (CONFIGS / file.stem).glob("*.yaml")]
    by_name = {config["name"]: config for config in configs}
    for name in written.runs:
        config = by_name[name]
        assert not hypotheses.other_settings(written, Run(RunLayout(CONFIGS), config))
