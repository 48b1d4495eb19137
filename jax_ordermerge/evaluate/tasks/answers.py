"""Tasks whose answers are compared with a reference: exact match, GSM8K, MATH, numbers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pydantic
from pydantic import Field

from jax_ordermerge.config.evaluation import TASK_KINDS, GeneratedTask, ShotsTask, TaskKind
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import matching, symbolic
from jax_ordermerge.evaluate.eval_model import EvalModel, ItemExample, TaskResult, name_items
from jax_ordermerge.evaluate.metrics import accuracy
from jax_ordermerge.evaluate.prompts import Formatter, Prompt, render
from jax_ordermerge.json_types import Json

if TYPE_CHECKING:
    from jax_ordermerge.evaluate.inputs import TaskInputs

# (answer, reference) -> whether the answer is right; None where that cannot be decided
Match = Callable[[str, str], bool | None]
MATCHES: dict[str, Match] = {
    "exact": matching.exact,
    "gsm8k": matching.gsm8k,
    "gsm8k_flexible": matching.gsm8k_flexible,
    "gsm8k_cot": matching.gsm8k_cot,
    "math": matching.math,
    "number": matching.number,
}
# Further metrics of the same answers. A strict match also fails on the form of an answer.
EXTRA_MATCHES: dict[str, dict[str, Match]] = {
    "gsm8k": {"flexible": matching.gsm8k_flexible, "value": matching.gsm8k_value},
    "gsm8k_cot": {"flexible": matching.gsm8k_flexible, "value": matching.gsm8k_value},
    "gsm8k_flexible": {"value": matching.gsm8k_value},
    "math": {"symbolic": symbolic.equal} if symbolic.is_available() else {},
}
# What a summary says where a further match needs a library that is not installed.
NOTES = {} if symbolic.is_available() else {"math": symbolic.MISSING}


class AnswerTask(GeneratedTask, ShotsTask):
    """A task that a model answers in words.

    exact: the whole answer; gsm8k: the number after ####; gsm8k_cot: after "The answer is";
    gsm8k_flexible: the last number; number: the last numbers, or words; math: the last boxed
    answer.
    """

    prompt: str | None = Field(
        None,
        description="template of the question; by default rows are read and templated as the"
        " training data are",
        examples=["Question: {{question}}\nAnswer:"],
        json_schema_extra={"with": "evaluation.tasks.response"},
    )
    response: str | None = Field(
        None,
        description="template of what follows the prompt in a shot (' {{answer}}')",
        examples=[" {{answer}}"],
        json_schema_extra={"with": "evaluation.tasks.prompt"},
    )
    reference: str | None = Field(
        None,
        description="template of the right answer; by default the response without spaces around"
        " it",
        examples=["{{answer}}"],
        json_schema_extra={"with": "evaluation.tasks.prompt"},
    )
    stop: tuple[str, ...] = Field(
        (), description="an answer ends before the first of these texts", examples=[["Question:"]]
    )

    @pydantic.model_validator(mode="after")
    def _templates_fit(self) -> "AnswerTask":
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response go together; give both or neither")
        if self.reference is not None and self.prompt is None:
            raise ValueError(
                "reference goes with a task that has a prompt; remove it or give prompt and"
                " response"
            )
        return self

    @property
    def formatter(self) -> Formatter | None:
        """The formatter of the task's templates, None where it has none."""
        prompt, response = self.prompt, self.response
        if prompt is None or response is None:
            return None
        # the response of a shot is the right answer, unless it also holds the reasoning
        reference = response if self.reference is None else self.reference
        return Formatter(
            lambda row: render(prompt, row),
            lambda row: render(response, row),
            lambda row: render(reference, row).strip(),
        )


def run(task: AnswerTask, model: EvalModel, inputs: "TaskInputs") -> TaskResult:
    """Let a model answer the items of a task."""
    return answer(task, inputs.prompts(task, task.formatter), model)


def answer(task: AnswerTask, prompts: Sequence[Prompt], model: EvalModel) -> TaskResult:
    """Let a model continue prompts, and compare its answers with the references.

    Returns:
        `accuracy`, `se` and `n`, and per item `id`, `prompt`, `reference`, `answer` and `correct`.
        Kinds with a further match have its share, error and `correct_...`, too: `flexible`,
        `value`, `symbolic`. `..._undecided` counts answers that took too long to compare; they are
        not right. `note` says what could not be measured.

    Raises:
        UserError: a reference is of another form than the kind compares.

    Example:
        >>> prompts = [Prompt(0, "a", [1], "A"), Prompt(1, "b", [1], "B")]
        >>> model = EvalModel(None, lambda prompts, n: ["A", "no"], None, 8)
        >>> answer(AnswerTask(name="echo", kind="exact"), prompts, model).summary
        {'accuracy': 0.5, 'se': 0.3535533905932738, 'n': 2}
    """
    match = MATCHES[task.kind]
    for prompt in prompts:
        # Before the generation, which may take hours: no answer changes what a reference is.
        try:
            match("", prompt.reference)
        except UserError as error:
            raise UserError(f"evaluation task {task.name}, item {prompt.id}: {error}") from error
    with name_items([prompt.id for prompt in prompts]):
        generated = model.generate([prompt.tokens for prompt in prompts], task.max_new_tokens)
    items: list[Json] = []
    for prompt, text in zip(prompts, generated, strict=True):
        # Generation itself stops at end tokens alone, since a text may span tokens. So the stops
        # are applied here.
        text = matching.truncate(text, task.stop)
        items.append(
            {
                "id": prompt.id,
                "prompt": prompt.prompt,
                "reference": prompt.reference,
                "answer": text,
                "correct": match(text, prompt.reference),
            }
        )
    summary: Json = {}
    summary["accuracy"], summary["se"] = accuracy([item["correct"] for item in items])
    summary["n"] = len(items)
    for name, match in EXTRA_MATCHES.get(task.kind, {}).items():
        for item in items:
            item[f"correct_{name}"] = match(item["answer"], item["reference"])
        correct = [item[f"correct_{name}"] for item in items]
        # undecided is not right: a model must not gain by answers that take long to compare
        summary[name], summary[f"{name}_se"] = accuracy([verdict is True for verdict in correct])
        if None in correct:
            summary[f"{name}_undecided"] = correct.count(None)
    if task.kind in NOTES:
        summary["note"] = NOTES[task.kind]
    example = ItemExample(prompts[0].tokens, items[0]["answer"], prompts[0].reference)
    return TaskResult(summary, items, example)


# One class and one `run` for all: the kinds differ only in how answers are compared.
for _kind in MATCHES:
    TASK_KINDS.register(_kind, TaskKind(AnswerTask, run))
