"""The formats of rows that users bring, each turned into one kind of record. Pure functions."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from jax_ordermerge.data.messages import (
    Message,
    Tool,
    parse_json,
    read_messages,
    read_sharegpt,
    read_tools,
    without_nulls,
)
from jax_ordermerge.errors import UserError, did_you_mean

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Record:
    """One example before it is templated.

    Attributes:
        messages: `{"role": ..., "content": ...}`, ending in a response; empty for a text.
        context: number of leading messages whose assistant turns are not learned.
        unlearned: numbers of further assistant messages that are not learned (`weight: 0`).
        input: the input with which the prompt of an Alpaca instruction ends, else "".
        tools: functions that the model may call, for the chat template.
        template_kwargs: further variables of the chat template, e.g. `enable_thinking`.
        text: the text of format `text`, else None.
        rejected: for a preference pair, the record that ends in the rejected response, else None.

    Example:
        >>> record = Record.single_turn("2 + 3?", "5")
        >>> record.prompt, record.response
        ('2 + 3?', '5')
    """

    messages: Sequence[Message] = ()
    context: int = 0
    unlearned: frozenset[int] = frozenset()
    input: str = ""
    tools: tuple[Tool, ...] = ()
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str | None = None
    rejected: "Record | None" = None

    @classmethod
    def single_turn(cls, prompt: str, response: str = "", alpaca_input: str = "") -> "Record":
        """Make a record of one user and one assistant message.

        The input of an Alpaca instruction is a line below it, as LLaMA-Factory has it, so that no
        template can lose it. Alpaca's own template takes the two apart again.
        """
        content = f"{prompt}\n{alpaca_input}" if alpaca_input else prompt
        return cls(
            messages=(
                {"role": "user", "content": content},
                {"role": "assistant", "content": response},
            ),
            input=alpaca_input,
        )

    @property
    def learned(self) -> list[int]:
        """Numbers of the assistant messages that are learned."""
        return [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant"
            and number >= self.context
            and number not in self.unlearned
        ]

    @property
    def by_answer(self) -> "list[Record]":
        """One record for each learned answer, which ends in it and learns nothing else."""
        return [
            dataclasses.replace(
                self,
                messages=self.messages[: number + 1],
                unlearned=self.unlearned | frozenset(self.learned) - {number},
            )
            for number in self.learned
        ]

    @property
    def last_answer(self) -> "Record":
        """This record, in which only the last answer is learned."""
        rejected = self.rejected and self.rejected.last_answer
        return dataclasses.replace(self.by_answer[-1], rejected=rejected)

    @property
    def prompt(self) -> str:
        """The messages before the last one, separated by empty lines."""
        return "\n\n".join(str(message["content"]) for message in self.messages[:-1])

    @property
    def response(self) -> str:
        """The last message, or the text."""
        return str(self.messages[-1]["content"]) if self.messages else self.text or ""


class NoResponse(Exception):
    """A row has no response to learn; the message says which part is empty."""


class MissingColumn(Exception):
    """A row lacks a column; the message is its name."""


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise MissingColumn(column)
    if row[column] is None:
        raise UserError(f"column '{column}' is null, expected a value")
    return row[column]


def _string(row: Row, column: str) -> str:
    value = _value(row, column)
    # numbers are answers too (`"answer": 5`); bool is a subclass of int and no text
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"column '{column}' holds {type(value).__name__}, expected a string")
    return str(value)


def _response(row: Row, column: str) -> str:
    # A null response is a row without an answer; an absent column is a wrong format.
    if column in row and row[column] is None:
        raise NoResponse(f"column '{column}' is null")
    response = _string(row, column)
    if not response.strip():
        raise NoResponse(f"column '{column}' is empty")
    return response


def _conversation(messages: Sequence[Message], column: str, context: int = 0) -> Record:
    """Make a record of messages, the first `context` of which are not learned."""
    unlearned, bare = set(), []
    for number, message in enumerate(messages):
        weight = message.get("weight", 1)
        # OpenAI's files know only these two; a fraction that counts as 1 would be a silent error.
        if isinstance(weight, bool) or weight not in (0, 1):
            raise UserError(f"column '{column}': weight {weight!r} of a message, expected 0 or 1")
        if weight == 0:
            unlearned.add(number)
        bare.append({name: value for name, value in message.items() if name != "weight"})
    # A greeting before the first question answers nothing, so it is context.
    users = [number for number, message in enumerate(bare) if message["role"] == "user"]
    unlearned |= set(range(users[0] if users else 0))
    unlearned = {number for number in unlearned if bare[number]["role"] == "assistant"}
    record = Record(messages=tuple(bare), context=context, unlearned=frozenset(unlearned))
    if not record.learned:
        reason = " with weight 1 after a user message" if unlearned else ""
        raise NoResponse(f"column '{column}' has no assistant message{reason}")
    responses = [bare[number] for number in record.learned]
    if not any(str(m["content"]).strip() or m.get("tool_calls") for m in responses):
        raise NoResponse(f"column '{column}' has empty responses")
    # messages after the last response are never learned
    return dataclasses.replace(record, messages=tuple(bare[: record.learned[-1] + 1]))


def _from_messages(row: Row) -> Record:
    return _conversation(read_messages(_value(row, "messages"), "messages"), "messages")


def _from_sharegpt(row: Row) -> Record:
    turns = read_sharegpt(_value(row, "conversations"), "conversations")
    return _conversation(turns, "conversations")


def _from_prompt_completion(row: Row) -> Record:
    prompt, completion = _value(row, "prompt"), row.get("completion")
    if isinstance(prompt, (str, int, float)):
        return Record.single_turn(_string(row, "prompt"), _response(row, "completion"))
    context = read_messages(prompt, "prompt")
    if completion is None and "completion" in row:
        raise NoResponse("column 'completion' is null")
    answers = read_messages(_value(row, "completion"), "completion")
    return _conversation([*context, *answers], "completion", len(context))


def _from_alpaca(row: Row) -> Record:
    record = Record.single_turn(
        _string(row, "instruction"), _response(row, "output"), str(row.get("input") or "")
    )
    # Rounds before the instruction are learned too, as in LLaMA-Factory, whose column this is.
    rounds = _json_value(row, "history", list, [])
    if any(not isinstance(turns, Sequence) or len(turns) != 2 for turns in rounds):
        raise UserError("column 'history': expected pairs of a question and an answer")
    history = [
        {"role": role, "content": str(content)}
        for turns in rounds
        for role, content in zip(("user", "assistant"), turns, strict=True)
    ]
    return dataclasses.replace(record, messages=(*history, *record.messages))


def _from_question_answer(row: Row) -> Record:
    return Record.single_turn(_string(row, "question"), _response(row, "answer"))


def _from_text(row: Row) -> Record:
    return Record(text=_response(row, "text"))


def _from_preference(row: Row) -> Record:
    """Read a pair whose prompt is a column of its own, or the common start of both responses."""
    prompt, columns = row.get("prompt"), ("chosen", "rejected")
    if isinstance(row.get("chosen"), Mapping):
        # LLaMA-Factory: a conversation, and one turn for each response
        context = read_sharegpt(_value(row, "conversations"), "conversations")
        answers = [read_sharegpt([_value(row, column)], column) for column in columns]
        pair = [
            _conversation([*context, *turns], column, len(context))
            for turns, column in zip(answers, columns, strict=True)
        ]
    elif isinstance(row.get("chosen"), str):
        chosen, rejected = (_response(row, column) for column in columns)
        if prompt is None:
            length = _common_prefix(chosen, rejected)
            prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        elif not isinstance(prompt, str):
            raise UserError(
                f"column 'prompt' holds {type(prompt).__name__} and column 'chosen' a string,"
                " expected the same type"
            )
        pair = [Record.single_turn(prompt, response) for response in (chosen, rejected)]
    else:
        turns = [read_messages(_value(row, column), column) for column in columns]
        if prompt is None or isinstance(prompt, str):
            # a string prompt beside messages repeats what the messages begin with
            length = _common_prefix(*turns)
            context, turns = turns[0][:length], [messages[length:] for messages in turns]
        else:
            context = read_messages(prompt, "prompt")
        if not context:
            raise UserError(
                "columns 'chosen' and 'rejected' begin with different messages;"
                " give a column 'prompt' with messages"
            )
        pair = [
            _conversation([*context, *messages], column, len(context))
            for messages, column in zip(turns, columns, strict=True)
        ]
    return dataclasses.replace(pair[0], rejected=pair[1])


def _common_prefix(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return the length of the common start of two responses, in characters or messages.

    At least the last element is left to each. So is a space before the difference, as in TRL:
    tokenizers attach it to the word that follows.
    """
    shorter = min(len(chosen), len(rejected))
    differing = (index for index in range(shorter) if chosen[index] != rejected[index])
    length = next(differing, max(shorter - 1, 0))
    return length - 1 if length and chosen[length - 1] == " " else length


def _json_value(row: Row, column: str, kind: type, default: Any) -> Any:
    # CSV has only strings, and some JSON files hold JSON in strings.
    value = row.get(column)
    if value is None or value == "":
        return default
    value = parse_json(value, column) if isinstance(value, str) else value
    if not isinstance(value, kind):
        raise UserError(f"column '{column}' holds {type(value).__name__}, expected {kind.__name__}")
    return value


def _add_shared_columns(record: Record, row: Row) -> Record:
    """Put the columns that any conversation may have where they belong: `SHARED_COLUMNS`."""
    changes: dict[str, Any] = {}
    if system := str(row.get("system") or ""):
        first = record.messages[0]
        if first["role"] != "system":
            changes["messages"] = ({"role": "system", "content": system}, *record.messages)
            changes["context"] = record.context + 1 if record.context else 0
            changes["unlearned"] = frozenset(number + 1 for number in record.unlearned)
        elif first["content"] != system:
            raise UserError("column 'system' and the system message differ; give one of them")
    if tools := _json_value(row, "tools", list, []):
        changes["tools"] = read_tools(tools)
    if kwargs := _json_value(row, "chat_template_kwargs", dict, {}):
        changes["template_kwargs"] = without_nulls(kwargs)
    if record.rejected is not None:
        changes["rejected"] = _add_shared_columns(record.rejected, row)
    return dataclasses.replace(record, **changes) if changes else record


class Format(NamedTuple):
    """The reader of a format, the columns that identify it, and those that it reads where given."""

    read: Callable[[Row], Record]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()


# Columns that every format but `text` reads.
SHARED_COLUMNS: Final = ("system", "tools", "chat_template_kwargs")
FORMATS: Final = {
    "messages": Format(_from_messages, ("messages",)),
    "sharegpt": Format(_from_sharegpt, ("conversations",)),
    "prompt_completion": Format(_from_prompt_completion, ("prompt", "completion")),
    "alpaca": Format(_from_alpaca, ("instruction", "output"), ("input", "history")),
    "question_answer": Format(_from_question_answer, ("question", "answer")),
    "text": Format(_from_text, ("text",)),
    "preference": Format(_from_preference, ("chosen", "rejected"), ("prompt", "conversations")),
}


def detect(row: Row, where: str) -> str:
    """Return the format whose columns a row has.

    Raises:
        UserError: it is none of them.

    Example:
        >>> detect({"question": "2 + 3?", "answer": "5"}, "train.jsonl")
        'question_answer'
    """
    # Only LLaMA-Factory's pairs have one turn, not a list of turns, as the chosen response.
    if isinstance(row.get("chosen"), Mapping) and {"conversations", "rejected"} <= set(row):
        return "preference"
    # The first format whose columns are all there. Further columns do not count.
    for name, form in FORMATS.items():
        if set(form.columns) <= set(row):
            return name
    expected = "; ".join(f"{name} ({', '.join(form.columns)})" for name, form in FORMATS.items())
    raise UserError(
        f"{where}: the columns {_column_names(row)} match no format; expected those of {expected}"
    )


def normalize(rows: Sequence[Row], form: str, where: str) -> list[Record]:
    """Turn rows of one format into records.

    Args:
        rows: rows of a source; error messages number them from 0.
        form: a key of `FORMATS`.
        where: name of the source, for error messages.

    Raises:
        UserError: unknown format, or bad rows: the first with what is wrong, and the numbers of the
            others.

    Example:
        >>> rows = [{"question": "2 + 3?", "answer": 5}]
        >>> normalize(rows, "question_answer", "train.jsonl")[0].response
        '5'
        >>> normalize([{"question": "2 + 3?"}], "question_answer", "train.jsonl")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: train.jsonl: row 0 has no column 'answer'
            (format question_answer); it has 'question'
    """
    if form not in FORMATS:
        raise UserError(f"data.format = '{form}' is not a format{did_you_mean(form, FORMATS)}")
    records, bad = read_rows(rows, form)
    if bad:
        raise bad_rows_error(bad, lambda row: (where, row))
    return list(records.values())


def read_rows(rows: Sequence[Row], form: str) -> tuple[dict[int, Record], dict[int, str]]:
    """Turn rows of one format into records by row number, and say what is wrong with the others.

    Returns:
        The records, and a reason for each row that is none.
    """
    records, bad = {}, {}
    for number, row in enumerate(rows):
        try:
            record = FORMATS[form].read(row)
            records[number] = record if form == "text" else _add_shared_columns(record, row)
        except NoResponse as error:
            bad[number] = f" has no response ({error})"
        except MissingColumn as error:
            bad[number] = f" has no column '{error}' (format {form}); it has {_column_names(row)}"
        except UserError as error:
            bad[number] = f": {error}"
    return records, bad


def bad_rows_error(bad: Mapping[int, str], locate: Callable[[int], tuple[str, int]]) -> UserError:
    """Return one error for all bad rows of a source: a user mends them in one go.

    Args:
        bad: what is wrong by row number, as of `read_rows`.
        locate: gives the file of a row, and the number of the row in that file.

    Example:
        >>> str(bad_rows_error({1: ": no text", 4: ": no text"}, lambda row: ("train.jsonl", row)))
        'train.jsonl: row 1: no text; 1 more rows too: 4'
    """
    first, *rest = bad
    path, row = locate(first)
    reason = bad[first]
    places = [
        f"{number}" if file == path else f"{file} row {number}"
        for file, number in map(locate, rest[:20])
    ]
    further = f"; {len(rest)} more rows too: {', '.join(places)}" if rest else ""
    remedy = "; remove rows without a response" if reason.startswith(" has no response") else ""
    return UserError(f"{path}: row {row}{reason}{further}{remedy}")


def _column_names(row: Row) -> str:
    return ", ".join(f"'{column}'" for column in row if row[column] is not None) or "none"
