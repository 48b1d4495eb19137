"""Tasks by generation: prompts in, answers out, scored against references."""

from collections.abc import Callable, Sequence
from typing import Any

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Task
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import answers, decode
from jax_ordermerge.tree import Tree

SCORES: dict[str, Callable[[str, str], bool]] = {"exact": answers.exact, "gsm8k": answers.gsm8k}

Generate = Callable[[Sequence[Sequence[int]], int], list[str]]


def generator(config: ModelConfig, params: Tree, tokenizer: Any, *, batch: int, dtype: str) -> Generate:
    """Return `(prompts, max_new_tokens) -> texts`: greedy completions of tokenized prompts.

    Args:
        config: the model.
        params: its parameters.
        tokenizer: of the model; special tokens are left out of the texts.
        batch: rows of a program.
        dtype: of the products, `"float32"` or `"bfloat16"`.

    Raises:
        UserError: the model names no end-of-sequence token.
    """
    eos = config.eos_token_ids or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    if not eos:
        raise UserError("neither config.json nor the tokenizer names an end-of-sequence token; generation could not stop")

    def generate(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        rows = decode.generate(config, params, prompts, max_new_tokens=max_new_tokens, eos_ids=eos, dtype=dtype, batch=batch)
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    return generate


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
