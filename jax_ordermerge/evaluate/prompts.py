"""Templates over the columns of a row, and prompts with solved examples (shots) before an item."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Final

import jinja2
import jinja2.sandbox

from jax_ordermerge.config.evaluation import ShotsTask
from jax_ordermerge.data.messages import Message
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import JsonRow, JsonValue

# Templates come from configs that others may have written: they cannot run code, and a column
# that is absent is an error instead of an empty text.
_JINJA: Final = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)
_SINGLE_EXPRESSION: Final = re.compile(r"\s*\{\{((?:(?!\}\}).)*)\}\}\s*", re.DOTALL)
_ERRORS: Final = (jinja2.TemplateError, TypeError, ValueError, LookupError)


def render(template: str, row: JsonRow) -> str:
    """Return a Jinja template filled with the columns of a row.

    Raises:
        UserError: the template is not valid, or names a column that the row does not have.

    Example:
        >>> render("Question: {{question}}\\nAnswer:", {"question": "2 + 3?"})
        'Question: 2 + 3?\\nAnswer:'
        >>> render("{{a}}", {"b": 1})
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: template '{{a}}': 'a' is undefined; the columns are b
    """
    try:
        return _JINJA.from_string(template).render(row)
    except _ERRORS as error:
        raise _template_error(template, str(error), row) from error


def render_value(template: str, row: JsonRow) -> JsonValue:
    """Return the value of a template that is one expression; of any other template, its text.

    Example:
        >>> render_value("{{choices.text}}", {"choices": {"text": ["a", "b"]}})
        ['a', 'b']
        >>> render_value("{{label}} ", {"label": 1}), render_value("x{{label}}", {"label": 1})
        (1, 'x1')
    """
    # One expression alone: text around it makes a text of everything.
    match = _SINGLE_EXPRESSION.fullmatch(template)
    if match is None:
        return render(template, row)
    try:
        # Rendering would turn lists and numbers into text.
        value = _JINJA.compile_expression(match[1], undefined_to_none=False)(row)
    except _ERRORS as error:
        raise _template_error(template, str(error), row) from error
    # An undefined expression raises only when it is printed.
    if value is None or isinstance(value, jinja2.Undefined):
        reason = str(getattr(value, "_undefined_message", "it is null"))
        raise _template_error(template, reason, row)
    return value


def _template_error(template: str, reason: str, row: JsonRow) -> UserError:
    # names and not values: a row of a test set does not belong into a log
    columns = ", ".join(map(str, row))
    return UserError(f"template {template!r}: {reason}; the columns are {columns}")


@dataclasses.dataclass(frozen=True)
class Formatter:
    """Functions from a row to the texts of an item.

    Attributes:
        prompt: the question.
        response: what follows the question in a shot.
        reference: the right answer.
        chat: whether question and response are turns of a chat instead of one text.
    """

    prompt: Callable[[JsonRow], str]
    response: Callable[[JsonRow], str]
    reference: Callable[[JsonRow], str]
    chat: bool = False


@dataclasses.dataclass(frozen=True)
class Question:
    """One item of a task.

    Attributes:
        id: its number in its file.
        row: as read.
        prompt: the item alone.
        context: the item after description and shots: a text, or the messages of a chat.
        reference: the right answer.
    """

    id: int
    row: JsonRow
    prompt: str
    context: str | Sequence[Message]
    reference: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One item of a task that a model answers in words.

    Attributes:
        id: its number in its file.
        prompt: the item alone.
        tokens: what the model continues.
        reference: the right answer.
    """

    id: int
    prompt: str
    tokens: Sequence[int]
    reference: str


def make_question(
    task: ShotsTask, formatter: Formatter, row: JsonRow, shots: Sequence[JsonRow], number: int
) -> Question:
    """Return an item with the description of its task and its shots before it."""
    prompt = formatter.prompt(row)
    # Shots by the formatter of the item: a model sees one form, solved and unsolved.
    solved = [(formatter.prompt(shot), formatter.response(shot)) for shot in shots]
    context: str | list[Message]
    if formatter.chat:
        # Shots are turns of the chat, the form in which chat models saw dialogues.
        context = [{"role": "system", "content": task.description}] if task.description else []
        for question, answer in solved:
            context.append({"role": "user", "content": question})
            context.append({"role": "assistant", "content": answer})
        context.append({"role": "user", "content": prompt})
    else:
        # The separator stands after each shot, so also before the item.
        texts = [f"{question}{answer}{task.shots_between}" for question, answer in solved]
        context = task.description + "".join(texts) + prompt
    return Question(number, row, prompt, context, formatter.reference(row))
