"""Rows of a file into what a model is asked: templates over their columns, and solved examples (shots) before them."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import jinja2
import jinja2.sandbox
import numpy as np

from jax_ordermerge.config import Data
from jax_ordermerge.config.evaluation import ShotsTask
from jax_ordermerge.data import chat, formats, source
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.data.formats import Message, Record
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.tasks.answers import AnswerTask
from jax_ordermerge.evaluate.tasks.choices import ChoiceTask
from jax_ordermerge.rng import stream_key_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
# what a task's config names is data, and no way to run code
_JINJA: Final = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)
_WHOLE: Final = re.compile(r"\s*\{\{((?:(?!\}\}).)*)\}\}\s*", re.DOTALL)


def text(template: str, row: Row) -> str:
    """Return a Jinja template filled with the columns of a row.

    Raises:
        UserError: the template is not valid, or names a column that the row lacks.

    Example:
        >>> text("Question: {{question}}\\nAnswer:", {"question": "2 + 3?"})
        'Question: 2 + 3?\\nAnswer:'
        >>> text("{{problem}}", {"question": "2 + 3?"})
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: template '{{problem}}': 'problem' is undefined; the columns are question
    """
    try:
        return _JINJA.from_string(template).render(row)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise UserError(
            f"template {template!r}: {error}; the columns are {', '.join(map(str, row))}"
        ) from error


def value(template: str, row: Row) -> Any:
    """Return what a template of a single expression stands for, lists and numbers included; any other is a text.

    Example:
        >>> (
        ...     value("{{choices.text}}", {"choices": {"text": ["a", "b"]}}),
        ...     value("{{label}} ", {"label": 1}),
        ...     value("x{{label}}", {"label": 1}),
        ... )
        (['a', 'b'], 1, 'x1')
    """
    whole = _WHOLE.fullmatch(template)
    if whole is None:
        return text(template, row)
    try:
        found = _JINJA.compile_expression(whole[1], undefined_to_none=False)(row)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        found, reason = None, str(error)
    else:
        reason = str(getattr(found, "_undefined_message", "it is null"))
    if found is None or isinstance(found, jinja2.Undefined):
        raise UserError(
            f"template {template!r}: {reason}; the columns are {', '.join(map(str, row))}"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Question:
    """One item of a task.

    Attributes:
        id: its number in its file.
        row: as read.
        prompt: the item alone, as a text.
        asked: with description and shots before it: a text, or the messages of a chat.
        reference: the right answer.
    """

    id: int
    row: Row
    prompt: str
    asked: str | Sequence[Message]
    reference: str


@dataclasses.dataclass(frozen=True)
class _Wording:
    """How the rows of a task become texts: what is asked, what follows it in a shot, and the reference."""

    asks: Callable[[Row], str]
    goes_on: Callable[[Row], str]
    reference: Callable[[Row], str]
    chat: bool = False


def questions(
    task: ChoiceTask | AnswerTask, data: Data, tokenizer: "PreTrainedTokenizerBase", *, seed: int
) -> list[Question]:
    """Return the items of a task that are asked by templates of its own, or after shots.

    Args:
        task: with `data`, or the config's `data.test`; its shots come from `shots_from`, or the config's `data.train`.
        data: the config's section: how rows without a template of the task are read and asked.
        tokenizer: of the model.
        seed: of the run, where shots are drawn.

    Raises:
        UserError: no data, a row that does not fit, or fewer shots than asked for.
    """
    path = task.data or data.test
    if path is None:
        raise UserError(
            f"evaluation task {task.name} has no data; set data.test or the task's own data"
        )
    rows = source.load(path, "test", limit=task.limit)
    wording = _wording(task, data, rows, path, tokenizer)
    shots = _shots(task, data)
    found = []
    for number, row in enumerate(rows):
        # a row is never its own shot, where items and shots are of one file
        own = _chosen(
            task, [shot for shot in shots if shot != row] if task.shots else (), seed, number
        )
        prompt = wording.asks(row)
        pairs = [(wording.asks(shot), wording.goes_on(shot)) for shot in own]
        asked: str | list[Message]
        if wording.chat:
            asked = [{"role": "system", "content": task.description}] if task.description else []
            for question, answer in pairs:
                asked += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            asked.append({"role": "user", "content": prompt})
        else:
            asked = (
                task.description
                + "".join(f"{question}{answer}{task.shots_between}" for question, answer in pairs)
                + prompt
            )
        found.append(Question(number, row, prompt, asked, wording.reference(row)))
    return found


def examples(
    task: AnswerTask, data: Data, tokenizer: "PreTrainedTokenizerBase", *, seed: int
) -> Examples:
    """Return the items of `questions` as examples without responses: generation starts from all of their tokens.

    Raises:
        UserError: see `questions`.
    """
    asked = questions(task, data, tokenizer, seed=seed)
    tokens = [_tokens(one.asked, tokenizer) for one in asked]
    return Examples(
        tokens=Ragged.of(tokens, np.int32),
        answers=Ragged.of([np.zeros(len(row), bool) for row in tokens], np.bool_),
        ids=np.array([one.id for one in asked], np.int64),
        prompts=[one.prompt for one in asked],
        responses=[one.reference for one in asked],
    )


def instruction_tokens(row: Row, data: Data, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens of an instruction (columns `instruction` and, where there is one, `input`) in the template of the config.

    Raises:
        UserError: the row has no instruction.
    """
    if not isinstance(row.get("instruction"), str):
        raise UserError(
            f"a file of instructions needs the column instruction, its columns are {', '.join(row)}"
        )
    record = Record.asked(row["instruction"], system_input=str(row.get("input") or ""))
    template = chat.resolve_template(data.template, "alpaca", [record], tokenizer)
    return chat.prompt_tokens(record, template, tokenizer).tolist()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, after the beginning-of-sequence token where the tokenizer puts one, and never after two."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"])


def _tokens(asked: str | Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if isinstance(asked, str):
        return encode(tokenizer, asked)
    record = Record(messages=(*asked, {"role": "assistant", "content": ""}))
    return chat.prompt_tokens(record, "chat", tokenizer).tolist()


def _wording(
    task: ChoiceTask | AnswerTask,
    data: Data,
    rows: Sequence[Row],
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
) -> _Wording:
    if isinstance(task, ChoiceTask):
        return _Wording(
            lambda row: text(task.prompt, row),
            lambda row: task.delimiter + chosen(task, row)[0][chosen(task, row)[1]],
            lambda row: chosen(task, row)[0][chosen(task, row)[1]],
        )
    prompt, response = task.prompt, task.response
    if prompt is not None and response is not None:
        reference = response if task.reference is None else task.reference
        return _Wording(
            lambda row: text(prompt, row),
            lambda row: text(response, row),
            lambda row: text(reference, row).strip(),
        )
    form = formats.detect(rows[0], path) if data.format == "auto" else data.format

    def record(row: Row) -> Record:
        return formats.normalize([row], form, path)[0]

    template = chat.resolve_template(data.template, form, [record(rows[0])], tokenizer)
    if template == "chat":
        return _Wording(
            lambda row: record(row).prompt,
            lambda row: record(row).response,
            lambda row: record(row).response,
            chat=True,
        )
    return _Wording(
        lambda row: chat.render(record(row), template)[0],
        lambda row: chat.render(record(row), template)[1],
        lambda row: record(row).response,
    )


def chosen(task: ChoiceTask, row: Row) -> tuple[list[str], int]:
    """Return the choices of a row and the number of the right one.

    Raises:
        UserError: no list of choices, or an answer that is none of them.

    Example:
        >>> task = ChoiceTask(
        ...     name="arc",
        ...     kind="multiple_choice",
        ...     data="x",
        ...     choices="{{c.text}}",
        ...     answer="{{c.label.index(key)}}",
        ... )
        >>> chosen(task, {"c": {"text": ["red", "blue"], "label": ["A", "B"]}, "key": "B"})
        (['red', 'blue'], 1)
    """
    given, answer = value(task.choices, row), value(task.answer, row)
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) < 2:
        raise UserError(
            f"evaluation task {task.name}: {task.choices} is {str(given)[:60]!r}, expected a list of at least two choices"
        )
    choices = [str(one) for one in given]
    if isinstance(answer, str) and answer in choices:
        return choices, choices.index(answer)
    try:
        number = int(answer)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < len(choices):
        raise UserError(
            f"evaluation task {task.name}: {task.answer} is {str(answer)[:60]!r}, expected one of the choices or its number from 0"
        )
    return choices, number


def _shots(task: ShotsTask, data: Data) -> list[dict[str, Any]]:
    if not task.shots:
        return []
    path = task.shots_from or data.train
    # one more than needed: a row is never its own shot
    rows = source.load(path, "train", limit=task.shots + 1 if task.shots_order == "first" else None)
    if len(rows) < task.shots:
        raise UserError(
            f"evaluation task {task.name}: {path} has {len(rows)} rows, fewer than shots = {task.shots}; lower it"
        )
    return rows


def _chosen(task: ShotsTask, shots: Sequence[Row], seed: int, number: int) -> Sequence[Row]:
    if len(shots) < task.shots:
        raise UserError(
            f"evaluation task {task.name}: too few shots are left for item {number}, which is one of them; lower shots"
        )
    if task.shots_order == "first":
        return shots[: task.shots]
    generator = np.random.default_rng(stream_key_bits(seed, "shots", task.name, number))
    return [shots[at] for at in generator.permutation(len(shots))[: task.shots]]
