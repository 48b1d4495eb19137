"""Tasks whose answers are compared with a reference: exact match, GSM8K, MATH, numbers."""

import pydantic
from pydantic import Field

from jax_ordermerge.config.evaluation import TASK_KINDS, GeneratedTask, ShotsTask, TaskKind


class AnswerTask(GeneratedTask, ShotsTask):
    """A task that a model answers in words.

    exact: the whole answer; gsm8k: the number after ####; gsm8k_cot: after "The answer is";
    gsm8k_flexible, number: the last number; math: the last boxed answer.
    """

    prompt: str | None = Field(
        None,
        description="template of the question; by default rows are read and templated as the"
        " training data are",
    )
    response: str | None = Field(
        None, description="template of what follows the prompt in a shot (' {{answer}}')"
    )
    reference: str | None = Field(
        None,
        description="template of the right answer; by default the response without spaces around"
        " it",
    )
    stop: tuple[str, ...] = Field((), description="an answer ends before the first of these texts")

    @pydantic.model_validator(mode="after")
    def _templates_fit(self) -> "AnswerTask":
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response go together; give both or neither")
        if self.reference is not None and self.prompt is None:
            raise ValueError(
                "reference goes with a task that has a prompt; remove it or give prompt and response"
            )
        return self


for _kind in ("exact", "gsm8k", "gsm8k_flexible", "gsm8k_cot", "math", "number"):
    TASK_KINDS.register(_kind, TaskKind(AnswerTask))
