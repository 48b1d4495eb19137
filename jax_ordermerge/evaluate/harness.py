"""Tasks: a model's answers, choices and programs, scored against what is right."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Data
from jax_ordermerge.config.evaluation import Task
from jax_ordermerge.data import source
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import answers, decode, likelihood, programs, prompts
from jax_ordermerge.evaluate.sampling import GREEDY, Sampling
from jax_ordermerge.evaluate.tasks.answers import AnswerTask
from jax_ordermerge.evaluate.tasks.choices import ChoiceTask
from jax_ordermerge.evaluate.tasks.outputs import OutputTask
from jax_ordermerge.evaluate.tasks.programs import ProgramTask
from jax_ordermerge.evaluate.tasks.texts import TextTask
from jax_ordermerge.tree import Tree, size

SCORES: dict[str, Callable[[str, str], bool]] = {
    "exact": answers.exact,
    "gsm8k": answers.gsm8k,
    "gsm8k_cot": answers.gsm8k_cot,
    "gsm8k_flexible": answers.gsm8k_flexible,
    "math": answers.math,
    "number": answers.number,
}
# kinds whose answers are read in another way too
ALSO: dict[str, dict[str, Callable[[str, str], bool]]] = {
    kind: {"flexible": answers.gsm8k_flexible} for kind in ("gsm8k", "gsm8k_cot")
}

Prompts = Sequence[Sequence[int]]
Generate = Callable[..., list[str]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, as tasks see it.

    Attributes:
        tokenizer: of the model.
        generate: see `generator`.
        score: pairs of context and continuation -> log-probabilities, and whether each is greedy.
        positions: how many tokens it reads at most.
    """

    tokenizer: Any
    generate: Generate
    score: likelihood.Score
    positions: int

    @property
    def start(self) -> int:
        """The token before a text that is scored: beginning of sequence, or its end where the tokenizer has none.

        Raises:
            UserError: it has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UserError(
            "the tokenizer names neither a beginning nor an end of sequence; texts could not be scored from their first token"
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; see `prompts.encode`."""
        return prompts.encode(self.tokenizer, text)


def run(
    task: Task, subject: Subject, data: Data, *, test: Examples | None = None, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Put a model to a task.

    Args:
        task: any.
        subject: the model.
        data: the config's section.
        test: examples of `data.test` where they are loaded already.
        seed: of the run.

    Returns:
        a summary and a row for each item: see `run_task`, `run_programs`, `run_outputs`, `likelihood.run_choices`,
        `likelihood.run_perplexity`.

    Raises:
        UserError: the task's data are absent, or do not fit it.
    """
    if isinstance(task, (ProgramTask, TextTask, OutputTask)):
        assert task.data is not None
        rows = source.load(task.data, "test")
        if isinstance(task, ProgramTask):
            return run_programs(task, rows, subject.encode, subject.generate, seed=seed)
        if isinstance(task, OutputTask):
            instructed = functools.partial(
                prompts.instruction_tokens, data=data, tokenizer=subject.tokenizer
            )
            return run_outputs(task, rows[: task.limit], instructed, subject.generate)
    if isinstance(task, (TextTask, ChoiceTask)):
        settings: dict[str, Any] = {"start": subject.start, "positions": subject.positions}
        if isinstance(task, TextTask):
            return likelihood.run_perplexity(
                task, rows[: task.limit], subject.encode, subject.score, **settings
            )
        asked = prompts.questions(task, data, subject.tokenizer, seed=seed)
        return likelihood.run_choices(task, asked, subject.encode, subject.score, **settings)
    assert isinstance(task, AnswerTask)
    if task.prompt is not None or task.shots:
        return run_task(
            task, prompts.examples(task, data, subject.tokenizer, seed=seed), subject.generate
        )
    if task.data is not None or test is None:
        own = (
            data
            if task.data is None
            else data.model_copy(update={"test": task.data, "test_limit": None})
        )
        test = source.load_examples(own, subject.tokenizer, "test", seed=seed)
    if test is None:
        raise UserError(
            f"evaluation task {task.name} has no data; set data.test or the task's own data"
        )
    return run_task(task, test, subject.generate)


def generator(
    config: ModelConfig, params: Tree, tokenizer: Any, *, batch: int, dtype: str
) -> Generate:
    """Return `(prompts, max_new_tokens, sampling=GREEDY, names=None) -> texts`: completions of tokenized prompts, see `decode.generate`.

    Args:
        config: the model.
        params: its parameters.
        tokenizer: of the model; special tokens are left out of the texts.
        batch: rows of a program.
        dtype: of the products, `"float32"` or `"bfloat16"`.

    Raises:
        UserError: the model names no end-of-sequence token.
    """
    settings: dict[str, Any] = {"eos_ids": _ends(config, tokenizer), "dtype": dtype, "batch": batch}

    def generate(
        prompts: Prompts,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        names: Sequence[str | int] | None = None,
    ) -> list[str]:
        drawn: dict[str, Any] = {"sampling": sampling, "names": names}
        rows = decode.generate(
            config, params, prompts, max_new_tokens=max_new_tokens, **drawn, **settings
        )
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    return generate


def generators(
    config: ModelConfig,
    population: Tree,
    tokenizer: Any,
    *,
    batch: int,
    dtype: str,
    mesh: Mesh | None = None,
) -> list[Generate]:
    """Return for each of several models what `generator` returns. They write together, in one program, as soon as one is asked.

    The others then find their answers to the same prompts ready; they are kept as long as these functions are.

    Args:
        config: the model.
        population: parameters with a leading member axis, see `decode.generate_members`.
        tokenizer, batch, dtype: see `generator`.
        mesh: where the parameters are; None is that of `jax.set_mesh`.

    Raises:
        UserError: the model names no end-of-sequence token.
    """
    settings: dict[str, Any] = {"eos_ids": _ends(config, tokenizer), "dtype": dtype, "batch": batch}
    written: dict[Any, list[list[str]]] = {}

    def generate(
        member: int,
        prompts: Prompts,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        names: Sequence[str | int] | None = None,
    ) -> list[str]:
        asked = (
            tuple(map(tuple, prompts)),
            max_new_tokens,
            sampling,
            None if names is None else tuple(names),
        )
        if asked not in written:
            drawn: dict[str, Any] = {"sampling": sampling, "names": names}
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                found = decode.generate_members(
                    config, population, prompts, max_new_tokens=max_new_tokens, **drawn, **settings
                )
            written[asked] = [
                [tokenizer.decode(row, skip_special_tokens=True) for row in rows] for rows in found
            ]
        return written[asked][member]

    return [functools.partial(generate, member) for member in range(size(population))]


def _ends(config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    ends = config.eos_token_ids or (
        (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()
    )
    if not ends:
        raise UserError(
            "neither config.json nor the tokenizer names an end-of-sequence token; generation could not stop"
        )
    return tuple(ends)


def run_task(
    task: AnswerTask, examples: Examples, generate: Generate
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let a model answer the examples of a task.

    Args:
        task: its kind says how answers are scored.
        examples: generation starts from the tokens before an example's last response.
        generate: see `generator`.

    Returns:
        `{"accuracy", "se", "n"}` and, for each example, `{"id", "prompt", "reference", "answer", "correct"}`. GSM8K's kinds have `flexible`,
        `flexible_se` and `correct_flexible` too: the same answers by their last number.

    Example:
        >>> import numpy as np
        >>> from jax_ordermerge.data.examples import Ragged
        >>> tokens, mask = (
        ...     Ragged.of([[1, 5, 6], [1, 7, 8]], np.int32),
        ...     Ragged.of([[0, 0, 1], [0, 0, 1]], np.bool_),
        ... )
        >>> two = Examples(tokens, mask, np.arange(2), prompts=["a", "b"], responses=["A", "B"])
        >>> run_task(AnswerTask(name="echo", kind="exact"), two, lambda prompts, n: ["A", "no"])[0]
        {'accuracy': 0.5, 'se': 0.3535533905932738, 'n': 2}
    """
    rows = range(min(task.limit or len(examples), len(examples)))
    texts = [
        answers.ended(text, task.stop)
        for text in generate([examples.prompt(row).tolist() for row in rows], task.max_new_tokens)
    ]
    correct = [
        SCORES[task.kind](text, examples.responses[row])
        for row, text in zip(rows, texts, strict=True)
    ]
    items: list[dict[str, Any]] = [
        {
            "id": int(examples.ids[row]),
            "prompt": examples.prompts[row],
            "reference": examples.responses[row],
            "answer": text,
            "correct": right,
        }
        for row, text, right in zip(rows, texts, correct, strict=True)
    ]
    mean, error = answers.accuracy(correct)
    summary: dict[str, Any] = {"accuracy": mean, "se": error, "n": len(correct)}
    for name, right in ALSO.get(task.kind, {}).items():
        others = [right(item["answer"], item["reference"]) for item in items]
        summary[name], summary[f"{name}_se"] = answers.accuracy(others)
        for item, one in zip(items, others, strict=True):
            item[f"correct_{name}"] = one
    return summary, items


def run_outputs(
    task: OutputTask,
    rows: Sequence[prompts.Row],
    encode: Callable[[prompts.Row], list[int]],
    generate: Generate,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let a model follow instructions. Nothing is scored: the rows are for a judge, see `judge.py`.

    Args:
        task: of kind `alpaca_outputs`.
        rows: with the column `instruction`, and perhaps `input` and `dataset`.
        encode: row -> tokens of what the model is asked.
        generate: see `generator`.

    Returns:
        `{"n"}` and, for each instruction, `{"instruction", "output", "dataset"}` as AlpacaEval reads them, without the generator's name.

    Example:
        >>> run_outputs(
        ...     OutputTask(name="a", kind="alpaca_outputs", data="x"),
        ...     [{"instruction": "Greet."}],
        ...     lambda row: [1],
        ...     lambda p, n: ["Hi"],
        ... )
        ({'n': 1}, [{'instruction': 'Greet.', 'output': 'Hi', 'dataset': 'a'}])
    """
    texts = generate([encode(row) for row in rows], task.max_new_tokens)
    items: list[dict[str, Any]] = []
    for row, text in zip(rows, texts, strict=True):
        whole = (
            f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        )
        items.append(
            {
                "instruction": whole,
                "output": answers.ended(text, task.stop),
                "dataset": row.get("dataset", task.name),
            }
        )
    return {"n": len(items)}, items


def run_programs(
    task: ProgramTask,
    rows: Sequence[programs.Row],
    encode: Callable[[str], list[int]],
    generate: Generate,
    *,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let a model write programs, and run their tests in the sandbox.

    Args:
        task: of a kind of `programs.PROGRAMS`; with `samples` above 1 programs are drawn.
        rows: of its file, as published.
        encode: text -> tokens, with what the model needs at the start.
        generate: see `generator`.
        seed: of the draws.

    Returns:
        `{"accuracy", "se", "n", "isolation", "pass@k"...}`, where the accuracy is pass@1, and for each program what `run_task` gives,
        with `detail` of its verdict.
    """
    problems = programs.PROGRAMS[task.kind](rows)[: task.limit]
    if not problems:
        raise UserError(f"evaluation task {task.name} has no problems, check its data and limit")
    asked = [encode(problem.prompt) for problem in problems for _ in range(task.samples)]
    names = [f"{problem.id}/{sample}" for problem in problems for sample in range(task.samples)]
    texts = generate(
        asked, task.max_new_tokens, Sampling(task.temperature, task.top_k, task.top_p, seed), names
    )
    owners = [problem for problem in problems for _ in range(task.samples)]
    verdicts = [problem.judge(text) for problem, text in zip(owners, texts, strict=True)]
    items: list[dict[str, Any]] = [
        {
            "id": name,
            "prompt": problem.prompt,
            "reference": problem.reference,
            "answer": text,
            "correct": verdict.passed,
            "detail": verdict.detail,
        }
        for name, problem, text, verdict in zip(names, owners, texts, verdicts, strict=True)
    ]
    right = [
        sum(one.passed for one in verdicts[at : at + task.samples])
        for at in range(0, len(verdicts), task.samples)
    ]
    shares = [count / task.samples for count in right]
    mean, count = sum(shares) / len(shares), len(shares)
    error = (sum((share - mean) ** 2 for share in shares) / max(count - 1, 1) / count) ** 0.5
    ks = [k for k in (1, 10, 100) if k <= task.samples]
    passed = {
        f"pass@{k}": sum(programs.pass_at_k(task.samples, one, k) for one in right) / count
        for k in ks
    }
    return {
        "accuracy": mean,
        "se": error,
        "n": count,
        "isolation": verdicts[0].isolation,
        **passed,
    }, items
