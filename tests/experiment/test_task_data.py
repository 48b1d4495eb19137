"""The data of evaluation tasks are checked before anything is trained."""

import json

import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import harness
from jax_ordermerge.experiment import context, pipeline
from tests.experiment import tiny

ASKED = {"prompt": "{{q}}", "response": " {{a}}", "max_new_tokens": 4}
CHOICE = {"prompt": "{{q}}", "choices": "{{c}}", "answer": "{{a}}"}


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            {"kind": "number", **ASKED},
            [{"q": "a", "a": "5"}, {"q": "b", "a": "-"}],
            "item 1: a ref",
        ),
        ({"kind": "gsm8k", **ASKED}, [{"q": "a", "a": "5"}], "expected '#### number'"),
        ({"kind": "exact", **ASKED}, [{"q": "a"}], "'a' is undefined"),
        ({"kind": "exact", **ASKED}, [{"q": "a " * 30, "a": "b"}], "exceed the context of 32"),
        ({"kind": "multiple_choice", **CHOICE}, [{"q": "a", "c": ["b", "c"], "a": 2}], "expected"),
        ({"kind": "perplexity", "text": "{{page}}"}, [{"text": "a"}], "'page' is undefined"),
        ({"kind": "alpaca_outputs"}, [{"prompt": "a"}], "needs the column instruction"),
        ({"kind": "humaneval"}, [{"prompt": "a"}], "humaneval"),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else None,
)
def test_a_task_that_cannot_be_evaluated_stops_the_run_before_its_training(
    task, rows, message, tmp_path
):
    tiny.make_base(tmp_path / "base")
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"name": "asked", "data": str(file), **task}]
    config = load_config(tiny.make_config(tmp_path, evaluation={"tasks": tasks}))
    with pytest.raises(UserError, match=message) as raised:
        pipeline.run(config, log=lambda line: None)
    assert "asked" in str(raised.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_task_of_the_hub_is_not_fetched_before_the_training(tmp_path):
    tiny.make_base(tmp_path / "base")
    tasks = [{"name": "hub", "data": "owner/name", "kind": "exact", **ASKED}]
    config = load_config(tiny.make_config(tmp_path, evaluation={"tasks": tasks}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "check", lambda *_, **__: pytest.fail("fetched"))
        context.load_context(config, lambda line: None)
