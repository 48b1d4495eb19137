"""What a search minimizes, what its guard refuses, and winners that are members at another lambda."""

import json
import shutil
import types

import numpy as np
import pytest
import yaml

from jax_ordermerge import tree
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.config import load_config, read_search
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import harness
from jax_ordermerge.experiment import models, pipeline, search_measures
from jax_ordermerge.experiment.context import open_run
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.search.candidates import Candidate
from jax_ordermerge.search.measures import Measure

TASK = "evaluation.tasks=[{name: swap, max_new_tokens: 4}]"
SPACE = {
    "methods": [{"method": "ties", "parameters": {"density": 0.5}, "scale": [0.9, 1.3]}],
    "lambdas": {"low": 0.8, "high": 1.2, "steps": 3},
    "smallest": 4,
}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A trained run without merges."""
    output = tmp_path_factory.mktemp("measures") / "run"
    raw = yaml.safe_load((folder / "tiny.yaml").read_text())
    raw["data"]["validation_examples"] = 10
    raw["merge"] = {"methods": [], "controls": "none"}
    raw["evaluation"] = {"batch": 8, "bootstrap": 50}
    file = output.parent / "measures.yaml"
    file.write_text(yaml.safe_dump(raw))
    return pipeline.run(
        load_config(file, [f"output={output}"]), through="train", log=lambda line: None
    )


def search(run, out, *overrides, log=lambda line: None, export=False, **changes):
    space = read_search(None, None, SPACE | changes)
    pipeline.search(read_config(run, overrides), space, out=out, export=export, log=log)
    return json.loads((out / "results.json").read_text())


def planted(monkeypatch, run, candidate):
    """Make the loss of a model its distance from a candidate."""
    ctx = open_run(read_config(run), lambda line: None)
    target = tree.flatten(models.load_population(ctx).build(candidate))

    def sums(params, examples):
        distance = sum(
            np.abs(np.asarray(leaf, np.float64) - np.asarray(target[path], np.float64)).sum()
            for path, leaf in tree.flatten(params).items()
        )
        return np.full(len(examples), distance)

    monkeypatch.setattr(
        search_measures, "_loss", lambda ctx: Measure(sums, lambda x: np.ones(len(x)))
    )
    return target


def test_the_members_compete_at_every_lambda_and_the_winner_can_be_shipped(
    run, tmp_path, monkeypatch
):
    target = planted(monkeypatch, run, Candidate("member", {"number": 1}, scale=1.2))
    summary = search(run, tmp_path / "out", export=True)
    winner = summary["candidates"][summary["winner"]]
    assert winner["name"] == "member_1 lambda=1.2"
    assert winner["kind"] == "scaled member"
    assert winner["loss"] == 0
    assert summary["winner"] == summary["scaled_member"] != summary["best_member"]
    assert summary["edges"] == ["lambda = 1.2"]
    assert not summary["claim"]["merging_helps"]
    reader = Reader(tmp_path / "out" / "winner")
    norm = np.asarray(target["norm/weight"], np.float32)
    assert np.array_equal(np.asarray(reader.read("model.norm.weight"), np.float32), norm)
    card = (tmp_path / "out" / "winner" / "README.md").read_text()
    assert "It is one member with a longer or shorter task vector, no merge" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["merge_method"] == "member"
    assert recipe["parameters"] == {"number": 1}
    assert recipe["scale"] == 1.2


def test_a_leader_that_makes_a_task_worse_is_not_shipped(run, tmp_path, monkeypatch):
    """As of a quickstart that was trained briefly: a lower loss, and fewer right answers."""
    lines = []
    target = planted(monkeypatch, run, Candidate("task_arithmetic", {"scale": 1.2}))

    def wrong_answers(ctx, task, params, examples):
        leaf = tree.flatten(params)["norm/weight"]
        is_leader = np.array_equal(leaf, target["norm/weight"])
        return np.ones(len(examples)) if is_leader else np.zeros(len(examples))

    with monkeypatch.context() as patch:
        patch.setattr(search_measures, "_wrong_answers", wrong_answers)
        summary = search(run, tmp_path / "out", TASK, log=lines.append)
        assert summary["winner"] == summary["best_member"]
        assert summary["guard"]["worse"] == ["swap"]
        leader = summary["candidates"][summary["guard"]["leader"]]
        assert leader["name"] == "task_arithmetic scale=1.2"
        assert summary["guard"]["measures"]["swap"] == {
            "candidate": 1.0, "best_member": 0.0, "margin": 0.01,
        }  # fmt: skip
        assert any(
            "it is worse than that member on validation: swap 0.0 % right against 100.0 %" in line
            for line in lines
        )
        # what may be lost is stated, and can be allowed
        allowed = search(run, tmp_path / "allowed", TASK, task_margin=1.0)
        assert allowed["winner"] == allowed["guard"]["leader"] != allowed["best_member"]


def test_a_task_is_minimized_on_the_validation_examples(run, tmp_path, monkeypatch):
    asked = []
    original = harness.run

    def watched(task, model, data, *, test, seed):
        asked.append((data.test, test.digest, task.limit, len(test)))
        return original(task, model, data, test=test, seed=seed)

    # of the search alone: the check of the reported task asks the same module
    monkeypatch.setattr(search_measures, "harness", types.SimpleNamespace(run=watched))
    limited = "evaluation.tasks=[{name: swap, max_new_tokens: 4, limit: 3}]"
    summary = search(run, tmp_path / "out", limited, measure="swap")
    ctx = open_run(read_config(run), lambda line: None)
    member = models.load_population(ctx).build(Candidate("member", {"number": 0}))
    model = models.make_eval_model(
        ctx.config, ctx.model, member, ctx.tokenizer, ctx.mesh, name="member_0"
    )
    task = read_config(run, [TASK]).evaluation.tasks[0]
    expected = original(task, model, ctx.config.data, test=ctx.splits["validation"], seed=0)
    rows = {row["name"]: row for row in summary["candidates"]}
    assert rows["member_0"]["loss"] == pytest.approx(1 - expected.summary["accuracy"])
    # nothing is asked of the file of the test split, and a limit of reported items is none here
    assert {(data, limit) for data, _, limit, _ in asked} == {(None, None)}
    test = ctx.splits["test"].digest
    assert {digest for _, digest, _, _ in asked[:-4]}.isdisjoint({test})
    assert set(summary["guard"]["measures"]) <= {"loss", "swap"}


def test_several_measures_are_measured_together_and_continue(run, tmp_path):
    first = search(run, tmp_path / "out", TASK, measure=["loss", "swap"])
    again = search(run, tmp_path / "out", TASK, measure=["loss", "swap"])
    for summary in (first, again):
        del summary["seconds"], summary["cache_hits"]
    assert again == first
    plain = [row["loss"] for row in first["candidates"] if row["kind"] == "member"]
    # relative to the mean member, so that theirs have mean 1
    assert np.mean(plain) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("tasks", "measure", "message"),
    [
        (
            "[]",
            "swap",
            r"measure swap of a search \(known: loss\): expected loss or a task of eval",
        ),
        (
            "[{name: swap, max_new_tokens: 4}]",
            "swp",
            r"measure swp of a search \(did you mean 'swap'\?\)",
        ),
        (
            "[{name: swap, max_new_tokens: 4, data: TEST}]",
            "swap",
            "measure swap of a search: it has data of its own, on which the run reports it",
        ),
        (
            "[{name: swap, max_new_tokens: 4, prompt: '{{prompt}}', response: '{{completion}}'}]",
            "swap",
            "it reads the rows of data.test",
        ),
        ("[{name: loss, max_new_tokens: 4}]", "loss", "task loss.*another name"),
    ],
)
def test_a_measure_that_validation_examples_cannot_be_asked_is_refused(
    run, folder, tmp_path, tasks, measure, message
):
    tasks = tasks.replace("TEST", str(folder / "test.jsonl"))
    with pytest.raises(UserError, match=message):
        search(run, tmp_path / "out", f"evaluation.tasks={tasks}", measure=measure)
    assert not (tmp_path / "out").exists()


def test_a_task_that_guards_nothing_is_named(run, folder, tmp_path):
    lines = []
    own = f"evaluation.tasks=[{{name: own, max_new_tokens: 4, data: {folder / 'test.jsonl'}}}]"
    summary = search(run, tmp_path / "out", own, log=lines.append)
    reason = "it has data of its own, on which the run reports it"
    assert summary["guard"]["unmeasured"] == {"own": reason}
    assert f"  own guards nothing: {reason}" in lines


def test_results_of_another_version_are_neither_continued_nor_shown(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    out = copy / "search"
    search(copy, out)
    summary = json.loads((out / "results.json").read_text())
    del summary["version"]
    (out / "results.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"of a search of version 1, which this one \(2\) does not"):
        search(copy, out)
    with pytest.raises(UserError, match="of a search of version 1"):
        pipeline.run(read_config(copy, ["merge.auto={}"]), through="merge", log=lambda line: None)
    # another directory is free
    assert search(copy, tmp_path / "other")["version"] == 2
