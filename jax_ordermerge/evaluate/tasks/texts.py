"""Perplexity of texts."""

from pydantic import Field

from jax_ordermerge.config.evaluation import TASK_KINDS, FileTask, TaskKind


class TextTask(FileTask):
    """A task that measures how likely a model finds texts."""

    text: str = Field("{{text}}", description="template of the text")


TASK_KINDS.register("perplexity", TaskKind(TextTask))
