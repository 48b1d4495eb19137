"""A kind of task that is registered from outside of the package, from a config to its result."""

import json

import pytest

from jax_ordermerge.commands import evaluate
from jax_ordermerge.config import TASK_KINDS, TaskKind, load_config
from jax_ordermerge.config.evaluation import FileTask, GeneratedTask
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.eval_model import TaskResult
from jax_ordermerge.evaluate.metrics import accuracy
from tests.experiment import tiny

KIND = "ends_with"


class ToyTask(FileTask, GeneratedTask):
    """Whether an answer ends with a word."""

    word: str


def run_toy(task, model, inputs):
    """The whole family: prompts, generation, scores and the summary."""
    prompts = [model.encode(row["question"]) for row in inputs.rows(task)]
    answers = model.generate(prompts, task.max_new_tokens)
    items = [{"answer": text, "correct": text.endswith(task.word)} for text in answers]
    share, error = accuracy([item["correct"] for item in items])
    return TaskResult({"accuracy": share, "se": error, "n": len(items)}, items)


@pytest.fixture(autouse=True)
def registered():
    TASK_KINDS.register(KIND, TaskKind(ToyTask, run_toy))
    yield
    TASK_KINDS.unregister(KIND)


@pytest.fixture
def task(tmp_path):
    rows = [{"question": "a plus b is ?"}, {"question": "c plus d is ?"}]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "toy", "kind": KIND, "data": str(tmp_path / "toy.jsonl"), "max_new_tokens": 3}


def test_a_registered_kind_evaluates_a_model(tmp_path, task):
    tiny.make_base(tmp_path / "base")
    settings = {"evaluation": {"tasks": [task | {"word": "x"}]}}
    settings["model"] = {"base": str(tmp_path / "base"), "compute_dtype": "float32"}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    lines = []
    config = load_config(tmp_path / "config.yaml", ["mesh.fsdp=1"])
    results = evaluate.evaluate_tasks(
        config, tmp_path / "out", lines.append, on_result=lines.append
    )
    assert results["tasks"]["toy"] == {"accuracy": 0.0, "se": 0.0, "n": 2}
    assert lines == ["toy: accuracy 0.0 % +- 0.0, n 2"]
    items = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert [set(item) for item in items] == [{"answer", "correct"}] * 2
    assert all(item["answer"] for item in items)


def test_its_settings_are_validated(tmp_path, task):
    (tmp_path / "config.yaml").write_text(json.dumps({"evaluation": {"tasks": [task]}}))
    with pytest.raises(UserError, match=r"evaluation.tasks.0.word is missing"):
        load_config(tmp_path / "config.yaml")


def test_a_kind_is_registered_once():
    with pytest.raises(ValueError, match=f"task kind '{KIND}' is registered already"):
        TASK_KINDS.register(KIND, TaskKind(ToyTask, run_toy))
