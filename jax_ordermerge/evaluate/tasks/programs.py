"""Programs that must pass the tests of their file in a sandbox."""

from typing import Annotated

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveInt

from jax_ordermerge.config.evaluation import TASK_KINDS, FileTask, GeneratedTask, TaskKind


class ProgramTask(FileTask, GeneratedTask):
    """A task for which a model writes programs."""

    samples: PositiveInt = Field(
        1, description="programs drawn per problem, for pass@1, pass@10 and pass@100"
    )
    temperature: NonNegativeFloat = Field(0.0, description="0 is greedy")
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    @pydantic.model_validator(mode="after")
    def _draws_need_a_temperature(self) -> "ProgramTask":
        for name in ("samples", "top_k", "top_p"):
            default = ProgramTask.model_fields[name].default
            if getattr(self, name) != default and not self.temperature:
                raise ValueError(
                    f"{name} needs programs that are drawn; give a temperature above 0"
                )
        return self


for _kind in ("humaneval", "mbpp"):
    TASK_KINDS.register(_kind, TaskKind(ProgramTask))
