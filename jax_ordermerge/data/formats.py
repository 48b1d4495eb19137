"""The formats users bring, each turned into the same record: messages with roles, or a text. Pure."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from jax_ordermerge.errors import UserError, did_you_mean

Row = Mapping[str, Any]
Message = Mapping[str, Any]
SHAREGPT_ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One example before it is templated.

    Attributes:
        messages: `{"role": ..., "content": ...}`, ending in a response; empty for a text.
        given: so many leading messages are context: their assistant turns are not learned.
        input: the input beside an Alpaca instruction, else "".
        text: the text of format `text`, else None.
        rejected: of a preference pair, the record that ends in the other response, else None.

    Example:
        >>> record = Record.asked("2 + 3?", "5")
        >>> record.prompt, record.response
        ('2 + 3?', '5')
    """

    messages: Sequence[Message] = ()
    given: int = 0
    input: str = ""
    text: str | None = None
    rejected: "Record | None" = None

    @classmethod
    def asked(cls, prompt: str, response: str = "", system_input: str = "") -> "Record":
        """Make a record of one user and one assistant message."""
        return cls(
            messages=(
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ),
            input=system_input,
        )

    @property
    def prompt(self) -> str:
        """What stands before the last message, one message a paragraph."""
        return "\n\n".join(str(message["content"]) for message in self.messages[:-1])

    @property
    def response(self) -> str:
        """The last message, or the text."""
        return str(self.messages[-1]["content"]) if self.messages else self.text or ""


class NoResponse(Exception):
    """A row has nothing to learn from; its message says which part is empty."""


class MissingColumn(Exception):
    """A row lacks a column; its message is the column's name."""


def _value(row: Row, column: str) -> Any:
    if row.get(column) is None:
        raise MissingColumn(column)
    return row[column]


def _string(row: Row, column: str) -> str:
    value = _value(row, column)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"column '{column}' holds {type(value).__name__}, expected a string")
    return str(value)


def _answered(row: Row, column: str) -> str:
    if column in row and row[column] is None:
        raise NoResponse(f"column '{column}' is null")
    response = _string(row, column)
    if not response.strip():
        raise NoResponse(f"column '{column}' is empty")
    return response


def _turns(value: Any, column: str, role: str, content: str) -> list[Message]:
    if isinstance(value, (Mapping, str)) or not isinstance(value, Sequence):
        raise UserError(
            f"column '{column}' holds {type(value).__name__}, expected a list of messages"
        )
    for message in value:
        if not isinstance(message, Mapping) or role not in message:
            raise UserError(f"column '{column}': a message without '{role}': {str(message)[:60]}")
        # a call of a tool has no content
        if not isinstance(message.get(content), str) and not message.get("tool_calls"):
            raise UserError(
                f"column '{column}': a message without the string '{content}': {str(message)[:60]}"
            )
    return list(value)


def _conversation(messages: Sequence[Message], column: str, given: int = 0) -> Record:
    learned = [
        at for at, message in enumerate(messages) if at >= given and message["role"] == "assistant"
    ]
    # what follows the last response is never learned
    messages = messages[: learned[-1] + 1] if learned else []
    if not messages or not any(
        str(messages[at].get("content") or "").strip() or messages[at].get("tool_calls")
        for at in learned
    ):
        raise NoResponse(
            f"column '{column}' has no assistant message"
            if not learned
            else f"column '{column}' has empty responses"
        )
    return Record(messages=tuple(messages), given=given)


def _from_messages(row: Row) -> Record:
    return _conversation(_turns(_value(row, "messages"), "messages", "role", "content"), "messages")


def _from_sharegpt(row: Row) -> Record:
    turns = _turns(_value(row, "conversations"), "conversations", "from", "value")
    unknown = [turn["from"] for turn in turns if turn["from"] not in SHAREGPT_ROLES]
    if unknown:
        raise UserError(
            f"column 'conversations': unknown speaker '{unknown[0]}'{did_you_mean(str(unknown[0]), SHAREGPT_ROLES)}"
        )
    messages = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    return _conversation(messages, "conversations")


def _from_prompt_completion(row: Row) -> Record:
    prompt, completion = _value(row, "prompt"), row.get("completion")
    if isinstance(prompt, (str, int, float)):
        return Record.asked(_string(row, "prompt"), _answered(row, "completion"))
    given = _turns(prompt, "prompt", "role", "content")
    if completion is None and "completion" in row:
        raise NoResponse("column 'completion' is null")
    answers = _turns(_value(row, "completion"), "completion", "role", "content")
    return _conversation([*given, *answers], "completion", len(given))


def _from_alpaca(row: Row) -> Record:
    return Record.asked(
        _string(row, "instruction"), _answered(row, "output"), str(row.get("input") or "")
    )


def _from_question_answer(row: Row) -> Record:
    return Record.asked(_string(row, "question"), _answered(row, "answer"))


def _from_text(row: Row) -> Record:
    return Record(text=_answered(row, "text"))


def _from_preference(row: Row) -> Record:
    """Read a pair whose prompt stands in a column of its own, or is what both responses begin with."""
    prompt = row.get("prompt")
    if isinstance(row.get("chosen"), str):
        chosen, rejected = _answered(row, "chosen"), _answered(row, "rejected")
        if prompt is None:
            at = _shared(chosen, rejected)
            prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
        elif not isinstance(prompt, str):
            raise UserError(
                f"column 'prompt' holds {type(prompt).__name__} and column 'chosen' a string, expected two of a kind"
            )
        pair = [Record.asked(prompt, response) for response in (chosen, rejected)]
    else:
        turns = [
            _turns(_value(row, column), column, "role", "content")
            for column in ("chosen", "rejected")
        ]
        if prompt is None or isinstance(prompt, str):
            # a prompt in words beside messages is there for its readers: the messages begin with it
            at = _shared(*turns)
            given, turns = turns[0][:at], [part[at:] for part in turns]
        else:
            given = _turns(prompt, "prompt", "role", "content")
        if not given:
            raise UserError(
                "columns 'chosen' and 'rejected' begin with different messages; give a column 'prompt' with messages"
            )
        columns = ("chosen", "rejected")
        pair = [
            _conversation([*given, *part], column, len(given))
            for part, column in zip(turns, columns, strict=True)
        ]
    return dataclasses.replace(pair[0], rejected=pair[1])


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return how many characters or messages two responses begin with alike, at least one less than they have.

    A space before the difference is left to the responses, as in TRL: tokenizers glue it to what follows.
    """
    least = min(len(chosen), len(rejected))
    at = next(
        (place for place in range(least) if chosen[place] != rejected[place]), max(least - 1, 0)
    )
    return at - 1 if at and chosen[at - 1] == " " else at


class Format(NamedTuple):
    """How a format is read and by which columns it is known."""

    read: Callable[[Row], Record]
    columns: tuple[str, ...]


FORMATS: Final = {
    "messages": Format(_from_messages, ("messages",)),
    "sharegpt": Format(_from_sharegpt, ("conversations",)),
    "prompt_completion": Format(_from_prompt_completion, ("prompt", "completion")),
    "alpaca": Format(_from_alpaca, ("instruction", "output")),
    "question_answer": Format(_from_question_answer, ("question", "answer")),
    "text": Format(_from_text, ("text",)),
    "preference": Format(_from_preference, ("chosen", "rejected")),
}


def detect(row: Row, where: str) -> str:
    """Return the format whose columns a row has.

    Raises:
        UserError: it is none of them.

    Example:
        >>> detect({"question": "2 + 3?", "answer": "5"}, "train.jsonl")
        'question_answer'
    """
    found = next((name for name, form in FORMATS.items() if set(form.columns) <= set(row)), None)
    if found is None:
        known = "; ".join(f"{name} ({', '.join(form.columns)})" for name, form in FORMATS.items())
        raise UserError(
            f"{where}: the columns {_listed(row)} are no known format; expected those of {known}"
        )
    return found


def normalize(rows: Sequence[Row], form: str, where: str) -> list[Record]:
    """Turn rows of one format into records.

    Args:
        rows: as read, numbered from 0 in messages.
        form: a key of `FORMATS`.
        where: name of the source, for messages.

    Raises:
        UserError: unknown format; a missing column (with row and columns present); rows without a response (all their numbers).

    Example:
        >>> normalize([{"question": "2 + 3?", "answer": 5}], "question_answer", "train.jsonl")[
        ...     0
        ... ].response
        '5'
        >>> normalize([{"question": "2 + 3?"}], "question_answer", "train.jsonl")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: train.jsonl: row 0 has no column 'answer' (format question_answer); it has 'question'
    """
    if form not in FORMATS:
        raise UserError(f"data.format = '{form}' is not a format{did_you_mean(form, FORMATS)}")
    records, silent, reason = [], [], ""
    for number, row in enumerate(rows):
        try:
            records.append(FORMATS[form].read(row))
        except NoResponse as error:
            silent.append(number)
            reason = reason or str(error)
        except MissingColumn as error:
            raise UserError(
                f"{where}: row {number} has no column '{error}' (format {form}); it has {_listed(row)}"
            ) from None
        except UserError as error:
            raise UserError(f"{where}: row {number}: {error}") from None
    if silent:
        others = (
            f"; {len(silent) - 1} more rows too: {', '.join(map(str, silent[1:21]))}"
            if len(silent) > 1
            else ""
        )
        raise UserError(
            f"{where}: row {silent[0]} has no response ({reason}){others}; remove what has nothing to learn from"
        )
    return records


def _listed(row: Row) -> str:
    return ", ".join(f"'{column}'" for column in row if row[column] is not None) or "none"
