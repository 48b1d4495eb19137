"""Answers of chat models to HumanEval and MBPP: blocks of code, prompts, and both counts."""

import gzip
import json

import pytest
import tokenizers
import transformers

from jax_ordermerge.config import make_task
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import code_blocks, sandbox
from jax_ordermerge.evaluate.eval_model import EvalModel
from jax_ordermerge.evaluate.tasks import programs

MBPP = {
    "task_id": 11,
    "text": "Double it.",
    "code": "def f(x): return 2 * x",
    "test_list": ["assert f(2) == 4"],
}
RIGHT = "def f(x):\n    return 2 * x\n"


@pytest.fixture(scope="module")
def human(shared_data):
    with gzip.open(shared_data / "code" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("no code", []),
        ("```python\nx\n```", ["x\n"]),
        ("Sure: ```py\nx\n```and\n```\ny\n```", ["x\n", "y\n"]),
        ("~~~ python title='a'\nx = '```'\n~~~\n", ["x = '```'\n"]),
        ("````\n```\nx\n```\n````", ["```\nx\n```\n"]),
        ("1. so\n   ```python\n   if x:\n       y\n   ```\n2. then", ["if x:\n    y\n"]),
        ("```python\nx = 1```", ["x = 1"]),
        ("```python\nx = '''```'''\ny\n```", ["x = '''```'''\ny\n"]),
        ("```python\ncut off", ["cut off"]),
        ("```python\r\nx\r\n```", ["x\r\n"]),
        ("```", []),
    ],
)
def test_blocks(text, blocks):
    assert code_blocks.blocks(text) == blocks


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        (f"Here it is.\n\n```python\n{RIGHT}```\nIt doubles.", True),
        (f"```python\n{RIGHT}```\n```python\ndef f(x): return 0\n```", True),
        (f"```sh\npip install x\n```\n```python\n{RIGHT}```", True),
        (f"```python\n{RIGHT}", True),
        (f"{RIGHT}[DONE]\n```python\ndef f(x): return 0\n```", True),
        (f"{RIGHT}```\nThis doubles it.\n```python\nprint(f(1))\n```", True),
        (RIGHT, True),
        ("```python\ndef f(x): return x\n```", False),
        ("f(2) is 4.", False),
    ],
)
def test_answers_to_mbpp(answer, passes):
    (problem,) = programs.mbpp([MBPP])
    assert problem.judge_program(problem.fenced_program(answer)).passed == passes


def test_answers_to_humaneval_have_what_stands_before_the_function(human):
    # 32 and 38 have an import and a helper before it
    for problem, row in zip(programs.humaneval(human), human, strict=True):
        complete = problem.before + problem.reference
        function = complete[complete.rindex(f"def {row['entry_point']}") :]
        for answer in (
            f"Sure!\n```python\n{function}\n```\nUse it:\n```python\nprint(1)\n```",
            function,
            f"```python\n{function}",
        ):
            program = problem.fenced_program(answer)
            assert program.strip() == f"{problem.head}\n{function}".strip(), problem.id
        for answer in (f"```\n{problem.reference}```", f"{problem.reference}\n```\nDone."):
            assert problem.fenced_program(answer).strip() == complete.strip(), problem.id
    for number in (32, 38):
        problem = programs.humaneval(human[number : number + 1])[0]
        function = problem.before[len(problem.head) :] + problem.reference
        assert problem.judge_program(problem.fenced_program(f"```\n{function}```")).passed
        # read as published, an answer of a chat model is no program
        assert not problem.judge(f"```\n{function}```").passed


def write(task, rows, texts, chat_template="{{ messages[0]['content'] }}|"):
    """Return summary and items of a task whose model answers with given texts, and its prompts."""
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({chr(n): n for n in range(256)}, []))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, chat_template=chat_template
    )
    prompts = []

    def generate(tokens, *settings):
        prompts.extend("".join(map(chr, row)) for row in tokens)
        return texts

    task = make_task(name="code", data="x", **task)
    result = programs.write(task, rows, EvalModel(tokenizer, generate, None, 999), seed=0)
    return result.summary, result.items, prompts


def test_fenced_answers_are_counted_beside_the_published_way():
    rows = [MBPP | {"task_id": n} for n in (11, 12, 13, 14)]
    texts = [RIGHT, f"```python\n{RIGHT}```", "```python\ndef f(x): return x\n```", "no"]
    summary, items, _ = write({"kind": "mbpp"}, rows, texts)
    assert summary["accuracy"] == 0.25
    assert summary["fenced"] == summary["fenced_pass@1"] == 0.5
    assert summary["fenced_se"] > summary["se"] > 0
    assert [item["correct"] for item in items] == [True, False, False, False]
    assert [item["correct_fenced"] for item in items] == [True, True, False, False]
    assert items[1]["detail"].startswith("failed: SyntaxError")
    assert items[2]["detail_fenced"].startswith("failed: AssertionError")


def test_chat_prompts(human):
    texts = [f"```python\n{RIGHT}```"]
    summary, items, prompts = write({"kind": "mbpp", "template": "chat"}, [MBPP], texts)
    assert summary == {
        "accuracy": 1.0,
        "se": None,  # one item has no spread
        "pass@1": 1.0,
        "n": 1,
        "isolation": sandbox.available()[0],
    }
    assert prompts == [
        "Double it.\n\nAnswer with one block of Python code that passes these tests:\n\n"
        "```python\nassert f(2) == 4\n```|"
    ]
    assert "correct_fenced" not in items[0]
    complete = human[0]["prompt"] + human[0]["canonical_solution"]
    summary, items, prompts = write(
        {"kind": "humaneval", "template": "chat", "limit": 1}, human, [f"```\n{complete}```"]
    )
    assert summary["accuracy"] == 1
    assert prompts == [
        "Complete this Python function. Answer with the whole function in one block of code."
        f"\n\n```python\n{human[0]['prompt'].strip()}\n```|"
    ]
    assert items[0]["prompt"] == prompts[0][:-1]


def test_chat_needs_a_chat_template():
    with pytest.raises(UserError, match="has template: chat, but the tokenizer has no chat"):
        write({"kind": "mbpp", "template": "chat"}, [MBPP], [], chat_template=None)


def test_the_time_limit_is_a_setting():
    slow = "import time\ntime.sleep(30)\n"
    _, (item,), _ = write({"kind": "mbpp", "timeout": 0.5}, [MBPP], [slow])
    assert item["detail"] == item["detail_fenced"] == "timeout"
    with pytest.raises(UserError, match="timeout"):
        make_task(name="a", kind="mbpp", data="x", timeout=0)
