"""Multiple choice by log-likelihood."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from jax_ordermerge.config.evaluation import TASK_KINDS, FileTask, ShotsTask, TaskKind
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.eval_model import EvalModel, ItemExample, TaskResult, name_items
from jax_ordermerge.evaluate.likelihood import make_pair, truncate_pair
from jax_ordermerge.evaluate.metrics import accuracy
from jax_ordermerge.evaluate.prompts import Formatter, Question, render, render_value
from jax_ordermerge.json_types import Json, JsonRow

if TYPE_CHECKING:
    from jax_ordermerge.evaluate.inputs import TaskInputs


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

    @property
    def formatter(self) -> Formatter:
        """The formatter of the task's templates."""

        def right_choice(row: JsonRow) -> str:
            choices, number = read_choices(self, row)
            return choices[number]

        return Formatter(
            lambda row: render(self.prompt, row),
            lambda row: self.delimiter + right_choice(row),
            right_choice,
        )


def read_choices(task: ChoiceTask, row: JsonRow) -> tuple[list[str], int]:
    """Return the choices of a row and the number of the right one.

    Raises:
        UserError: there is no list of choices, or the answer is none of them.

    Example:
        >>> task = ChoiceTask(
        ...     name="arc",
        ...     kind="multiple_choice",
        ...     data="arc.jsonl",
        ...     choices="{{c.text}}",
        ...     answer="{{c.label.index(key)}}",
        ... )
        >>> read_choices(task, {"c": {"text": ["red", "blue"], "label": ["A", "B"]}, "key": "B"})
        (['red', 'blue'], 1)
    """
    value, answer = render_value(task.choices, row), render_value(task.answer, row)
    # A string is a sequence of letters, which is never meant.
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) < 2:
        raise UserError(
            f"evaluation task {task.name}: {task.choices} is {str(value)[:60]!r}, expected a list "
            "of at least two choices"
        )
    choices = [str(choice) for choice in value]
    # A text first: of the choices "1", "2", "3" the answer "2" is the second and not the third.
    if isinstance(answer, str) and answer in choices:
        return choices, choices.index(answer)
    try:
        # 0 where the answer is False: a column of true and false chooses between two texts
        number = int(answer)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < len(choices):
        raise UserError(
            f"evaluation task {task.name}: {task.answer} is {str(answer)[:60]!r}, expected one of "
            "the choices or its number from 0"
        )
    return choices, number


def run(task: ChoiceTask, model: EvalModel, inputs: "TaskInputs") -> TaskResult:
    """Let a model choose for every item of a task."""
    return choose(task, inputs.questions(task, task.formatter), model)


def choose(task: ChoiceTask, questions: Sequence[Question], model: EvalModel) -> TaskResult:
    """Let a model choose the text that it finds likeliest after the prompt.

    Returns:
        `accuracy` of the choices by log-probability, `acc_norm` by log-probability per character,
        `acc_bytes` per byte, each with its error, and `n`. Per item `id`, `prompt`, `reference`,
        `answer`, `correct`, `correct_norm`, `correct_bytes`, and `logps` and `greedy` by choice.

    Example:
        >>> class Letters:
        ...     bos_token, bos_token_id = None, 0
        ...
        ...     def __call__(self, text, **options):
        ...         return {"input_ids": [ord(letter) for letter in text]}
        >>> score = lambda pairs: ([-3.0, -4.0], [False, False])
        >>> row = {"choices": ["no", "certainly"], "answer": 1}
        >>> question = Question(0, row, "Is it?", "Is it?", "certainly")
        >>> task = ChoiceTask(name="t", kind="multiple_choice", data="x")
        >>> result = choose(task, [question], EvalModel(Letters(), None, score, 99))
        >>> result.summary["accuracy"], result.summary["acc_norm"], result.items[0]["answer"]
        (0.0, 1.0, 'no')
    """
    choices_of = [read_choices(task, question.row) for question in questions]
    pairs, item_ids = [], []
    for question, (choices, _) in zip(questions, choices_of, strict=True):
        # for mypy: the formatter of choices is never a chat
        assert isinstance(question.context, str)
        for choice in choices:
            continuation = f"{task.delimiter}{choice}"
            pair = make_pair(model.encode, question.context, continuation, model.start)
            # From its start where a pair is too long: the choice itself stays whole.
            pairs.append(truncate_pair(*pair, model.positions))
            item_ids.append(question.id)
    # One call for all pairs, so that batches are full.
    with name_items(item_ids):
        logprobs, greedy = map(iter, model.score(pairs))
    items: list[Json] = []
    for question, (choices, right) in zip(questions, choices_of, strict=True):
        sums = np.array([float(next(logprobs)) for _ in choices])
        # Longer choices have lower sums. Dividing by their length, in characters as in acc_norm of
        # lm-evaluation-harness, makes them comparable.
        picks = {
            "correct": int(np.argmax(sums)),
            "correct_norm": int(np.argmax(sums / [len(choice) for choice in choices])),
            "correct_bytes": int(np.argmax(sums / [len(choice.encode()) for choice in choices])),
        }
        items.append(
            {
                "id": question.id,
                "prompt": question.prompt,
                "reference": question.reference,
                "answer": choices[picks["correct"]],
            }
            | {name: pick == right for name, pick in picks.items()}
            | {"logps": sums.tolist(), "greedy": [bool(next(greedy)) for _ in choices]}
        )
    summary: Json = {}
    for name, error_name, key in (
        ("accuracy", "se", "correct"),
        ("acc_norm", "acc_norm_se", "correct_norm"),
        ("acc_bytes", "acc_bytes_se", "correct_bytes"),
    ):
        summary[name], summary[error_name] = accuracy([item[key] for item in items])
    example = ItemExample(pairs[0][0], items[0]["answer"], questions[0].reference)
    return TaskResult(summary | {"n": len(items)}, items, example)


TASK_KINDS.register("multiple_choice", TaskKind(ChoiceTask, run))
