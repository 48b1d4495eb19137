"""Multiple choice by log-likelihood."""

from pydantic import Field

from jax_ordermerge.config.evaluation import TASK_KINDS, FileTask, ShotsTask, TaskKind


class ChoiceTask(FileTask, ShotsTask):
    """A task in which a model chooses the likeliest of several texts."""

    prompt: str = Field(
        "Question: {{question}}\nAnswer:", description="template of the text before a choice"
    )
    choices: str = Field("{{choices}}", description="template of the list of choices")
    answer: str = Field(
        "{{answer}}", description="template of the right choice: its text, or its number from 0"
    )
    delimiter: str = Field(" ", description="text between prompt and choice")


TASK_KINDS.register("multiple_choice", TaskKind(ChoiceTask))
