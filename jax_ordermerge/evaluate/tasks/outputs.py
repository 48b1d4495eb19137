"""Answers to instructions, written to a file for a judge."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from jax_ordermerge.config.evaluation import TASK_KINDS, FileTask, GeneratedTask, TaskKind
from jax_ordermerge.evaluate.eval_model import EvalModel, ItemExample, TaskResult, name_items
from jax_ordermerge.evaluate.matching import truncate
from jax_ordermerge.json_types import Json, JsonRow

if TYPE_CHECKING:
    from jax_ordermerge.evaluate.inputs import TaskInputs


class OutputTask(FileTask, GeneratedTask):
    """A task whose answers are scored by a judge outside the run."""

    stop: tuple[str, ...] = Field(
        (), description="an answer ends before the first of these texts", examples=[["Question:"]]
    )


def run(task: OutputTask, model: EvalModel, inputs: "TaskInputs") -> TaskResult:
    """Let a model follow the instructions of a file."""
    rows = inputs.rows(task)[: task.limit]
    prompts = [inputs.instruction_tokens(row) for row in rows]
    return follow(task, rows, prompts, model)


def follow(
    task: OutputTask, rows: Sequence[JsonRow], prompts: Sequence[Sequence[int]], model: EvalModel
) -> TaskResult:
    """Let a model follow instructions. Nothing is scored here; see `judge.py`.

    Args:
        task: says how long an answer is.
        rows: with the column `instruction`, and perhaps `input` and `dataset`.
        prompts: tokens of each instruction.
        model: writes the answers.

    Returns:
        `n`, and per instruction `instruction`, `output` and `dataset` as AlpacaEval reads them. It
        reads the name of the model as `generator`, too, which the caller knows.

    Example:
        >>> task = OutputTask(name="a", kind="alpaca_outputs", data="x")
        >>> model = EvalModel(None, lambda prompts, n: ["Hi"], None, 8)
        >>> follow(task, [{"instruction": "Greet."}], [[1]], model).items
        [{'instruction': 'Greet.', 'output': 'Hi', 'dataset': 'a'}]
    """
    items: list[Json] = []
    with name_items(range(len(rows))):
        texts = model.generate(prompts, task.max_new_tokens)
    for row, text in zip(rows, texts, strict=True):
        instruction = row["instruction"]
        # AlpacaEval has one field for both.
        if row.get("input"):
            instruction = f"{instruction}\n\n{row['input']}"
        items.append(
            {
                "instruction": instruction,
                "output": truncate(text, task.stop),
                # AlpacaEval reports by it
                "dataset": row.get("dataset", task.name),
            }
        )
    return TaskResult({"n": len(items)}, items, ItemExample(prompts[0], items[0]["output"]))


TASK_KINDS.register("alpaca_outputs", TaskKind(OutputTask, run, result="outputs"))
