"""Programs that must pass the tests of their file in a sandbox: HumanEval and MBPP.

Sources: Chen et al., "Evaluating large language models trained on code", 2021,
https://arxiv.org/abs/2107.03374 (HumanEval, pass@k); Austin et al., "Program synthesis with large
language models", 2021, https://arxiv.org/abs/2108.07732 (MBPP, its prompt and its three shots).
"""

import ast
import builtins
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from jax_ordermerge.config.evaluation import (
    SMALLEST_TEMPERATURE,
    TASK_KINDS,
    FileTask,
    GeneratedTask,
    TaskKind,
)
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import code_blocks, sandbox
from jax_ordermerge.evaluate.eval_model import EvalModel, ItemExample, TaskResult, name_items
from jax_ordermerge.evaluate.matching import truncate
from jax_ordermerge.evaluate.metrics import mean_and_error
from jax_ordermerge.json_types import Json, JsonRow, JsonValue

if TYPE_CHECKING:
    from jax_ordermerge.evaluate.inputs import TaskInputs

_SHOTS = (2, 3, 4)  # task_id of the examples that the MBPP paper shows before each problem
# the k of the paper on HumanEval
_PASS_AT = (1, 10, 100)


class ProgramTask(FileTask, GeneratedTask):
    """A task for which a model writes programs."""

    samples: PositiveInt = Field(
        1,
        description="programs drawn per problem, for pass@1, pass@10 and pass@100",
        json_schema_extra={"unit": "programs", "with": "temperature above 0"},
    )
    temperature: NonNegativeFloat = Field(
        0.0, description="0 is greedy", json_schema_extra={"unit": "factor of the logits"}
    )
    top_k: PositiveInt | None = Field(
        None,
        description="draw among so many likely tokens",
        examples=[40],
        json_schema_extra={"unit": "tokens", "with": "temperature above 0"},
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="draw within this probability",
        examples=[0.95],
        json_schema_extra={"unit": "probability", "with": "temperature above 0"},
    )
    template: Literal["published", "chat"] = Field(
        "published",
        description="chat: the problem is a user's turn in the chat template of the model, and the"
        " answer is read as a block of code",
    )
    timeout: PositiveFloat = Field(
        10.0,
        description="seconds for a program with its tests",
        json_schema_extra={"unit": "seconds"},
    )

    @pydantic.model_validator(mode="after")
    def _draws_need_a_temperature(self) -> "ProgramTask":
        for name in ("samples", "top_k", "top_p"):
            default = ProgramTask.model_fields[name].default
            if getattr(self, name) != default and self.temperature < SMALLEST_TEMPERATURE:
                raise ValueError(
                    f"{name} needs programs that are drawn; give a temperature above 0"
                )
        return self


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: its `task_id`.
        prompt: what the model continues.
        question: what a chat model is asked.
        before: source that the continuation completes to a program.
        head: the part of it before the function that is asked for.
        stops: texts that end a continuation.
        tests, names, setup: see `sandbox.judge`.
        reference: a right continuation.
    """

    id: str
    prompt: str
    question: str
    before: str
    head: str
    stops: tuple[str, ...]
    tests: str
    names: tuple[str, ...]
    setup: str
    reference: str

    def program(self, text: str) -> str:
        """Return the program of a continuation, which ends before the first stop."""
        return self.before + truncate(text, self.stops)

    def fenced_program(self, text: str) -> str:
        """Return the program in a block of code of an answer; without one, that of `program`.

        What stands before the function, such as imports and helpers, is put before a block that
        has the function, and the head of the function before one that has its body.
        """
        if not self.before:
            text = truncate(text, self.stops)
        lead = code_blocks.before_blocks(text)
        # The answer goes on with the function itself, and fences only follow.
        if self.before and re.match(r"(?:\s*\n)?[ \t]+\S", lead):
            return self.program(lead)
        # Code before the first fence: an answer that begins with the function and explains it
        # below.
        is_code = code_blocks.defines(lead, self.names)
        code = lead if is_code else code_blocks.answer(text, self.names)
        if code is None:
            return self.program(text)
        is_complete = not self.before or code_blocks.defines(code, self.names)
        return f"{self.head}\n{code}" if is_complete else self.before + code

    def judge(self, text: str, timeout: float = 10.0) -> sandbox.Verdict:
        """Run the tests on a continuation."""
        return self.judge_program(self.program(text), timeout)

    def judge_program(self, program: str, timeout: float = 10.0) -> sandbox.Verdict:
        """Run the tests on a program."""
        return sandbox.judge(
            program,
            self.tests,
            self.names,
            setup=self.setup,
            reference=self.before + self.reference,
            timeout=timeout,
        )


def humaneval(rows: Sequence[JsonRow]) -> list[Problem]:
    """Return the problems of HumanEval: the model completes a function from its head.

    A continuation ends at the next statement at top level.

    Raises:
        UserError: a column is missing.

    Example:
        >>> row = {
        ...     "task_id": "t/0",
        ...     "prompt": "def f(x):\\n    ''\\n",
        ...     "entry_point": "f",
        ...     "canonical_solution": "    return x\\n",
        ...     "test": "def check(candidate):\\n    assert candidate(1) == 1\\n",
        ... }
        >>> (problem,) = humaneval([row])
        >>> problem.judge("    return x\\nprint(1)").passed
        True
        >>> problem.judge("    return 2 * x\\n").passed
        False
    """
    problems = []
    for row in rows:
        task_id, prompt, test, function = (
            _column(row, name, "humaneval") for name in ("task_id", "prompt", "test", "entry_point")
        )
        problems.append(
            Problem(
                id=str(task_id),
                prompt=prompt,
                question="Complete this Python function. Answer with the whole function in one "
                f"block of code.\n\n```python\n{prompt.strip()}\n```",
                before=prompt,
                head=re.split(rf"^def {re.escape(function)}\b", prompt, flags=re.MULTILINE)[0],
                # the stop sequences of the paper: a completion of the body ends with the next
                # top-level line
                stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
                # the file defines `check` and leaves the call to whoever runs it
                tests=f"{test}\ncheck({function})",
                names=(function,),
                # Tests may call helpers that the prompt defines beside the function.
                setup=prompt,
                reference=row.get("canonical_solution", ""),
            )
        )
    return problems


def mbpp(rows: Sequence[JsonRow]) -> list[Problem]:
    """Return the problems of MBPP, each after the problems 2, 3 and 4, which are not asked.

    Raises:
        UserError: a column is missing.

    Example:
        >>> row = {
        ...     "task_id": 11,
        ...     "text": "Double it.",
        ...     "code": "def f(x): return 2 * x",
        ...     "test_list": ["assert f(2) == 4"],
        ... }
        >>> (problem,) = mbpp([row])
        >>> problem.prompt.splitlines()[1:]
        ['', 'assert f(2) == 4', '[BEGIN]']
        >>> problem.judge("def f(x): return 2 * x\\n[DONE]\\n").passed
        True
    """
    shots = "".join(
        f"{_mbpp_prompt(row)}{row['code']}\n[DONE]\n"
        for row in rows
        if row.get("task_id") in _SHOTS
    )
    problems = []
    for row in rows:
        if row.get("task_id") in _SHOTS:
            continue
        # Only the sanitized version has test_imports, only the full one test_setup_code.
        setup = "\n".join([*row.get("test_imports", ()), row.get("test_setup_code", "")])
        tests = "\n".join(_column(row, "test_list", "mbpp"))
        problems.append(
            Problem(
                id=str(_column(row, "task_id", "mbpp")),
                prompt=shots + _mbpp_prompt(row),
                question=f"{_mbpp_task(row)}\n\nAnswer with one block of Python code that passes "
                f"these tests:\n\n```python\n{tests}\n```",
                before="",
                head="",
                # the end mark that the shots show
                stops=("[DONE]",),
                tests=tests,
                names=_checked_names(tests, setup, row["code"]),
                setup=setup,
                reference=_column(row, "code", "mbpp"),
            )
        )
    return problems


def _mbpp_task(row: JsonRow) -> JsonValue:
    # The sanitized version of MBPP has the column `prompt` instead of `text`.
    return _column(row, "prompt" if "text" not in row and "prompt" in row else "text", "mbpp")


def _mbpp_prompt(row: JsonRow) -> str:
    tests = "\n".join(_column(row, "test_list", "mbpp"))
    return (
        f"You are an expert Python programmer, and here is your task: {_mbpp_task(row)} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _checked_names(tests: str, setup: str, reference: str) -> tuple[str, ...]:
    """Return the names of functions and classes that tests check.

    These are the global names that the tests read and that neither they nor Python define, beside
    what a right program imports. A function may also be named like one of Python. That it is meant
    is seen from the reference, and from an assertion that calls nothing else.
    """
    try:
        statements = ast.parse(tests).body
        right = ast.parse(reference).body
    except (SyntaxError, ValueError):
        statements, right = [], []  # errors are those of the tests when they run
    defines = {node.name for node in right if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imports = {
        alias.asname or alias.name.partition(".")[0]
        for node in right
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    # A name of Python among them means Python's, unless the reference defines it or an assertion
    # calls nothing else.
    python = set(dir(builtins))
    # Names and no calls: tests also pass functions to others, as in `map(f, ...)`.
    free = sandbox.free_names(f"{setup}\n{tests}")
    for statement in statements:
        if isinstance(statement, ast.Assert) and not (
            sandbox.free_names(ast.unparse(statement)) & free - python
        ):
            calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
            defines |= {function.id for function in calls if isinstance(function, ast.Name)}
    return tuple(sorted(free & (defines | (free - python - imports))))


def _column(row: JsonRow, name: str, kind: str) -> JsonValue:
    if name not in row:
        raise UserError(
            f"a task of kind {kind} reads the column {name}, its data has {', '.join(row)}; give "
            "the file as published"
        )
    return row[name]


PROBLEMS: dict[str, Callable[[Sequence[JsonRow]], list[Problem]]] = {
    "humaneval": humaneval,
    "mbpp": mbpp,
}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate that one of k draws is correct: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, programs drawn.
        correct: c, correct programs.
        k: at most n.

    Raises:
        UserError: k is above n.

    Example:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 4, 2)
        (0.25, 0.5, 1.0)
    """
    if k > samples:
        raise UserError(
            f"pass@{k} needs at least {k} samples per problem, got {samples}; raise samples"
        )
    # 1 - (1 - c/n)^k would be biased: draws of k programs out of n are without replacement.
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def run(task: ProgramTask, model: EvalModel, inputs: "TaskInputs") -> TaskResult:
    """Let a model write programs for the problems of a file."""
    return write(task, inputs.rows(task), model, seed=inputs.seed)


def write(task: ProgramTask, rows: Sequence[JsonRow], model: EvalModel, *, seed: int) -> TaskResult:
    """Let a model write programs, and run their tests in the sandbox.

    Args:
        task: with `samples` above 1 programs are drawn.
        rows: of its file, as published.
        model: writes the programs.
        seed: of the draws.

    Returns:
        `accuracy` (pass@1), `se`, `n`, `isolation` and `pass@k`, and as `fenced`, `fenced_se` and
        `fenced_pass@k` the same of programs that are read from blocks of code. With the template
        `chat` the first ones are read so, and there are no others. Per program `id`, `prompt`,
        `reference`, `answer`, `correct` and `detail` of the verdict.
    """
    from jax_ordermerge.evaluate.sampling import Sampling  # imports JAX

    # cut after the shots are taken out: the limit counts problems that are asked
    problems = PROBLEMS[task.kind](rows)[: task.limit]
    if not problems:
        raise UserError(f"evaluation task {task.name} has no problems, check its data and limit")
    drawn = [problem for problem in problems for _ in range(task.samples)]
    # Noise by name: a program does not depend on limit or on the other problems.
    names = [f"{problem.id}/{sample}" for problem in problems for sample in range(task.samples)]
    prompts = [_tokens(task, problem, model) for problem in drawn]
    with name_items(names):
        texts = model.generate(
            prompts,
            task.max_new_tokens,
            Sampling(task.temperature, task.top_k, task.top_p, seed),
            names,
        )
    items: list[Json] = []
    for name, problem, text in zip(names, drawn, texts, strict=True):
        prompt = problem.question if task.template == "chat" else problem.prompt
        item = {"id": name, "prompt": prompt, "reference": problem.reference, "answer": text}
        items.append(item | _judge(task, problem, text))
    summary: Json = _shares(task, [item["correct"] for item in items])
    summary |= {"n": len(problems), "isolation": sandbox.available()[0]}
    if task.template == "published":
        fenced = _shares(task, [item["correct_fenced"] for item in items])
        summary["fenced"] = fenced.pop("accuracy")
        summary |= {f"fenced_{name}": value for name, value in fenced.items()}
    example = ItemExample(prompts[0], texts[0], problems[0].reference)
    return TaskResult(summary, items, example)


def _tokens(task: ProgramTask, problem: Problem, model: EvalModel) -> list[int]:
    if task.template == "published":
        return model.encode(problem.prompt)
    from jax_ordermerge.data import chat  # imports much
    from jax_ordermerge.data.formats import Record

    if not model.tokenizer.chat_template:
        raise UserError(
            f"evaluation task {task.name} has template: chat, but the tokenizer has no chat "
            "template; use template: published"
        )
    record = Record.single_turn(problem.question)
    return chat.prompt_tokens(record, "chat", model.tokenizer).tolist()


def _judge(task: ProgramTask, problem: Problem, text: str) -> Json:
    """Return `correct` and `detail` of an answer, and `correct_fenced` and `detail_fenced`."""
    fenced_program = problem.fenced_program(text)
    fenced = problem.judge_program(fenced_program, task.timeout)
    if task.template == "chat":
        return {"correct": fenced.passed, "detail": fenced.detail}
    verdict = fenced
    # Most answers of models that were not trained to chat have no fences.
    if problem.program(text) != fenced_program:
        verdict = problem.judge(text, task.timeout)
    return {
        "correct": verdict.passed,
        "detail": verdict.detail,
        "correct_fenced": fenced.passed,
        "detail_fenced": fenced.detail,
    }


def _shares(task: ProgramTask, passed: Sequence[bool]) -> Json:
    """Return `accuracy`, `se` and `pass@k` of programs: `task.samples` of each problem."""
    starts = range(0, len(passed), task.samples)
    correct = [sum(passed[start : start + task.samples]) for start in starts]
    # Problems are the sampling unit: programs for the same problem are not independent.
    share, error = mean_and_error([count / task.samples for count in correct])
    shares: Json = {"accuracy": share, "se": error}
    for k in _PASS_AT:
        if k <= task.samples:
            estimates = [pass_at_k(task.samples, count, k) for count in correct]
            shares[f"pass@{k}"] = sum(estimates) / len(correct)
    return shares


for _kind in PROBLEMS:
    TASK_KINDS.register(_kind, TaskKind(ProgramTask, run))
