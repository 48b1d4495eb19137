"""The evaluation of a model on a task. What a task does is up to its kind, see `tasks/`."""

from jax_ordermerge.config import Data
from jax_ordermerge.config.evaluation import TASK_KINDS, Task
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.evaluate.eval_model import EvalModel, ItemExample, NotFiniteError, TaskResult
from jax_ordermerge.evaluate.inputs import TaskInputs

_LONGEST_TEXT = 2000  # characters of an example that are shown


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
