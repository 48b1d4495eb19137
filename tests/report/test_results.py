"""Runs with planted effects become a page that names the effects, and shows no paths."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from scipy import stats

from jax_ordermerge.analysis import imbalance, paired
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.config import make_config, to_dict
from jax_ordermerge.errors import UserError
from jax_ordermerge.report import document, results
from jax_ordermerge.report.run import read_runs

SEEDS = ["drawn-seed0", "drawn-seed1", "drawn-seed2"]


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False))


def make(folder, name, *, average, seed=0):
    """Write a run of four members in which early samples end worse by 0.2.

    Of its merges the average is better by `average`, drawn worse by 0.1, plain like a member.
    """
    directory = folder / name
    directory.mkdir()
    methods = [
        {"method": "average"},
        {"method": "selection", "name": "drawn", "seeds": [0, 1, 2]},
        {"method": "ties", "name": "plain"},
    ]
    config = make_config(
        {
            "name": name,
            "model": {"base": str(folder / "models" / "small")},
            "data": {"train": str(folder / "secret" / "rows.json")},
            "evaluation": {"bootstrap": 200},
            "merge": {"methods": methods},
        }
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    dump(
        directory / "data.json",
        {
            "train": {
                "source": str(folder / "secret" / "rows.json"),
                "examples": 150,
                "counts": {"read": 170, "dropped_too_long": 20},
            }
        },
    )
    dump(directory / "metrics" / "state.json", {"parameters": 1234, "seconds": 5.0})
    rng = np.random.default_rng(seed)
    places = np.stack([[rng.permutation(150) / 149 for _ in range(2)] for _ in range(4)])
    losses = rng.normal(2, 0.4, 150) - 0.2 * places[:, 0] + rng.normal(0, 0.02, (4, 150))
    merged = {
        model: losses.mean(axis=0) + rng.normal(0, 0.01, 150)
        for model in ("average", *SEEDS, "plain")
    }
    dump(
        directory / "analysis.json",
        asdict(imbalance.analyze(losses, places, merged, bootstrap=50, permutations=9)),
    )
    difficulty, models = rng.normal(2, 0.5, 200), []
    shifts = (
        {"base": 3.0}
        | {f"member_{m}": 0.0 for m in range(4)}
        | {"average": -average}
        | dict.fromkeys(SEEDS, 0.1)
        | {"plain": 0.0}
    )
    for model, shift in shifts.items():
        model_losses = (
            difficulty
            + shift
            + rng.normal(0, 0.02, 200)
            + (0.01 * rng.normal() if model in SEEDS else 0)
        )
        dump(
            directory / "evaluations" / f"{model}.json",
            {"losses": model_losses.tolist(), "ids": list(range(200)), "tasks": {}},
        )
        kind = "base" if model == "base" else "member" if model.startswith("member") else "merge"
        # the member that is chosen on validation is not the best one on test
        chosen = {"member_2": 1.0, "plain": 0.5}.get(model, 2.0)
        models.append(
            {
                "name": model,
                "kind": kind,
                "loss": model_losses.mean(),
                "loss_se": 0.03,
                "validation_loss": chosen,
                "tasks": {},
            }
        )
    dump(directory / "evaluations.json", {"models": models, "split": "test"})
    total = {"cosines": [[1.0, 0.9], [0.9, 1.0]], "unchanged": [0.1, 0.1]}
    rows = [
        {
            "name": model,
            "method": "selection" if model in SEEDS else model,
            "seed": int(model[-1]) if model in SEEDS else 0,
            "diagnostics": {"total": total},
        }
        for model in ("average", *SEEDS, "plain")
    ]
    dump(directory / "merge.json", {"dtype": "bfloat16", "merges": rows})
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    runs = [make(folder, "first", average=0.05), make(folder, "second", average=-0.05, seed=1)]
    return folder, results.write(runs, folder / "docs" / "results.md").read_text().replace(
        "\\", ""
    )  # escapes of marks


def cells(text, name):
    rows = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [row[1:] for row in rows if row[0] == name]


def test_runs_are_the_units_of_the_means_over_them(page):
    folder, text = page
    for merge, names in (("average", ["average"]), ("drawn", SEEDS), ("plain", ["plain"])):
        gaps = []
        for run in ("first", "second"):
            losses = {
                path.stem: np.mean(json.loads(path.read_text())["losses"])
                for path in (folder / run / "evaluations").glob("*.json")
            }
            members = np.mean([losses[f"member_{m}"] for m in range(4)])
            gaps.append(np.mean([losses[name] for name in names]) - members)
        # of equal weight: the t-test over runs
        test = stats.ttest_1samp(gaps, 0)
        low, high = test.confidence_interval(0.95)
        row = cells(text, f"loss: {merge} less the mean member")[0]
        assert row[0] == f"{np.mean(gaps):+.4f}"
        assert row[1] == f"[{low:+.4f}, {high:+.4f}]"
        assert row[2] == f"{test.pvalue:.2g}"
        assert row[-1] == f"{gaps[0]:+.4f}, {gaps[1]:+.4f}"
    assert "- average: not distinguishable (" in text
    # planted: +0.05 and -0.05, with errors of 0.002
    assert float(cells(text, "loss: average less the mean member")[0][4]) > 95
    assert "over 2 runs, which differ (I²" in text


def test_what_is_shown_and_what_is_not(page):
    _, text = page
    assert "- Not shown: any difference of plain to the mean member." in text
    assert "Position in epoch 1: samples seen early end with the higher loss in 2 of 2 runs" in text
    assert "Not shown: correct answers." in text


def test_runs_of_several_populations_are_no_single_set_of_orders(page):
    folder, _ = page
    first, second = read_runs([folder / "first", folder / "second"])
    several = replace(first, populations=[second])
    text = document.render_markdown("Results", results.build([several, second]), pictures=".")
    assert "Each of second is one set of orders" in text
    assert "4 orders in each of 2 populations of level sample" in text
    text = document.render_markdown("Results", results.build([several]), pictures=".")
    assert "one set of orders" not in text


def test_the_best_are_chosen_on_validation_and_reported_on_test(page):
    folder, text = page
    losses = {
        model: np.mean(
            json.loads((folder / "first" / "evaluations" / f"{model}.json").read_text())["losses"]
        )
        for model in ("member_2", "plain")
    }
    row = cells(text, "first")[0]
    assert row[2] == f"{losses['member_2']:.4f} (member_2, by validation)"
    assert row[3] == f"{losses['plain']:.4f} (plain, by validation)"
    assert "(best by loss on validation)" in text


def test_no_merge_is_chosen_by_the_test_examples(page):
    folder, _ = page
    (run,) = read_runs([folder / "first"])
    for model in run.models:
        model["validation_loss"] = None
    text = document.render_markdown("Results", results.build([run]), pictures=".")
    row = cells(text, "first")[0]
    assert row[3] == "not chosen: no validation losses"
    assert "drawn" not in " ".join(row)


def test_seeds_are_summed_up_and_tested_once_with_holm_over_the_methods(page):
    folder, text = page
    seeds = [
        json.loads((folder / "first" / "evaluations" / f"{model}.json").read_text())["losses"]
        for model in SEEDS
    ]
    assert (
        f"{np.mean(seeds):.4f} ({np.std(np.mean(seeds, axis=1), ddof=1):.4f})"
        in cells(text, "mean drawn (sd between merge seeds)")[0]
    )
    members = [
        json.loads((folder / "first" / "evaluations" / f"member_{m}.json").read_text())["losses"]
        for m in range(4)
    ]
    gap = paired.difference(np.mean(seeds, axis=0), np.mean(members, axis=0), resamples=200, seed=0)
    gap = paired.over_seeds(gap, np.mean(seeds, axis=1) - np.mean(members))
    assert f"| {gap.estimate:+.4f} | [{gap.low:+.4f}, {gap.high:+.4f}] |" in text
    raw = []
    for model in ("average", "plain"):
        rows = json.loads((folder / "first" / "evaluations" / f"{model}.json").read_text())[
            "losses"
        ]
        raw.append(paired.difference(rows, np.mean(members, axis=0), resamples=200, seed=0).p)
    corrected = paired.holm([raw[0], gap.p, raw[1]])[2]
    (row,) = [row for row in cells(text, "plain") if row[:2] == ["loss", "the mean member"]][:1]
    assert row[5] == f"{corrected:.2g}"


def test_position_effects_stand_before_and_after_merging(page):
    folder, text = page
    analysis = json.loads((folder / "first" / "analysis.json").read_text())
    slope = analysis["fixed_effects"]["coefficients"][0]
    # behind the gaps of both epochs, each with a column for its interval
    interval = f"[{slope['low']:+.4f}, {slope['high']:+.4f}]"
    assert cells(text, "members")[0][4:6] == [f"{slope['estimate']:+.4f}", interval]
    left = [analysis["merged"][model]["early_late"][0]["merged"]["estimate"] for model in SEEDS]
    # late less early, as slopes are; the file has the opposite sign
    assert any(row[0] == f"{-np.mean(left):+.4f}" for row in cells(text, "drawn"))


def test_no_path_of_the_machine_is_on_the_page(page):
    folder, text = page
    assert str(folder) not in text
    assert "secret" not in text
    assert (
        "small (1,234 parameters) on rows.json: 150 train examples (20 of 170 read for training "
        "were above 512 tokens)" in text
    )
    assert "batch 32, adamw, learning rate 2e-05 (cosine), seed 0" in text


def test_what_cannot_be_put_on_a_page_is_refused(tmp_path):
    run = make(tmp_path, "one", average=0.0)
    with pytest.raises(UserError, match=r"expected a file that ends in \.md"):
        results.write([run], tmp_path / "page")
    with pytest.raises(UserError, match="two of the runs have the same name"):
        results.write([run, run], tmp_path / "page.md")
    (run / "analysis.json").unlink()
    with pytest.raises(UserError, match="the run one was not analyzed and evaluated"):
        results.write([run], tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_a_page_begins_with_the_hypotheses(tmp_path):
    runs = [make(tmp_path, name, average=0.05, seed=seed) for seed, name in enumerate("ab")]
    plan = tmp_path / "plan.yaml"
    part = {"model": "average", "rival": "mean_member", "test": "less"}
    hypothesis = {"name": "H1", "claim": "better", "runs": ["a", "b"], "decide": "mean"}
    plan.write_text(
        yaml.safe_dump(
            {
                "title": "Two runs",
                "runs": {"a": {}, "b": {}},
                "hypotheses": [hypothesis | {"parts": [part]}],
            }
        )
    )
    page = results.write(runs, tmp_path / "out" / "page.md", plan)
    text = page.read_text()
    assert text.index("Two runs") < text.index("All runs")
    # one population has no spread over populations
    assert "| H1 | better | not determined |" in text
    assert "1 population: the spread between populations is not known" in text
    assert hashlib.sha256(plan.read_bytes()).hexdigest() in text
    assert str(tmp_path) not in text
    assert (page.parent / "page_hypotheses.svg").read_text().startswith("<svg")
    assert (page.parent / "page_hypotheses.csv").read_text().startswith("hypothesis,quantity,run")
    with pytest.raises(UserError, match="about the runs a, b; given a"):
        results.write(runs[:1], tmp_path / "out" / "one.md", plan)
    assert not (tmp_path / "out" / "one.md").exists()
