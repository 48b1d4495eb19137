"""Tasks by generation: prompts in, answers out, scored against references."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Task
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import answers, decode, programs
from jax_ordermerge.evaluate.sampling import GREEDY, Sampling
from jax_ordermerge.tree import Tree, size

SCORES: dict[str, Callable[[str, str], bool]] = {
    "exact": answers.exact,
    "gsm8k": answers.gsm8k,
    "gsm8k_flexible": answers.gsm8k_flexible,
    "math": answers.math,
    "number": answers.number,
}

Prompts = Sequence[Sequence[int]]
Generate = Callable[..., list[str]]


def generator(config: ModelConfig, params: Tree, tokenizer: Any, *, batch: int, dtype: str) -> Generate:
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
        prompts: Prompts, max_new_tokens: int, sampling: Sampling = GREEDY, names: Sequence[str | int] | None = None
    ) -> list[str]:
        drawn: dict[str, Any] = {"sampling": sampling, "names": names}
        rows = decode.generate(config, params, prompts, max_new_tokens=max_new_tokens, **drawn, **settings)
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    return generate


def generators(
    config: ModelConfig, population: Tree, tokenizer: Any, *, batch: int, dtype: str, mesh: Mesh | None = None
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
        asked = (tuple(map(tuple, prompts)), max_new_tokens, sampling, None if names is None else tuple(names))
        if asked not in written:
            drawn: dict[str, Any] = {"sampling": sampling, "names": names}
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                found = decode.generate_members(config, population, prompts, max_new_tokens=max_new_tokens, **drawn, **settings)
            written[asked] = [[tokenizer.decode(row, skip_special_tokens=True) for row in rows] for rows in found]
        return written[asked][member]

    return [functools.partial(generate, member) for member in range(size(population))]


def _ends(config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    ends = config.eos_token_ids or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    if not ends:
        raise UserError("neither config.json nor the tokenizer names an end-of-sequence token; generation could not stop")
    return tuple(ends)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a prompt, after the beginning-of-sequence token where the tokenizer has one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + tokenizer(text, add_special_tokens=False)["input_ids"]


def run_task(task: Task, examples: Examples, generate: Generate) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let a model answer the examples of a task.

    Args:
        task: its kind says how answers are scored.
        examples: generation starts from the tokens before an example's last response.
        generate: see `generator`.

    Returns:
        `{"accuracy", "se", "n"}` and, for each example, `{"id", "prompt", "reference", "answer", "correct"}`.

    Example:
        >>> import numpy as np
        >>> from jax_ordermerge.data.examples import Ragged
        >>> tokens, mask = Ragged.of([[1, 5, 6], [1, 7, 8]], np.int32), Ragged.of([[0, 0, 1], [0, 0, 1]], np.bool_)
        >>> two = Examples(tokens, mask, np.arange(2), prompts=["a", "b"], responses=["A", "B"])
        >>> run_task(Task(name="echo"), two, lambda prompts, n: ["A", "no"])[0]
        {'accuracy': 0.5, 'se': 0.3535533905932738, 'n': 2}
    """
    rows = range(min(task.limit or len(examples), len(examples)))
    prompts = [examples.prompt(row).tolist() for row in rows]
    texts = generate(prompts, task.max_new_tokens)
    correct = [SCORES[task.kind](text, examples.responses[row]) for row, text in zip(rows, texts, strict=True)]
    items = [
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
    return {"accuracy": mean, "se": error, "n": len(correct)}, items


def run_programs(
    task: Task, rows: Sequence[programs.Row], encode: Callable[[str], list[int]], generate: Generate, *, seed: int = 0
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
    prompts = [encode(problem.prompt) for problem in problems for _ in range(task.samples)]
    names = [f"{problem.id}/{sample}" for problem in problems for sample in range(task.samples)]
    texts = generate(prompts, task.max_new_tokens, Sampling(task.temperature, task.top_k, task.top_p, seed), names)
    owners = [problem for problem in problems for _ in range(task.samples)]
    verdicts = [problem.judge(text) for problem, text in zip(owners, texts, strict=True)]
    items = [
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
    right = [sum(one.passed for one in verdicts[at : at + task.samples]) for at in range(0, len(verdicts), task.samples)]
    shares = [count / task.samples for count in right]
    mean, count = sum(shares) / len(shares), len(shares)
    error = (sum((share - mean) ** 2 for share in shares) / max(count - 1, 1) / count) ** 0.5
    ks = [k for k in (1, 10, 100) if k <= task.samples]
    passed = {f"pass@{k}": sum(programs.pass_at_k(task.samples, one, k) for one in right) / count for k in ks}
    return {"accuracy": mean, "se": error, "n": count, "isolation": verdicts[0].isolation, **passed}, items
