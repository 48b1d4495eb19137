"""Answers to instructions, written to a file for a judge."""

from pydantic import Field

from jax_ordermerge.config.evaluation import TASK_KINDS, FileTask, GeneratedTask, TaskKind


class OutputTask(FileTask, GeneratedTask):
    """A task whose answers are scored by a judge outside the run."""

    stop: tuple[str, ...] = Field((), description="an answer ends before the first of these texts")


TASK_KINDS.register("alpaca_outputs", TaskKind(OutputTask))
