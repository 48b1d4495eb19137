"""Tasks whose answers are programs: HumanEval and MBPP. Rows of their files in; prompts, and verdicts of the sandbox, out.

Sources: Chen et al., "Evaluating large language models trained on code", 2021, https://arxiv.org/abs/2107.03374 (HumanEval, pass@k);
Austin et al., "Program synthesis with large language models", 2021, https://arxiv.org/abs/2108.07732 (MBPP, its prompt and its three
shots).
"""

import ast
import builtins
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import sandbox
from jax_ordermerge.evaluate.answers import ended

Row = Mapping[str, Any]
_SHOTS = (2, 3, 4)  # task_id of the examples that the paper shows before each problem


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: its `task_id`.
        prompt: what the model continues.
        before: source that the continuation completes to a program.
        stops: texts that end a continuation.
        tests, names, setup: see `sandbox.judge`.
        reference: a right continuation.
    """

    id: str
    prompt: str
    before: str
    stops: tuple[str, ...]
    tests: str
    names: tuple[str, ...]
    setup: str
    reference: str

    def program(self, text: str) -> str:
        """Return the program that a continuation makes: what follows the first stop is not read."""
        return self.before + ended(text, self.stops)

    def judge(self, text: str, timeout: float = 10.0) -> sandbox.Verdict:
        """Run the tests on a continuation."""
        return sandbox.judge(
            self.program(text), self.tests, self.names, setup=self.setup, timeout=timeout
        )


def humaneval(rows: Sequence[Row]) -> list[Problem]:
    """Return the problems of HumanEval: the model completes a function from its head, and stops at the next thing at top level.

    Raises:
        UserError: a column is missing.

    Example:
        >>> row = {
        ...     "task_id": "t/0",
        ...     "prompt": "def f(x):\\n    ''\\n",
        ...     "entry_point": "f",
        ...     "canonical_solution": "    return x\\n",
        ... }
        >>> one = humaneval(
        ...     [row | {"test": "def check(candidate):\\n    assert candidate(1) == 1\\n"}]
        ... )[0]
        >>> one.judge("    return x\\nprint(1)").passed, one.judge("    return 2 * x\\n").passed
        (True, False)
    """
    return [
        Problem(
            id=str(_column(row, "task_id", "humaneval")),
            prompt=_column(row, "prompt", "humaneval"),
            before=row["prompt"],
            stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
            tests=f"{_column(row, 'test', 'humaneval')}\ncheck({_column(row, 'entry_point', 'humaneval')})",
            names=(row["entry_point"],),
            setup=row["prompt"],
            reference=row.get("canonical_solution", ""),
        )
        for row in rows
    ]


def mbpp(rows: Sequence[Row]) -> list[Problem]:
    """Return the problems of MBPP, with the problems 2, 3 and 4 shown first where the rows have them; these are not asked.

    Tests that build objects of classes of the answer cannot be run beside it, and fail.

    Raises:
        UserError: a column is missing.

    Example:
        >>> row = {
        ...     "task_id": 11,
        ...     "text": "Double it.",
        ...     "code": "def f(x): return 2 * x",
        ...     "test_list": ["assert f(2) == 4"],
        ... }
        >>> one = mbpp([row])[0]
        >>> print(one.prompt)
        You are an expert Python programmer, and here is your task: Double it. Your code should pass these tests:
        <BLANKLINE>
        assert f(2) == 4
        [BEGIN]
        <BLANKLINE>
        >>> one.judge("def f(x): return 2 * x\\n[DONE]\\n").passed
        True
    """

    def asked(row: Row) -> str:
        text = (
            row["prompt"] if "text" not in row and "prompt" in row else _column(row, "text", "mbpp")
        )
        tests = "\n".join(_column(row, "test_list", "mbpp"))
        return f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"

    shown = "".join(
        f"{asked(row)}{row['code']}\n[DONE]\n" for row in rows if row.get("task_id") in _SHOTS
    )
    problems = []
    for row in rows:
        if row.get("task_id") in _SHOTS:
            continue
        setup = "\n".join([*row.get("test_imports", ()), row.get("test_setup_code", "")])
        tests = "\n".join(_column(row, "test_list", "mbpp"))
        problems.append(
            Problem(
                id=str(_column(row, "task_id", "mbpp")),
                prompt=shown + asked(row),
                before="",
                stops=("[DONE]",),
                tests=tests,
                names=_called(tests, setup),
                setup=setup,
                reference=_column(row, "code", "mbpp"),
            )
        )
    return problems


PROGRAMS: dict[str, Callable[[Sequence[Row]], list[Problem]]] = {
    "humaneval": humaneval,
    "mbpp": mbpp,
}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k draws is right: 1 - C(n - c, k) / C(n, k).

    Args:
        samples: n, programs drawn.
        right: c, of them right.
        k: at most n.

    Raises:
        UserError: k above n.

    Example:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 4, 2)
        (0.25, 0.5, 1.0)
    """
    if k > samples:
        raise UserError(
            f"pass@{k} needs at least {k} samples a problem, got {samples}; raise samples"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def _called(tests: str, setup: str) -> tuple[str, ...]:
    """Return the names that tests read and neither they, their setup nor Python define."""

    def names(source: str, kind: type[ast.expr_context]) -> set[str]:
        return {
            node.id
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Name) and isinstance(node.ctx, kind)
        }

    defined = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(f"{setup}\n{tests}"))
        for alias in getattr(node, "names", ())
        if isinstance(alias, ast.alias)
    }
    known = defined | names(f"{setup}\n{tests}", ast.Store) | set(dir(builtins))
    return tuple(sorted(names(f"{setup}\n{tests}", ast.Load) - known))


def _column(row: Row, name: str, kind: str) -> Any:
    if name not in row:
        raise UserError(
            f"a task of kind {kind} reads the column {name}, its data has {', '.join(row)}; give the file as published"
        )
    return row[name]
