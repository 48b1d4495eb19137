"""The evaluation of a model on a task. What a task does is up to its kind, see `tasks/`."""

from jax_ordermerge.config import Data
from jax_ordermerge.config.evaluation import TASK_KINDS, Task
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.evaluate.eval_model import EvalModel, NotFiniteError, TaskResult
from jax_ordermerge.evaluate.inputs import TaskInputs


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
