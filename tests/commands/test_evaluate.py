"""One model put to tasks from the command line, and tasks without a right answer inside a run."""

import json
import shutil

import numpy as np
import pytest
import yaml

from jax_ordermerge.commands import evaluate
from jax_ordermerge.config import load_config, make_task
from jax_ordermerge.evaluate import harness, judge
from jax_ordermerge.experiment import pipeline
from tests.commands.test_cli import call
from tests.experiment import tiny

LETTERS = "abcdefgh"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tasks(tmp_path):
    """One task of each kind that reads columns of its own, and a few-shot one."""
    choosing = [
        {"question": f"{a} plus b is ?", "options": [f"b {a} .", f"{a} .", "h h h ."], "right": 0}
        for a in LETTERS
    ]
    files = {
        "choosing": write(tmp_path / "choosing.jsonl", choosing),
        "texts": write(
            tmp_path / "texts.jsonl", [{"page": " ".join(LETTERS * 9)}, {"page": "a b ."}]
        ),
        "asked": write(
            tmp_path / "asked.jsonl",
            [{"instruction": "a plus b is ?"}, {"instruction": "a plus", "input": "c is ?"}],
        ),
        "pairs": write(
            tmp_path / "pairs.jsonl",
            [{"q": f"{a} plus {b} is ?", "a": f"{b} {a} ."} for a in "abc" for b in "de"],
        ),
    }
    return [
        {
            "name": "choosing",
            "kind": "multiple_choice",
            "data": files["choosing"],
            "prompt": "{{question}}",
            "choices": "{{options}}",
            "answer": "{{right}}",
        },
        {"name": "pages", "kind": "perplexity", "data": files["texts"], "text": "{{page}}"},
        {"name": "told", "kind": "alpaca_outputs", "data": files["asked"], "max_new_tokens": 4},
        {
            "name": "shown",
            "data": files["pairs"],
            "prompt": "{{q}}",
            "response": " {{a}}",
            "shots": 1,
            "shots_from": files["pairs"],
            "shots_between": " ",
            "max_new_tokens": 4,
            "stop": ["."],
        },
    ]


def test_a_model_on_tasks_of_a_config(folder, tasks, tmp_path, capsys):
    file = tmp_path / "tasks.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"compute_dtype": "float32"},
                "data": {"template": "plain"},
                "evaluation": {"tasks": tasks},
            }
        )
    )
    assert (
        call(
            "evaluate",
            folder / "base",
            "--config",
            file,
            "--out",
            tmp_path / "out",
            "--set",
            "mesh.fsdp=2",
        )
        == 0
    )
    messages = capsys.readouterr().out.splitlines()
    summaries = [line.split(":")[0] for line in messages if " n " in line]
    assert summaries == ["choosing", "pages", "told", "shown"]
    # one item of each task that has a prompt, as the model saw it
    shown = messages.index(f"shown, one item of {folder / 'base'}:")
    assert messages[shown + 1] == "  prompt:    a plus e is ? e a . a plus d is ?"
    assert messages[shown + 2].startswith("  answer:    ")
    assert messages[shown + 3] == "  reference: d a ."
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["model"], results["dtype"]) == (str(folder / "base"), "float32")
    assert {name: task["n"] for name, task in results["tasks"].items()} == {
        "choosing": 8,
        "pages": 2,
        "told": 2,
        "shown": 6,
    }
    items = json.loads((tmp_path / "out" / "choosing.json").read_text())
    assert [len(item["logps"]) for item in items] == [3] * 8
    # nothing else is left there, such as a partial file
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        *(f"{name}.json" for name in results["tasks"]),
    }
    outputs = judge.read(tmp_path / "out" / "told.json")
    assert [(row["instruction"], row["generator"], row["dataset"]) for row in outputs] == [
        ("a plus b is ?", "base", "told"),
        ("a plus\n\nc is ?", "base", "told"),
    ]


def test_a_limit_for_all_tasks(folder, tasks, tmp_path, capsys):
    tasks[2]["limit"] = 1
    settings = {"evaluation": {"tasks": tasks}, "model": {"compute_dtype": "float32"}}
    settings["data"] = {"template": "plain"}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(settings))
    options = ["--config", tmp_path / "tasks.yaml", "--out", tmp_path / "out", "--limit", 2]
    assert call("evaluate", folder / "base", *options, "--json", "--quiet") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    captured = capsys.readouterr()
    assert (json.loads(captured.out), captured.err) == (results, "")
    # the lower one of the two limits
    assert [task["n"] for task in results["tasks"].values()] == [2, 2, 1, 2]
    assert results["limit"] == 2
    assert call("evaluate", folder / "tiny.yaml", "--limit", 2) == 2
    assert "--limit goes with a model" in capsys.readouterr().err


@pytest.mark.slow
def test_scores_do_not_depend_on_batch_and_mesh(folder, tasks):
    def run(*changes):
        config = evaluate.model_config(
            str(folder / "base"), None, ["model.compute_dtype=float32", *changes]
        )
        return harness.run(make_task(**tasks[0]), evaluate.load_model(config), config.data)[1]

    single = run("evaluation.batch=1", "mesh.fsdp=1")
    for changes in (
        ["evaluation.batch=7", "mesh.fsdp=1"],
        ["mesh.order=2", "mesh.fsdp=2", "mesh.tensor=2"],
    ):
        np.testing.assert_allclose(
            [item["logps"] for item in run(*changes)], [item["logps"] for item in single], rtol=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}"], "no tasks to evaluate it on"),
        (["{base}", "--shots", "2"], "--shots goes with --harness"),
        (["{config}", "--harness", "arc_easy"], "--harness goes with a model"),
        (["{base}", "--config", "nowhere.yaml"], "config file nowhere.yaml not found"),
        (
            [
                "nowhere/at/all",
                "--set",
                "evaluation.tasks=[{name: a, kind: perplexity, data: x.jsonl}]",
            ],
            "model directory nowhere/at/all",
        ),
        (
            [
                "{base}",
                "--set",
                "evaluation.tasks=[{name: a, kind: alpaca_outputs, data: x.jsonl}]",
            ],
            "say where with --out",
        ),
        (
            ["{base}", "--set", "evaluation.tasks=[{name: a, kind: perplexity, data: x.jsonl}]"],
            "x.jsonl not found",
        ),
        (["{base}", "--set", "evaluation.tasks=[{name: a}]"], "task a has no data"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, message, capsys):
    places = {"{base}": folder / "base", "{config}": folder / "tiny.yaml"}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert call("evaluate", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_tasks_inside_a_run(folder, tasks, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    file = tiny.make_config(tmp_path, evaluation={"tasks": tasks})
    directory = pipeline.run(load_config(file), log=lambda line: None)
    models = json.loads((directory / "evaluations.json").read_text())["models"]
    assert all(
        set(model["tasks"]) == {"choosing", "shown"} and set(model["texts"]) == {"pages"}
        for model in models
    )
    rows = json.loads((directory / "evaluations" / "average.json").read_text())
    assert [set(item) for item in rows["texts"]["pages"]] == [
        {"id", "logp", "words", "bytes", "tokens"}
    ] * 2
    outputs = judge.read(directory / "outputs" / "told" / "average.json")
    assert [row["generator"] for row in outputs] == ["tiny/average"] * 2
    report = (directory / "report.md").read_text()
    assert "choosing" in report
    table = report[report.index("Perplexity of texts") :]
    assert table.count("pages") >= 5 + 2  # every model, and both merges against the mean member
