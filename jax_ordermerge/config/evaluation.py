"""The section `evaluation`: tasks, and the kinds of tasks that can be chosen.

The kinds are registered by the modules of `jax_ordermerge.evaluate.tasks`, one module for each
family of kinds. They bring their settings with them.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt, SerializeAsAny

from jax_ordermerge.config.names import FileName
from jax_ordermerge.config.section import FREE_TO_CHANGE, Section, parse, registered
from jax_ordermerge.json_types import JsonValue
from jax_ordermerge.registry import Registry

RESULTS: Final = "results"  # the name of the file of summaries of an evaluation outside a run
PREFERENCES: Final = "preferences"  # the name under which held-out pairs are evaluated
# A temperature below it is greedy, as 0 is: float32 has few bits left for it or none, and logits
# divided by it would be infinite or NaN.
SMALLEST_TEMPERATURE: Final = 1e-37


class Task(Section):
    """Settings that tasks of every kind have.

    Texts in braces are Jinja templates over the columns of a row:
    `"Question: {{question}}\\nAnswer:"`.
    """

    name: FileName = Field(description="in tables and file names", examples=["problems"])
    # No literal: kinds are the keys of a registry, to which other packages may add.
    kind: str = Field(description="how an answer is asked for and compared")
    data: str | None = Field(
        None,
        description="file, directory, glob or hub dataset; by default data.test",
        examples=["gsm8k_test.jsonl"],
    )
    limit: PositiveInt | None = Field(
        None,
        description="use only the first so many items",
        examples=[100],
        json_schema_extra={"unit": "items"},
    )

    @property
    def new_tokens(self) -> int:
        """The largest number of tokens that a model writes for an item; 0 where it only reads."""
        return 0


class GeneratedTask(Task):
    """Settings of a task for which a model writes text."""

    # 256 as in the published evaluations of GSM8K (greedy, 256 new tokens)
    max_new_tokens: PositiveInt = Field(
        256,
        description="largest number of tokens of an answer",
        json_schema_extra={"unit": "tokens"},
    )

    @property
    def new_tokens(self) -> int:
        """The largest number of tokens that a model writes for an item."""
        return self.max_new_tokens


# Two small classes and no flags on `Task`: a kind inherits the settings that it reads, and a
# setting without an effect is an unknown key.
class FileTask(Task):
    """Settings of a task that reads columns of its own, so that `data.test` cannot stand in."""

    @pydantic.model_validator(mode="after")
    def _has_data(self) -> "FileTask":
        if self.data is None:
            raise ValueError(f"kind {self.kind} needs its file or hub dataset; give data")
        return self


class ShotsTask(Task):
    """Settings of a task that may show solved examples before each item."""

    description: str = Field(
        "", description="text before the shots", examples=["Answer in one word.\n"]
    )
    shots: NonNegativeInt = Field(
        0, description="solved examples before each item", json_schema_extra={"unit": "examples"}
    )
    shots_from: str | None = Field(
        None,
        description="file, directory, glob or hub dataset of the shots; by default data.train",
        examples=["openai/gsm8k:main@train"],
        json_schema_extra={"with": "evaluation.tasks.shots"},
    )
    shots_order: Literal["first", "random"] = Field(
        "first",
        description="first: the first examples of their file; random: drawn for each item by"
        " seed and number of the item",
        json_schema_extra={"with": "evaluation.tasks.shots"},
    )
    shots_between: str = Field(
        "\n\n",
        description="text between shots and before the item",
        json_schema_extra={"with": "evaluation.tasks.shots"},
    )

    @pydantic.model_validator(mode="after")
    def _shots_or_no_settings_of_shots(self) -> "ShotsTask":
        # Compared with the default, not by `model_fields_set`: a resolved config writes every
        # default, and reading it again must give the same config.
        for name in ("shots_from", "shots_order", "shots_between"):
            if not self.shots and getattr(self, name) != ShotsTask.model_fields[name].default:
                raise ValueError(f"{name} needs shots above 0; give both or neither")
        return self


@dataclasses.dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Attributes:
        settings: the section that a config writes for a task of this kind.
        run: evaluates a model, `(task, EvalModel, TaskInputs) -> TaskResult`. These are types of
            `jax_ordermerge.evaluate`, which is above this package.
        result: what the summary holds: an accuracy with its error; a perplexity; or nothing,
            because the items are outputs for a judge.
    """

    settings: type[Task]
    run: Callable[..., Any]
    result: Literal["accuracy", "perplexity", "outputs"] = "accuracy"


TASK_KINDS = Registry[TaskKind]("task kind", "jax_ordermerge.evaluate.tasks")

# SerializeAsAny: pydantic dumps a field by its declared class, which would drop the settings that a
# kind adds to those of `Task`.
AnyTask = Annotated[SerializeAsAny[Task], registered(TASK_KINDS, noun="task kind", default="exact")]


# `parse` validates sections; a task alone is a choice, and becomes one as the field of a section.
class _OneTask(Section):
    task: AnyTask


def make_task(**settings: JsonValue) -> Task:
    """Return a task of the kind that its settings name.

    Raises:
        UserError: the kind is unknown, or has no such setting.

    Example:
        >>> make_task(name="problems", kind="gsm8k").new_tokens
        256
    """
    return parse(_OneTask, {"task": settings}, "evaluation").task


class Evaluation(Section):
    """What every model (base, members, merges) is evaluated on."""

    # a matter of memory and time, as the mesh is
    batch: Annotated[PositiveInt, FREE_TO_CHANGE] = Field(
        64, description="rows per forward pass", json_schema_extra={"unit": "rows"}
    )
    loss: bool = Field(True, description="held-out loss and perplexity on data.test")
    tasks: tuple[AnyTask, ...] = Field(
        (),
        description="what every model is asked besides the held-out loss",
        examples=[[{"name": "problems", "kind": "gsm8k", "max_new_tokens": 20}]],
    )
    bootstrap: PositiveInt = Field(
        1000,
        description="resamples of the intervals of differences",
        json_schema_extra={"unit": "resamples"},
    )

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> "Evaluation":
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"evaluation.tasks: the name {name} is used twice; give each a different name"
                )
            # the file of items is NAME.json beside the summary
            if name.casefold() == RESULTS:
                raise ValueError(
                    f"evaluation.tasks: the name {name} is that of the summary, {RESULTS}.json;"
                    " choose another"
                )
        return self
