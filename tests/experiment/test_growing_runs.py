"""A finished run is asked for more: what is there stays, and the rest is as if asked at the start."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml

from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import harness
from jax_ordermerge.experiment import losses, pipeline
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.merge.sources import references
from jax_ordermerge.report import run_report
from jax_ordermerge.train import loop
from tests.experiment import tiny
from tests.experiment.run_directory import digests, interrupted

AVERAGE, SELECTION = "{method: average}", "{method: selection, seed: 3}"
TIES = "{method: ties, parameters: {density: 0.5}}"
SWAP = "{name: swap, max_new_tokens: 4}"
FIRST = "{name: first, max_new_tokens: 2, limit: 9}"
MORE = [
    f"merge.methods=[{AVERAGE}, {SELECTION}, {TIES}]",
    f"evaluation.tasks=[{SWAP}, {FIRST}]",
    "analysis.bins=4",
    "merge.controls=[lambda_line, seeds, subset_scores, ensemble]",
]


def ignore(line):
    """Take the place of the log."""


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    """A finished run of one merge, one task and one group of controls."""
    directory = tmp_path_factory.mktemp("small") / "run"
    few = [
        f"merge.methods=[{AVERAGE}]",
        f"evaluation.tasks=[{SWAP}]",
        "merge.controls=[lambda_line]",
    ]
    return pipeline.run(
        load_config(folder / "tiny.yaml", [f"output={directory}", *few]), log=ignore
    )


@pytest.fixture(scope="module")
def large(folder, tmp_path_factory):
    """A run that was asked for everything at its start."""
    directory = tmp_path_factory.mktemp("large") / "run"
    return pipeline.run(
        load_config(folder / "tiny.yaml", [f"output={directory}", *MORE]), log=ignore
    )


@pytest.fixture
def run(small, tmp_path):
    """A copy of the small run; it cannot be trained any more."""
    shutil.copytree(small, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", lambda *args, **kwargs: pytest.fail("it is trained again"))
        yield tmp_path / "run"


def assert_same_results(run, other):
    names = ["analysis.json", "merge.json", "evaluations.json", "controls.json"]
    names += [str(path.relative_to(other)) for path in (other / "evaluations").rglob("*.json")]
    names += [
        str(path.relative_to(other)) for path in (other / "merged").glob("*/model.safetensors")
    ]
    for name in names:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("final", "controls"):
        with (
            np.load(run / "losses" / f"{name}.npz") as ours,
            np.load(other / "losses" / f"{name}.npz") as theirs,
        ):
            assert set(ours.files) == set(theirs.files)
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours.files)


def test_a_grown_run_is_the_run_that_was_asked_for_all_at_its_start(run, large, monkeypatch):
    before, tasks, original = digests(run), [], harness.run

    def count(task, *args, **kwargs):
        tasks.append(task.name)
        return original(task, *args, **kwargs)

    monkeypatch.setattr(harness, "run", count)
    pipeline.run(read_config(run, MORE), log=ignore)
    assert_same_results(run, large)
    # its data are checked first; base, two members and the average answer the new task alone, two
    # merges and the selection among the controls answer both
    assert sorted(tasks) == ["first"] * 8 + ["swap"] * 3
    scores = json.loads((run / "controls.json").read_text())["subset_scores"]
    summaries = json.loads((run / "evaluations.json").read_text())["models"]
    accuracy = {model["name"]: model["tasks"]["swap"]["accuracy"] for model in summaries}
    ((one, both), (_, drawn)) = (scores["swap"][x]["points"] for x in ("average", "selection"))
    assert one["loss"] == np.mean([accuracy["member_0"], accuracy["member_1"]])
    assert both["loss"] == accuracy["average"]
    # the seed and the parameters are those of the first selection of the config
    assert drawn["loss"] == accuracy["selection-seed3"]
    after = digests(run)
    rewritten = {name for name in before if before[name] != after[name]}
    assert not [name for name in rewritten if name.startswith(("checkpoints", "orders", "merged"))]
    assert not rewritten & {"metrics/train.jsonl", "metrics/state.json", "losses/train.npz"}
    report = (run / "report.md").read_text()
    assert "selection-seed3" in report
    assert "first, %" in report
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["analysis"]["bins"] == 4
    names = [spec["method"] for spec in stored["merge"]["methods"]]
    assert names == ["average", "selection", "ties"]
    messages = []
    pipeline.run(read_config(run), log=messages.append)
    assert messages == [f"everything is done: {run / 'report.html'}"]
    assert digests(run) == after


@pytest.mark.parametrize("stage", ["merge", "analyze", "evaluate"])
def test_growth_that_is_interrupted_goes_on(run, large, stage):
    module, name, after = {
        "merge": (convert, "export", 2),
        "analyze": (losses, "sequence_losses", 2),
        "evaluate": (harness, "run", 4),
    }[stage]
    with interrupted(module, name, after):
        pipeline.run(read_config(run, MORE), log=ignore)
    # by its directory alone: what was asked for is in its config
    pipeline.run(read_config(run), log=ignore)
    assert_same_results(run, large)


def test_results_that_a_later_config_does_not_list_are_kept(run, folder):
    changes = [f"output={run}", "merge.methods=[{method: ties}]", "evaluation.tasks=[]"]
    messages = []
    pipeline.run(load_config(folder / "tiny.yaml", changes), log=messages.append)
    assert messages[0] == (
        "the run keeps what this config does not list: merge.methods.average,"
        " merge.controls.lambda_line, evaluation.tasks.swap"
    )
    models = json.loads((run / "evaluations.json").read_text())["models"]
    assert [model["name"] for model in models] == [
        "base",
        "member_0",
        "member_1",
        "average",
        "ties",
    ]
    assert all(list(model["tasks"]) == ["swap"] for model in models)
    assert set(json.loads((run / "analysis.json").read_text())["merged"]) == {"average", "ties"}
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert [spec["method"] for spec in stored["merge"]["methods"]] == ["average", "ties"]
    assert [task["name"] for task in stored["evaluation"]["tasks"]] == ["swap"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "training.learning_rate=0.5",
            "made with another config (training.learning_rate: 0.003 ->",
        ),
        ("merge.dtype=float32", "made with another config (merge.dtype: bfloat16 -> float32)"),
        (
            "merge.methods=[{method: ties, name: average}]",
            "under the same names (merge.methods.average.method: average -> ties;",
        ),
        (
            "evaluation.tasks=[{name: swap, max_new_tokens: 5}]",
            "(evaluation.tasks.swap.max_new_tokens: 4 -> 5); give the new ones names of their own",
        ),
    ],
)
def test_what_results_rest_on_cannot_change(run, change, message):
    before = digests(run)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        pipeline.run(read_config(run, [change]), log=ignore)
    assert "\n" not in str(error.value)
    if "another config" in message:
        # a run itself takes no other output: what the line says to do is what is accepted
        assert f"give a config file, such as {run}/config.yaml, with --set output=" in str(
            error.value
        )
        other = read_config(run / "config.yaml", [change, f"output={run}-other"])
        assert other.directory == run.with_name(f"{run.name}-other")
    assert digests(run) == before


def test_a_task_that_cannot_be_evaluated_is_refused_before_the_merges(run, tmp_path):
    (tmp_path / "pages.jsonl").write_text('{"page": "a"}\n')
    pages = f"{{name: pages, kind: perplexity, data: {tmp_path / 'pages.jsonl'}}}"
    changes = [MORE[0], f"evaluation.tasks=[{SWAP}, {pages}]"]
    before = digests(run)
    with pytest.raises(UserError, match=r"task pages: template .* 'text' is undefined"):
        pipeline.run(read_config(run, changes), log=ignore)
    assert digests(run) == before


def test_settings_for_a_later_stage_are_kept_for_it(run):
    pipeline.run(read_config(run, ["analysis.bins=3"]), through="train", log=ignore)
    bins = json.loads((run / "analysis.json").read_text())["design"]["bins"]
    assert bins == 10
    with pytest.raises(
        UserError, match=r"analysis.bins: 10 -> 3\); restore it, or let ordermerge run"
    ):
        run_report.write(run)
    pipeline.run(read_config(run), log=ignore)
    assert json.loads((run / "analysis.json").read_text())["design"]["bins"] == 3


def test_a_report_does_not_take_settings_that_it_cannot_follow(run):
    with pytest.raises(UserError, match=r"asked for something else \(analysis.bins: 10 -> 3\)"):
        pipeline.write_report(read_config(run, ["analysis.bins=3"]))
    pipeline.write_report(read_config(run, ["mesh.order=2"]))


@pytest.mark.parametrize("where", ["config.yaml", "config.yaml without stages.json"])
def test_an_edited_config_is_refused(run, where):
    edit(run, "learning_rate: 0.003", "learning_rate: 0.5")
    message = (
        "was changed after the run had read it (training.learning_rate: 0.003 -> 0.5); restore it"
    )
    if "without" in where:
        # the checkpoints say it as well
        (run / "stages.json").unlink()
        shutil.rmtree(run / "merged")
        message = "of another training (training.learning_rate: 0.003 -> 0.5); restore the config"
    with pytest.raises(UserError, match=re.escape(message)):
        pipeline.run(read_config(run), log=ignore)


def test_a_base_whose_files_were_exchanged_is_refused(small, folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "kept")
    arguments = [f"output={small}", "merge.methods=[{method: ties}]"]
    before = digests(small)
    try:
        shutil.rmtree(folder / "base")
        tiny.make_base(folder / "base", seed=1)
        with pytest.raises(UserError, match=r"the base .*base changed since the training of"):
            pipeline.run(load_config(folder / "tiny.yaml", arguments), log=ignore)
        with pytest.raises(UserError, match=r"the base .*base changed since the training of"):
            references.open_model(f"{small}/member_0")
    finally:
        shutil.rmtree(folder / "base")
        shutil.copytree(tmp_path / "kept", folder / "base")
    assert digests(small) == before


def edit(run, old, new):
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))
