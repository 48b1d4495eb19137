"""Programs as answers: prompts and scores as published, through the sandbox."""

import gzip
import itertools
import json

import numpy as np
import pytest

from jax_ordermerge.config import Config, make_config, make_task
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import sandbox
from jax_ordermerge.evaluate.eval_model import EvalModel
from jax_ordermerge.evaluate.tasks import programs

ROWS = [
    {
        "task_id": n,
        "text": f"Task {n}.",
        "code": f"def f{n}(x):\n    return x + {n}",
        "test_list": [f"assert f{n}(1) == {n + 1}"],
    }
    for n in (2, 3, 4, 11, 12)
]
FILE = {"kind": "mbpp", "name": "code", "data": "mbpp.jsonl"}


class TextLength:
    """A tokenizer whose only token is the length of the text."""

    bos_token = None

    def __call__(self, text, **options):
        return {"input_ids": [len(text)]}


@pytest.fixture(scope="module")
def human(shared_data):
    with gzip.open(shared_data / "code" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert programs.pass_at_k(n, c, k) == pytest.approx(
                np.mean([any(draw) for draw in draws])
            )
    with pytest.raises(UserError, match="pass@3 needs at least 3 samples"):
        programs.pass_at_k(2, 1, 3)


def test_mbpp_shows_its_three_examples_and_asks_the_others():
    first, second = programs.mbpp(ROWS)
    assert (first.id, second.id) == ("11", "12")
    assert first.prompt.count("[BEGIN]") == 4
    assert first.prompt.count("[DONE]") == 3
    assert first.prompt.startswith(
        "You are an expert Python programmer, and here is your task: Task 2. Your code should "
        "pass these tests:"
    )
    assert first.prompt.endswith("assert f11(1) == 12\n[BEGIN]\n")
    assert first.judge(first.reference + "\n[DONE]\nthis is not read").passed
    assert not first.judge(second.reference).passed


def test_mbpp_finds_which_functions_its_tests_call():
    tests = [
        "import math",
        "y = [math.floor(g(x)) for x in range(3)]",
        "assert sorted(h(y)) == set(y) or True",
    ]
    row = {"task_id": 20, "text": "t", "code": "", "test_list": tests}
    (problem,) = programs.mbpp([row | {"test_setup_code": "import re as regex"}])
    assert problem.names == ("g", "h")


@pytest.mark.parametrize(
    ("code", "test", "names"),
    [
        # a function named like one of Python, in the reference or alone in an assertion
        ("def sum(a, b): return a + b", "assert sum(1, 2) == 3", ("sum",)),
        ("", "assert sum([1, 2]) == 3", ("sum",)),
        ("def total(l): return sum(l)", "assert total([1, 2]) == sum([3])", ("total",)),
        # what the reference imports is Python's
        ("import sys\ndef f(): return 1", "assert f() < sys.maxsize", ("f",)),
        ("class Pair: pass\ndef f(p): return 1", "assert f(Pair()) == 1", ("Pair", "f")),
        ("def f(g): return g(1)", "assert f(lambda x: abs(x)) == 1", ("f",)),
    ],
)
def test_mbpp_finds_what_the_reference_defines(code, test, names):
    row = {"task_id": 20, "text": "t", "code": code, "test_list": [test]}
    assert programs.mbpp([row])[0].names == names


def test_mbpp_answers_that_take_the_names_of_others():
    row = {
        "task_id": 20,
        "text": "t",
        "code": "import math\ndef area(r): return math.pi * r * r",
        "test_list": ["assert math.isclose(area(1), 3.14159265, rel_tol=1e-6)"],
    }
    (problem,) = programs.mbpp([row])
    assert problem.judge(row["code"]).passed
    fake = "class math: isclose = staticmethod(lambda *a, **k: True)\ndef area(r): return 0"
    assert problem.judge(fake).detail.startswith("failed: AssertionError")
    # as in plain Python: the tests read a module that the answer has not imported
    assert "name 'math' is not defined" in problem.judge("def area(r): return 3.14159265").detail
    row = {
        "task_id": 21,
        "text": "t",
        "code": "def sum(l): ...",
        "test_list": ["assert sum([1, 2]) == 3"],
    }
    (problem,) = programs.mbpp([row])
    assert not problem.judge("def sum(l): return 'wrong'").passed
    assert problem.judge("def sum(l): return l[0] + l[1]").passed


def test_a_humaneval_answer_ends_at_the_next_thing_at_top_level(human):
    (problem,) = programs.humaneval(human[:1])
    assert problem.prompt == human[0]["prompt"]
    solution = problem.prompt + problem.reference
    for suffix in ("\nprint(1)", "\ndef g():\n  ((", "\n# done", "\nclass A", "\nif __name__"):
        assert problem.program(problem.reference + suffix) == solution
        assert problem.judge(problem.reference + suffix).passed


def test_a_task_of_programs(human):
    def generate(prompts, new, sampling, names):
        # Of each problem the first program is right, the second is not.
        assert prompts == [[len(row["prompt"])] for row in human[:3] for _ in range(2)]
        assert (new, sampling.temperature, sampling.seed) == (99, 0.8, 4)
        assert names == [f"HumanEval/{n}/{sample}" for n in range(3) for sample in range(2)]
        return [text for row in human[:3] for text in (row["canonical_solution"], "    pass")]

    task = make_task(
        name="code",
        kind="humaneval",
        data="x",
        limit=3,
        samples=2,
        temperature=0.8,
        max_new_tokens=99,
    )
    model = EvalModel(TextLength(), generate, None, 999)
    summary, items, _ = programs.write(task, human, model, seed=4)
    assert summary == {
        "accuracy": 0.5,
        "se": 0.0,
        "n": 3,
        "isolation": sandbox.available()[0],
        "pass@1": 0.5,
        "fenced": 0.5,
        "fenced_se": 0.0,
        "fenced_pass@1": 0.5,
    }
    assert [item["correct"] for item in items] == [True, False] * 3
    assert items[0]["detail"] == "passed"
    assert "failed" in items[1]["detail"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "humaneval"}, "needs its file or hub dataset"),
        (
            {"kind": "gsm8k", "samples": 4},
            "unknown key evaluation.tasks.0.samples .kind gsm8k has: name, ",
        ),
        ({"kind": "mbpp", "data": "x", "samples": 4}, "needs programs that are drawn"),
        ({"kind": "mbpp", "data": "x", "top_p": 0.9}, "needs programs that are drawn"),
    ],
)
def test_settings_that_do_not_fit_are_refused(task, message):
    with pytest.raises(UserError, match=message):
        make_config({"evaluation": {"tasks": [{"name": "a"} | task]}})


def test_a_file_of_another_kind_is_refused():
    with pytest.raises(
        UserError, match="kind humaneval reads the column prompt, its data has task_id, text"
    ):
        programs.humaneval([{"task_id": 1, "text": ""}])
    with pytest.raises(UserError, match="has no problems"):
        programs.write(make_task(**FILE), [], EvalModel(TextLength(), None, None, 999), seed=0)
    assert Config(evaluation={"tasks": [FILE]}).evaluation.tasks[0].samples == 1
