"""Perplexity of texts."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from jax_ordermerge.config.evaluation import TASK_KINDS, FileTask, TaskKind
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.eval_model import EvalModel, TaskResult
from jax_ordermerge.evaluate.likelihood import rolling_logprobs
from jax_ordermerge.evaluate.metrics import perplexity, ratio_and_error
from jax_ordermerge.evaluate.prompts import render
from jax_ordermerge.json_types import Json, JsonRow

if TYPE_CHECKING:
    from jax_ordermerge.evaluate.inputs import TaskInputs


class TextTask(FileTask):
    """A task that measures how likely a model finds texts."""

    text: str = Field("{{text}}", description="template of the text")


def run(task: TextTask, model: EvalModel, inputs: "TaskInputs") -> TaskResult:
    """Measure the perplexity of a model on the texts of a file."""
    return measure(task, inputs.rows(task)[: task.limit], model)


def measure(task: TextTask, rows: Sequence[JsonRow], model: EvalModel) -> TaskResult:
    """Measure the perplexity of a model on texts of any length, each by itself.

    Returns:
        `word_perplexity`, `byte_perplexity` and `token_perplexity`: exp of the negative
        log-probability per word, byte or token over all texts. `bits_per_byte` with `se`, where
        texts are the sampling unit (None for one text); `words`, `bytes`, `tokens` and `n`. Per
        text `id`, `logp`, `words`, `bytes` and `tokens`. White space separates words; tokens are
        the predicted ones.

    Raises:
        UserError: no text has a token.

    Example:
        >>> class Letters:
        ...     bos_token, bos_token_id = None, 0
        ...
        ...     def __call__(self, text, **options):
        ...         return {"input_ids": [ord(letter) for letter in text]}
        >>> half = lambda pairs: ([-math.log(2) * len(pair[1]) for pair in pairs], [])
        >>> task = TextTask(name="t", kind="perplexity", data="x")
        >>> rows = [{"text": "a b"}, {"text": "cd"}]
        >>> summary, items, _ = measure(task, rows, EvalModel(Letters(), None, half, 2))
        >>> summary["words"], summary["tokens"], round(summary["byte_perplexity"], 6)
        (3, 5, 2.0)
    """
    # Perplexities are of all texts together: a mean over texts would give short ones more weight.
    texts = [render(task.text, row) for row in rows]
    # Each text by itself: joined, the first words of one would be predicted from another.
    tokens = [model.encode(text) for text in texts]
    logprobs = rolling_logprobs(model.score, tokens, model.start, model.positions)
    items: list[Json] = [
        {
            "id": number,
            "logp": logprobs[number],
            # the count of lm-evaluation-harness, in which a text has one word more than gaps
            "words": len(re.split(r"\s+", text)),
            "bytes": len(text.encode()),
            "tokens": len(tokens[number]),
        }
        for number, text in enumerate(texts)
    ]
    counts = {name: sum(item[name] for item in items) for name in ("words", "bytes", "tokens")}
    if not counts["bytes"] or not counts["tokens"]:
        raise UserError(f"evaluation task {task.name} has no text, check its data and limit")
    total = math.fsum(logprobs)
    summary: Json = {
        f"{name[:-1]}_perplexity": perplexity(-total / count) for name, count in counts.items()
    }
    # Bits per byte, not per token, is what models with other tokenizers can be compared by.
    nats, error = ratio_and_error([-x for x in logprobs], [item["bytes"] for item in items])
    bits = None if error is None else error / math.log(2)
    summary |= {"bits_per_byte": nats / math.log(2), "se": bits}
    return TaskResult(summary | counts | {"n": len(items)}, items)


TASK_KINDS.register("perplexity", TaskKind(TextTask, run, result="perplexity"))
