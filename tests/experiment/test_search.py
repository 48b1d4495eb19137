"""Controls and search of a run: what is written, memory, resuming, refusals."""

import dataclasses
import json
import pathlib
import shutil
import weakref

import jax
import numpy as np
import pytest
import yaml

from jax_ordermerge import tree
from jax_ordermerge.config import load_config, make_config, read_search
from jax_ordermerge.config.merge import Search
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import controls, losses, models, pipeline, preflight
from jax_ordermerge.experiment.context import open_run
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.experiment.splits import find_overlaps
from jax_ordermerge.merge import blocks
from jax_ordermerge.report.run import read_run
from jax_ordermerge.search.candidates import Candidate, Population
from tests.experiment.run_directory import interrupted

METHODS = [
    {"method": "task_arithmetic", "parameters": {"scale": {"low": 0.5, "high": 2.0, "steps": 4}}},
    {"method": "selection", "parameters": {"resample": "exhaustive"}, "scale": [1.0, 1.3]},
    {"method": "average", "scale": [1.2], "groups": {"mlp": [0.8, 1.2]}},
]


def configured(folder, output, *changes):
    raw = yaml.safe_load((folder / "tiny.yaml").read_text())
    raw["data"]["validation_examples"] = 10
    raw["merge"] |= {
        "auto": {"methods": METHODS, "smallest": 4},
        "controls": ["lambda_line", "lambda_members", "lambda_matched", "children", "ensemble"],
    }
    raw["evaluation"] = {"batch": 8, "bootstrap": 50}
    file = output.parent / "auto.yaml"
    file.write_text(yaml.safe_dump(raw))
    return load_config(file, [f"output={output}", *changes])


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return pipeline.run(
        configured(folder, tmp_path_factory.mktemp("auto") / "run"), log=lambda line: None
    )


def results(directory):
    return json.loads((directory / "results.json").read_text())


def test_the_winner_is_never_worse_on_validation_than_the_best_member(run):
    summary = results(run / "search")
    rows = {row["name"]: row for row in summary["candidates"]}
    winner = summary["candidates"][summary["winner"]]
    # the space, base, members and average, and the last three at 15 lambdas: of the average one is
    # among the 4 of the space
    assert summary["tried"] >= 4 + 4 + 2 + 2 + 15 * 3 - 3
    assert winner["examples"] == summary["examples"] == 10
    assert winner["loss"] == min(row["loss"] for row in rows.values() if row["examples"] == 10)
    assert winner["loss"] <= min(rows["member_0"]["loss"], rows["member_1"]["loss"])
    evaluated = {
        row["name"]: row for row in json.loads((run / "evaluations.json").read_text())["models"]
    }
    # what was exported, read from its files and measured by another stage, is what was chosen
    assert evaluated["auto"]["validation_loss"] == pytest.approx(winner["loss"], abs=1e-6)
    assert evaluated["auto"]["loss"] == pytest.approx(summary["claim"]["loss"]["winner"], abs=1e-6)
    card = (run / "merged" / "auto" / "README.md").read_text()
    assert (
        f"The search chose {winner['name']} among {summary['tried']} candidates on 10 validation"
        in card
    )
    assert "test examples, which had no part in the" in card
    assert winner["name"] in (run / "report.md").read_text()


def test_a_control_is_what_is_measured_from_the_exported_files(run):
    summary = json.loads((run / "controls.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    for name in ("base", "member_0", "member_1", "average"):
        stored = json.loads((run / "evaluations" / f"{name}.json").read_text())["summary"]
        assert rows[name]["loss"] == pytest.approx(stored["loss"], abs=1e-6), name
        assert rows[name]["validation_loss"] == pytest.approx(
            stored["validation_loss"], abs=1e-6
        ), name
    assert {row["group"] for row in summary["rows"]} == {
        "anchor",
        "lambda_line",
        "lambda_members",
        "lambda_matched",
        "children",
        "logit ensemble of the members",
    }
    assert "mean_member" in rows["average, lambda 1.2"]["against"]
    with np.load(run / "losses" / "controls.npz") as saved:
        assert saved["losses"].shape == (len(summary["rows"]), 20)
        mean = (saved["losses"] * saved["tokens"]).sum(1) / saved["tokens"].sum()
    np.testing.assert_allclose(mean, [row["loss"] for row in summary["rows"]], rtol=1e-6)


def test_the_best_member_at_its_own_lambda_is_a_rival_of_every_merge(run):
    summary = json.loads((run / "controls.json").read_text())
    members = [row for row in summary["rows"] if row["candidate"] and row["line"] != "average"]
    members = [row for row in members if row["kind"] in ("member", "scaled member")]
    assert len(members) == 2 * 8
    best = min(members, key=lambda row: row["validation_loss"])
    assert summary["lambdas"]["best_member"]["control"] == best["name"]
    page = read_run(run)
    (rival,) = (row for row in summary["rows"] if row["name"] == best["name"])
    gap = page.comparison.merges["average"].loss.gaps["scaled_member"]
    average = json.loads((run / "evaluations" / "average.json").read_text())["summary"]
    assert gap.estimate == pytest.approx(average["loss"] - rival["loss"], abs=1e-6)
    text = (run / "report.md").read_text()
    assert "than the best member at its own lambda" in text or (
        "from the best member at its own lambda" in text
    )


def test_what_the_evaluation_measured_is_not_measured_again(run, tmp_path, monkeypatch):
    """The average of equal weights counts, under any name, and its control has the same bits."""
    ctx = open_run(read_config(run), lambda line: None)
    population = models.load_population(ctx)
    average = json.loads((run / "evaluations" / "average.json").read_text())
    measured = losses.example_losses(
        ctx, population.build(Candidate("average")), ctx.splits["test"]
    )
    assert measured.means.tolist() == average["losses"]
    rows = json.loads((run / "controls.json").read_text())["rows"]
    assert {row["name"]: row["loss"] for row in rows}["average"] == average["summary"]["loss"]

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "controls.json").unlink()
    renamed = ctx.config.merge.methods[0].model_copy(update={"name": "mean"})
    merge = ctx.config.merge.model_copy(update={"methods": (renamed,)})
    config = ctx.config.model_copy(update={"output": str(tmp_path / "run"), "merge": merge})
    names = {"base": "base", "member_0": "member_0", "member_1": "member_1", "mean": "average"}
    evaluated = {
        name: json.loads((run / "evaluations" / f"{file}.json").read_text())
        for name, file in names.items()
    }
    built = []
    build = Population.build
    monkeypatch.setattr(
        Population,
        "build",
        lambda self, candidate: built.append(candidate) or build(self, candidate),
    )
    controls.measure_controls(dataclasses.replace(ctx, config=config), evaluated)
    assert built
    assert not [candidate for candidate in built if candidate.name in ("average", *names)]


def test_token_counts_need_no_model(run):
    ctx = open_run(read_config(run), lambda line: None)
    base = models.base_params(ctx, "float32")
    for examples in ctx.splits.values():
        measured = losses.example_losses(ctx, base, examples).counts
        assert measured.dtype == examples.loss_counts.dtype
        np.testing.assert_array_equal(measured, examples.loss_counts)


def test_a_search_measures_the_base_once(run, tmp_path, monkeypatch):
    """Once on each subset, for its own losses and not for token counts."""
    config, bases, measured = read_config(run), [], []
    load, original = models.load_population, losses.example_losses

    def load_population(ctx):
        population = load(ctx)
        bases.append(population.base)
        return population

    def example_losses(ctx, params, examples, **options):
        if params is bases[0]:
            measured.append(examples.digest)
        return original(ctx, params, examples, **options)

    monkeypatch.setattr(models, "load_population", load_population)
    monkeypatch.setattr(losses, "example_losses", example_losses)
    space = read_search(None, config.merge.auto, {})
    pipeline.search(config, space, out=tmp_path, export=False, log=lambda line: None)
    assert len(measured) == len(set(measured)) > 0


def test_a_search_continues_and_ends_with_the_same_results(run, folder, tmp_path):
    config = read_config(run)
    space = read_search(None, config.merge.auto, {})
    uninterrupted = results(run / "search")
    with interrupted(losses, "example_losses", 14):
        pipeline.search(config, space, out=tmp_path / "out", log=lambda line: None)
    with (tmp_path / "out" / "journal.jsonl").open("a") as journal:
        journal.write('{"candidate": {"meth')  # as a killed process leaves it
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"journal.jsonl"}
    page = pipeline.search(config, space, out=tmp_path / "out", log=lambda line: None)
    again = results(tmp_path / "out")
    assert again.pop("cache_hits") > uninterrupted.pop("cache_hits") == 0
    assert again.pop("seconds") != uninterrupted.pop("seconds")
    assert again == uninterrupted
    name = "model.safetensors"
    assert (tmp_path / "out" / "winner" / name).read_bytes() == (
        run / "merged" / "auto" / name
    ).read_bytes()
    assert page.is_file()
    with pytest.raises(UserError, match=r"journal.jsonl is of another search \(space differ\)"):
        pipeline.search(
            config,
            read_search(None, config.merge.auto, {"budget": 99}),
            out=tmp_path / "out",
            log=lambda line: None,
        )


def test_two_models_more_than_the_members_are_in_memory_and_nothing_is_written(
    run, tmp_path, monkeypatch
):
    # a small population lies in memory twice, as leaves and as runs of elements
    monkeypatch.setattr(blocks, "LARGEST", 0)
    config = read_config(run)
    original, seen, written = losses.example_losses, [], []

    def watched(ctx, params, examples, **kwargs):
        model = sum(leaf.nbytes for leaf in tree.flatten(params).values())
        seen.append(sum(x.nbytes for x in jax.live_arrays()) / model)
        written.append({path.name for path in (tmp_path / "out").rglob("*")})
        return original(ctx, params, examples, **kwargs)

    monkeypatch.setattr(losses, "example_losses", watched)
    before = sum(x.nbytes for x in jax.live_arrays())
    pipeline.search(
        config,
        read_search(None, config.merge.auto, {}),
        out=tmp_path / "out",
        log=lambda line: None,
    )
    model = sum(
        leaf.nbytes
        for leaf in tree.flatten(models.base_params(open_run(config, print), "bfloat16")).values()
    )
    # base and candidate beside two members; a twentieth of a model for batches and what jax keeps
    assert max(seen) <= 2 + 2 + before / model + 0.05
    assert all(names <= {"journal.jsonl"} for names in written)


def test_examples_of_two_splits_are_refused(run):
    config = read_config(run)
    ctx = open_run(config, lambda line: None)
    splits, space = ctx.splits, read_search(None, None, {})
    few = splits["validation"].take(np.arange(2))

    def check(splits):
        preflight.check_search(
            config, ctx.model, ctx.tokenizer, splits, find_overlaps(splits), space
        )

    for validation, message in (
        ({"validation": splits["train"]}, r"\d+ of \d+ validation examples are train examples too"),
        ({"validation": splits["test"]}, r"are test examples too \(the first: row "),
        ({"validation": few}, "2 validation examples are too few"),
    ):
        with pytest.raises(UserError, match=message):
            check(splits | validation)
    with pytest.raises(
        UserError, match=r"chosen on validation examples: set data\.validation_examples"
    ):
        check({"train": splits["train"]})


def test_a_wrong_space_is_refused_before_anything_is_trained(folder, tmp_path):
    config = configured(folder, tmp_path / "run", "merge.auto.methods=[{method: tis}]")
    with pytest.raises(UserError, match="unknown merge method 'tis'"):
        pipeline.run(config, log=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_results_go_to_a_disk(run):
    with pytest.raises(
        UserError,
        match=r"^--out s3:.*: a search appends to a file line by line; give a directory on a disk$",
    ):
        pipeline.search(
            read_config(run),
            Search(),
            out=pathlib.Path("s3://bucket/search"),
            log=lambda line: None,
        )


@pytest.mark.slow
def test_a_run_without_validation_chooses_on_a_file_of_its_own(run, folder, tmp_path):
    rows = [
        {"prompt": f"{a} plus {b} is .", "completion": f"{a} {b} ?"} for a in "abc" for b in "defgh"
    ]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(run, tmp_path / "run")
    config = read_config(tmp_path / "run")
    page = pipeline.search(
        config,
        read_search(None, config.merge.auto, {}),
        out=tmp_path / "out",
        validation=file,
        export=False,
        log=lambda line: None,
    )
    assert results(page.parent)["examples"] == 15
    assert not (tmp_path / "out" / "winner").exists()
    assert page.is_file()


@pytest.mark.parametrize(
    ("groups", "replicates", "wave", "expected"),
    [(1, 3, 2, 2), (1, 1, 2, None), (2, 1, 2, None), (2, 3, 4, 4), (1, 2, 2, None)],
)
def test_single_runs_are_trained_no_more_at_once_than_members(groups, replicates, wave, expected):
    population = {"members": 4, "replicates": replicates, "wave": wave}
    config = make_config({"population": population, "mesh": {"order": groups}})
    single = controls._single_config(config, groups).population
    assert (single.members, single.replicates, single.wave) == (groups, replicates, expected)


@pytest.mark.slow
def test_the_single_run_costs_as_much_as_the_population(folder, tmp_path, monkeypatch):
    loaded, alive = [], []
    load, train = models.load_population, controls.train_single

    def load_population(*args):
        population = load(*args)
        loaded.append(weakref.ref(jax.tree.leaves(population.members)[0]))
        return population

    def train_single(*args):
        alive.extend(array for array in loaded if array() is not None)
        return train(*args)

    monkeypatch.setattr(models, "load_population", load_population)
    monkeypatch.setattr(controls, "train_single", train_single)
    settings = "merge.auto=null", "merge.controls=[ensemble, single]"
    config = configured(folder, tmp_path / "run", *settings)
    directory = pipeline.run(config, log=lambda line: None)
    # the members are not in memory beside the training of another model
    assert loaded
    assert not alive
    rows = {
        row["name"]: row for row in json.loads((directory / "controls.json").read_text())["rows"]
    }
    assert "one run of 2 times the epochs" in rows
    population_tokens, single_tokens = (
        json.loads((d / "metrics" / "state.json").read_text())["tokens"]
        for d in (directory, directory / "single")
    )
    assert population_tokens == single_tokens
