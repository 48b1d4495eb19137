"""The evaluation of a model on a task. What a task does is up to its kind, see `tasks/`."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Data
from jax_ordermerge.config.evaluation import TASK_KINDS, Task
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.evaluate import decode
from jax_ordermerge.evaluate.eval_model import EvalModel, ItemExample, NotFiniteError, TaskResult
from jax_ordermerge.evaluate.inputs import TaskInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_TEXT = 2000  # characters of an example that are shown


class _Reached(Exception):
    """A task has read and checked its data, and asks the model."""


def check(
    task: Task,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    data: Data,
    *,
    test: Examples | None = None,
    seed: int = 0,
) -> None:
    """Check the data of a task, up to the first question to a model, which need not exist yet.

    Args:
        task: of any kind.
        config: of the model.
        tokenizer: of the model.
        data, test, seed: see `run`.

    Raises:
        UserError: the data of the task are absent, or do not fit it.
    """

    def reach(
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: object = None,
        names: object = None,
    ) -> list[str]:
        decode.check_prompts(config, prompts, max_new_tokens)
        raise _Reached

    def score(_: object) -> NoReturn:
        raise _Reached

    # No hook of the kinds: what a task reads and refuses is known to its own `run` alone.
    with contextlib.suppress(_Reached):
        model = EvalModel(tokenizer, reach, score, config.context_length)
        run(task, model, data, test=test, seed=seed)


def run(
    task: Task, model: EvalModel, data: Data, *, test: Examples | None = None, seed: int = 0
) -> TaskResult:
    """Evaluate a model on a task.

    Args:
        task: of any kind.
        model: the model.
        data: section `data` of the config.
        test: examples of `data.test` if they are loaded already.
        seed: of the run.

    Raises:
        UserError: the data of the task are absent, or do not fit it.
        NotFiniteError: the model computes NaN.
    """
    # No `if` on the kind: a kind that is registered elsewhere runs like the ones here.
    inputs = TaskInputs(data, model.tokenizer, test, seed)
    try:
        result: TaskResult = TASK_KINDS[task.kind].run(task, model, inputs)
    except NotFiniteError as error:
        raise error.named(model=f"{model.name}: evaluation task {task.name}") from error
    return result


def format_example(example: ItemExample, model: EvalModel, task: str) -> str:
    """Return the prompt of an item as the model saw it, its answer and the reference, as text.

    Example:
        >>> class Letters:
        ...     def decode(self, tokens):
        ...         return "".join(map(chr, tokens))
        >>> model = EvalModel(Letters(), None, None, 8, "base")
        >>> print(format_example(ItemExample([81, 58, 10, 65, 58], "3 ", "4"), model, "sums"))
        sums, one item of base:
          prompt:    Q:
                     A:
          answer:    '3 '
          reference: 4
    """
    prompt = str(model.tokenizer.decode(list(example.tokens)))
    texts = {"prompt": prompt, "answer": example.answer, "reference": example.reference}
    lines = [f"{task}, one item of {model.name}:"]
    for name, text in texts.items():
        if text is None:
            continue
        if len(text) > _LONGEST_TEXT:
            half = _LONGEST_TEXT // 2
            text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
        # what cannot be seen at the end of a line is often the mistake
        if not text or text != text.strip():
            text = repr(text)
        label = f"  {f'{name}:':<10} "
        lines.append(label + text.replace("\n", "\n" + " " * len(label)))
    return "\n".join(lines)
