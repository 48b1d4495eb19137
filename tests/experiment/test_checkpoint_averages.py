"""Runs whose merges are of averages of each member's last checkpoints."""

import dataclasses
import re
import types

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jax_ordermerge import tree
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.config import load_config
from jax_ordermerge.config.merge import Search
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import models, pipeline, search
from jax_ordermerge.experiment.context import open_run
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.layout import RunLayout, read_json
from jax_ordermerge.search.candidates import Candidate
from jax_ordermerge.train import members
from tests.commands.test_cli import call
from tests.experiment import tiny

LAST3 = {"last": 3, "weights": "wsm"}
METHODS = [
    {"method": "average"},
    {"method": "average", "checkpoints": {"last": 2}},
    {"method": "ties", "checkpoints": LAST3},
    # one member alone
    {"method": "average", "weights": [0, 1], "name": "alone", "checkpoints": {"last": 2}},
]


def config(folder, **sections):
    tiny.make_base(folder / "base")
    merge = {"methods": METHODS, "dtype": "float32"} | sections.pop("merge", {})
    training = {"checkpoint_every": 4, "keep_checkpoints": 1} | sections.pop("training", {})
    return tiny.make_config(folder, merge=merge, training=training, **sections)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = config(tmp_path_factory.mktemp("run"), population={"members": 2, "wave": 1})
    return pipeline.run(load_config(path), through="merge", log=lambda text: None)


def flat(params):
    return {name: np.asarray(leaf) for name, leaf in tree.flatten(params).items()}


def stored(run, step):
    """The two members at a step, float32, each from the checkpoints of its wave."""
    ctx = open_run(read_config(run), lambda text: None)
    parts = [
        flat(
            members.restore_members(
                ctx.training, ctx.model, ctx.mesh, RunLayout(run).wave(wave), step=step
            )
        )
        for wave in range(2)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def exported(run, name):
    ctx = open_run(read_config(run), lambda text: None)
    return flat(convert.load_params(run / "merged" / name, ctx.mesh, dtype="float32")[1])


def test_checkpoints_that_are_merged_are_kept(run):
    # ten steps; of the latest checkpoints one is kept
    assert orbax.steps(RunLayout(run).wave(0).checkpoints) == [4, 8, 10]


def test_merges_are_of_averages_of_checkpoints(run):
    before, last = (stored(run, step) for step in (8, 10))
    merged, alone, plain = (exported(run, x) for x in ("average-last2", "alone", "average"))
    for name in last:
        mean = (before[name].astype(np.float64) + last[name]) / 2
        assert np.allclose(merged[name], mean.mean(axis=0), rtol=0, atol=1e-6), name
        assert np.allclose(alone[name], mean[1], rtol=0, atol=1e-6), name
        assert np.allclose(plain[name], last[name].mean(axis=0), rtol=0, atol=1e-6), name
        assert np.abs(merged[name] - plain[name]).max() > 1e-5, name


def test_the_record_says_which_checkpoints(run):
    rows = {row["name"]: row for row in read_json(RunLayout(run).merges)["merges"]}
    assert "checkpoints" not in rows["average"]
    assert rows["average-last2"]["checkpoints"] == {"steps": [8, 10], "weights": [0.5, 0.5]}
    recipe = yaml.safe_load((run / "merged" / "ties-last3-wsm" / "merge_config.yaml").read_text())
    assert recipe["checkpoints"]["steps"] == [4, 8, 10]
    assert recipe["checkpoints"]["weights"] == pytest.approx([0.5774, 0.2391, 0.1835], abs=1e-4)


def test_a_search_has_them_as_candidates(run):
    ctx = open_run(read_config(run), lambda text: None)
    population = models.load_population(ctx)
    candidate = Candidate("average", checkpoints={"last": 2, "weights": "equal"})
    assert candidate.name == "average checkpoints=2/equal"
    for built, name in ((candidate, "average-last2"), (Candidate("average"), "average")):
        with population.build_temporarily(built) as params:
            leaves = flat(params)
        for path, leaf in exported(run, name).items():
            assert np.array_equal(leaf, leaves[path]), (name, path)


def test_a_choice_names_what_it_was_made_of(run, monkeypatch):
    """Its diagnostics are measured against that, and not against the last weights."""
    ctx = open_run(read_config(run), lambda text: None)
    ctx.splits.pop("test", None)
    population = models.load_population(ctx)
    winner = Candidate("average", checkpoints={"last": 2, "weights": "equal"})
    result = types.SimpleNamespace(winning_candidate=winner, to_dict=dict)
    monkeypatch.setattr(search.search, "run_search", lambda *args, **options: result)
    monkeypatch.setattr(search.search_findings, "sentences", lambda written: [])
    monkeypatch.setattr(search.search_measures, "make_measures", lambda ctx: ({}, {}))
    monkeypatch.setattr(search, "write_json", lambda path, content: None)
    chosen = search.choose_merge(ctx, Search(), RunLayout(run).search, population)
    mean = (stored(run, 8)["norm/weight"] + stored(run, 10)["norm/weight"]) / 2
    ingredients = flat(chosen.ingredients.members)["norm/weight"]
    assert np.allclose(ingredients, mean, rtol=0, atol=1e-6)


def test_what_was_not_kept_is_named_and_not_asked_for_ever_after(run):
    """A refused merge is no part of the run: the next call does not go on with it."""
    before = (run / "config.yaml").read_bytes(), (run / "stages.json").read_bytes()
    method = "{method: average, name: more, checkpoints: {last: 4}}"
    changed = read_config(run, [f"merge.methods=[{method}]", "training.checkpoint_every=2"])
    with pytest.raises(UserError, match=r"step 6 in .* was not kept \(there are 4, 8, 10\)"):
        pipeline.run(changed, through="merge", log=lambda text: None)
    assert before == ((run / "config.yaml").read_bytes(), (run / "stages.json").read_bytes())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"checkpoint_every": 1000}}, r"checkpoints.last = 3: .* has 1 checkpoints"),
        (
            {"merge": {"methods": [{"method": "fisher", "checkpoints": LAST3}]}},
            "fisher measures the information of the last weights",
        ),
        (
            {"training": {"checkpoint": "best"}, "data": {"validation_examples": 8}},
            "training.checkpoint = best keeps one checkpoint of each member",
        ),
        (
            {"merge": {"methods": [{"method": "average", "checkpoints": {"last": 1}}]}},
            "last",
        ),
    ],
)
def test_refused_before_anything_is_trained(tmp_path, sections, message):
    with pytest.raises(UserError, match=message):
        pipeline.run(load_config(config(tmp_path, **sections)), log=lambda text: None)
    assert not (tmp_path / "run").exists()


def test_a_search_chooses_among_them(tmp_path):
    entry = {"method": "average", "checkpoints": {"last": 2}, "scale": [0.9, 1.0]}
    auto = {"methods": [entry], "lambdas": {"low": 0.9, "high": 1.1, "steps": 2}, "smallest": 8}
    path = config(tmp_path, merge={"methods": [], "auto": auto}, data={"validation_examples": 8})
    run = pipeline.run(load_config(path), through="merge", log=lambda text: None)
    names = [row["name"] for row in read_json(RunLayout(run).search.results)["candidates"]]
    assert "average checkpoints=2/equal" in names
    assert "average checkpoints=2/equal lambda=0.9" in names
    assert orbax.steps(RunLayout(run).checkpoints) == [8, 10]


@pytest.mark.slow
def test_of_adapters_and_in_every_population(tmp_path):
    """Averages of models with adapters, also of a population whose merges are not exported."""
    methods = [{"method": "average", "checkpoints": {"last": 2}}]
    path = config(
        tmp_path,
        population={"members": 2, "replicates": 2},
        merge={"methods": methods},
        lora={"rank": 2, "alpha": 4},
        evaluation={"tasks": []},
    )
    run = pipeline.run(load_config(path), log=lambda text: None)
    ctx = open_run(read_config(run), lambda text: None)
    at = [
        flat(members.restore_members(ctx.training, ctx.model, ctx.mesh, RunLayout(run), step=step))
        for step in (8, 10)
    ]
    for number in range(2):
        ctx = dataclasses.replace(ctx, population=number)
        merged = flat(next(models.load_models(ctx, ["average-last2"]))[1])
        mine = slice(2 * number, 2 * number + 2)
        for name, leaf in merged.items():
            expected = np.mean([part[name][mine].astype(np.float64) for part in at], axis=(0, 1))
            assert np.allclose(leaf, expected, rtol=0, atol=1e-6), name
        rows = {row["name"] for row in read_json(ctx.layout.evaluations)["models"]}
        assert "average-last2" in rows


def test_a_space_beside_the_config_is_refused_before_the_training(tmp_path):
    """The training keeps what its config names, and a file of candidates is no part of it."""
    space = Search(methods=({"method": "average", "checkpoints": {"last": 2}},), smallest=8)
    path = config(tmp_path, merge={"methods": []}, data={"validation_examples": 8})
    with pytest.raises(UserError, match=r"checkpoints\.last = 2: the training would not keep them"):
        pipeline.search(load_config(path), space, log=lambda text: None)
    assert not list(tmp_path.glob("run/**/checkpoints"))


def test_a_recipe_of_checkpoints_by_name_is_the_merge_of_the_run(run, tmp_path, capsys):
    names = [f"{run}/member_{member}@{step}" for member in range(2) for step in (8, 10)]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in names],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert call("merge", tmp_path / "recipe.yml", tmp_path / "merged") == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(run / "merged" / "average-last2" / "model.safetensors")
    for name, values in expected.items():
        assert np.allclose(merged[name], values, rtol=0, atol=1e-6), name
    # without a word on where the run lies on this machine
    listed = (tmp_path / "merged" / "merge_config.yaml").read_text()
    assert f"{run.name}/member_1@8" in listed
    assert str(run.parent) not in listed
    assert call("diff", f"{run}/member_0@10", f"{run}/member_0") == 0
    assert call("diff", f"{run}/member_0@8", f"{run}/member_0") == 1
    assert call("convert", f"{run}/member_0@8", tmp_path / "early") == 0
    assert (
        "This is member 0 at step 8 of its training" in (tmp_path / "early/README.md").read_text()
    )
    early = load_file(tmp_path / "early" / "model.safetensors")
    assert np.array_equal(early["model.norm.weight"], stored(run, 8)["norm/weight"][0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("member_1@6", "step 6 in .* was not kept .there are 4, 8, 10."),
        ("member_2@8", "the run has the members 0, 1"),
        ("member_1@last", "members such as .*/member_0, or .*/member_0@200"),
    ],
)
def test_a_checkpoint_that_is_not_there(run, capsys, name, message):
    assert call("inspect", f"{run}/{name}") == 2
    error = capsys.readouterr().err
    assert re.search(message, error.replace("\n", " ")), error
