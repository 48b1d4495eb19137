"""The formats of rows that users bring, each turned into one kind of record. Pure functions."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from jax_ordermerge.data.messages import (
    Message,
    Tool,
    parse_json,
    parse_messages,
    read_messages,
    read_tools,
    take_weight,
    without_nulls,
)
from jax_ordermerge.data.synonyms import suggest_columns
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import Json, JsonRow, JsonValue


@dataclasses.dataclass(frozen=True)
class Record:
    """One example before it is templated.

    Attributes:
        messages: `{"role": ..., "content": ...}`, ending in a response; empty for a text.
        context: number of leading messages whose assistant turns are not learned.
        unlearned: numbers of further assistant messages that are not learned (`weight: 0`).
        input: the input with which the prompt of an Alpaca instruction ends, else "".
        is_instruction: whether the prompt of a pair is an Alpaca instruction.
        unanswered: number of messages after the last response, which are left out.
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
    is_instruction: bool = False
    unanswered: int = 0
    tools: tuple[Tool, ...] = ()
    template_kwargs: JsonRow = dataclasses.field(default_factory=dict)
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


def is_filled(value: object) -> bool:
    """Return whether a cell says something; 0 and False do. Arrow and CSV have all columns."""
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def _value(row: JsonRow, column: str) -> JsonValue:
    if column not in row:
        raise MissingColumn(column)
    if row[column] is None:
        raise UserError(f"column '{column}' is null, expected a value")
    return row[column]


def _string(row: JsonRow, column: str) -> str:
    value = _value(row, column)
    # numbers are answers too (`"answer": 5`); bool is a subclass of int and no text
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"column '{column}' holds {type(value).__name__}, expected a string")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"column '{column}' holds the number {value}, which is not finite")
    return str(value)


def _prompt(row: JsonRow, column: str) -> str:
    # An empty cell of CSV is an absent value, which is refused in every other kind of file.
    if not (prompt := _string(row, column)):
        raise UserError(f"column '{column}' is empty; a text without a prompt has format text")
    return prompt


def optional_string(row: JsonRow, column: str) -> str:
    """Return the text of a column that may be absent, null or empty: then it is "".

    Raises:
        UserError: the column holds something else than a string or a number.
    """
    return _string(row, column) if is_filled(row.get(column)) else ""


def _response(row: JsonRow, column: str) -> str:
    # A null response is a row without an answer; an absent column is a wrong format.
    if column in row and row[column] is None:
        raise NoResponse(f"column '{column}' is null")
    response = _string(row, column)
    if not response.strip():
        raise NoResponse(f"column '{column}' is empty")
    return response


def _conversation(messages: Sequence[Message], column: str, context: int = 0) -> Record:
    """Make a record of messages, the first `context` of which are not learned."""
    # The keys that say what is learned are taken out: no template should print them.
    bare, weights = [], []
    for number, message in enumerate(messages):
        message, weight = take_weight(message, column, is_context=number < context)
        bare.append(message)
        weights.append(weight)
    # Learned without a context it would be text from nowhere.
    if weights[:1] == [True]:
        raise UserError(f"column '{column}': the first message has weight 1 and nothing to answer")
    # A greeting before the first question answers nothing, so it is context unless it has a weight.
    users = [number for number, message in enumerate(bare) if message["role"] == "user"]
    first = users[0] if users else 0
    unlearned = {
        number
        for number, message in enumerate(bare)
        if message["role"] == "assistant"
        and (weights[number] is False or (weights[number] is None and number < first))
    }
    record = Record(messages=tuple(bare), context=context, unlearned=frozenset(unlearned))
    if not record.learned:
        reason = " with weight 1 after a user message" if unlearned else ""
        raise NoResponse(f"column '{column}' has no assistant message{reason}")
    for number in record.learned:
        further = [name for name in bare[number] if name not in ("role", "content")]
        if not bare[number]["content"].strip() and not further:
            raise NoResponse(f"column '{column}' has an empty response in message {number}")
    # messages after the last response are never learned
    end = record.learned[-1] + 1
    return dataclasses.replace(record, messages=tuple(bare[:end]), unanswered=len(bare) - end)


def _read_conversation(column: str) -> Callable[[JsonRow], Record]:
    return lambda row: _conversation(read_messages(_value(row, column), column), column)


def _from_prompt_completion(row: JsonRow) -> Record:
    prompt = parse_messages(_value(row, "prompt"))
    completion = parse_messages(row.get("completion"))
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Record.single_turn(_prompt(row, "prompt"), _response(row, "completion"))
    if completion is None and "completion" in row:
        raise NoResponse("column 'completion' is null")
    context = read_messages(prompt, "prompt")
    answers = read_messages(_value(row, "completion"), "completion")
    return _conversation([*context, *answers], "completion", len(context))


def _from_alpaca(row: JsonRow) -> Record:
    instruction, alpaca_input = optional_string(row, "instruction"), optional_string(row, "input")
    if not instruction and "instruction" in row:
        # a few sets have the whole task in the input
        instruction, alpaca_input = alpaca_input, ""
    record = Record.single_turn(
        instruction or _prompt(row, "instruction"), _response(row, "output"), alpaca_input
    )
    # Rounds before the instruction are learned too, as in LLaMA-Factory, whose column this is.
    rounds = _json_value(row, "history", list, [])
    history: list[Message] = []
    for turns in rounds:
        if (
            not isinstance(turns, (list, tuple))
            or len(turns) != 2
            or not all(isinstance(text, str) and text.strip() for text in turns)
        ):
            raise UserError("column 'history': expected pairs of a question and an answer")
        history += Record.single_turn(*turns).messages
    return dataclasses.replace(record, messages=(*history, *record.messages))


def _from_question_answer(row: JsonRow) -> Record:
    return Record.single_turn(_prompt(row, "question"), _response(row, "answer"))


def _from_text(row: JsonRow) -> Record:
    return Record(text=_response(row, "text"))


def _from_preference(row: JsonRow) -> Record:
    """Read a pair whose prompt is a column of its own, or the common start of both responses."""
    columns = ("chosen", "rejected")
    responses = [parse_messages(row.get(column)) for column in columns]
    column = _pair_prompt(row)
    prompt = parse_messages(row[column]) if column else None
    if not any(isinstance(response, (list, Mapping)) for response in responses):
        chosen, rejected = (_response(row, name) for name in columns)
        if column == "conversations" or isinstance(prompt, (list, Mapping)):
            raise UserError(
                f"column '{column}' holds messages and column 'chosen' a string;"
                " give both in the same form"
            )
        if column is None:
            length = _common_prefix(chosen, rejected)
            prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        else:
            prompt = _string(row, column)
        alpaca_input = optional_string(row, "input")
        pair = [Record.single_turn(prompt, text, alpaca_input) for text in (chosen, rejected)]
        pair = [dataclasses.replace(side, is_instruction=column == "instruction") for side in pair]
    else:
        turns = []
        for response, name in zip(responses, columns, strict=True):
            if response is None:
                _response(row, name)  # raises: the column is absent or null
            # LLaMA-Factory has one turn instead of a list
            response = [response] if isinstance(response, Mapping) else response
            turns.append(read_messages(response, name))
        # A prompt that is a text beside responses that are messages is one message; see
        # `_split_pair`.
        if column and (column == "conversations" or isinstance(prompt, (list, Mapping))):
            prompt = read_messages(prompt, column)
        # From here on prompt and responses are messages, however the row had them.
        context, turns = _split_pair(prompt, turns)
        pair = [
            _conversation([*context, *messages], name, len(context))
            for messages, name in zip(turns, columns, strict=True)
        ]
    return dataclasses.replace(pair[0], rejected=pair[1])


def _pair_prompt(row: JsonRow) -> str | None:
    """Return the column with the prompt of a pair; None where both responses begin with it."""
    prompts = [name for name in _PAIR_PROMPTS if is_filled(row.get(name))]
    if len(prompts) > 1:
        raise UserError(
            f"columns {' and '.join(map(repr, prompts))} both hold a prompt;"
            " name one of them in data.ignore_columns"
        )
    # LLaMA-Factory's pairs have the columns of Alpaca
    if is_filled(row.get("input")) and prompts != ["instruction"]:
        raise UserError("column 'input' stands without 'instruction'; name it with data.columns")
    return prompts[0] if prompts else None


def _split_pair(
    prompt: list[Message] | str | None, turns: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Split the messages of a pair into those of the prompt and those of the two responses."""
    # Many sets repeat the prompt at the start of both responses. Twice, it would be read twice.
    if isinstance(prompt, list) and not all(side[: len(prompt)] == prompt for side in turns):
        return prompt, turns
    length = len(prompt) if isinstance(prompt, list) else _common_prefix(*turns)
    context = turns[0][:length]
    if isinstance(prompt, str):
        if not context:
            return list(Record.single_turn(prompt).messages[:1]), turns
        if prompt.strip() not in (str(message["content"]).strip() for message in context):
            raise UserError(
                f"column 'prompt' is none of the messages that 'chosen' and 'rejected' begin with:"
                f" {prompt[:60]!r}; name it in data.ignore_columns, or give responses alone"
            )
    if not context:
        raise UserError(
            "columns 'chosen' and 'rejected' begin with different messages;"
            " give a column 'prompt' with messages"
        )
    return context, [messages[length:] for messages in turns]


def _common_prefix(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Return the length of the common start of two responses, in characters or messages.

    At least the last element is left to each. So is a space before the difference, as in TRL:
    tokenizers attach it to the word that follows.
    """
    shorter = min(len(chosen), len(rejected))
    differing = (index for index in range(shorter) if chosen[index] != rejected[index])
    length = next(differing, max(shorter - 1, 0))
    return length - 1 if length and chosen[length - 1] == " " else length


def _json_value(row: JsonRow, column: str, kind: type, default: JsonValue) -> JsonValue:
    # CSV has only strings, and some JSON files hold JSON in strings.
    value = row.get(column)
    if value is None or value == "":
        return default
    value = parse_json(value, column) if isinstance(value, str) else value
    if not isinstance(value, kind):
        raise UserError(f"column '{column}' holds {type(value).__name__}, expected {kind.__name__}")
    return value


def _add_shared_columns(record: Record, row: JsonRow) -> Record:
    """Put the columns that any conversation may have where they belong: `SHARED_COLUMNS`."""
    changes: Json = {}
    if system := optional_string(row, "system"):
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

    read: Callable[[JsonRow], Record]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()


# Columns that every format but `text` reads.
SHARED_COLUMNS: Final = ("system", "tools", "chat_template_kwargs")
# Columns in which the prompt of a preference pair may stand.
_PAIR_PROMPTS: Final = ("prompt", "conversations", "instruction")
FORMATS: Final = {
    # Order decides in `detect`: the first whose columns are there. Conversations stand before the
    # columns of single prompts, which such files often have beside them.
    "messages": Format(_read_conversation("messages"), ("messages",)),
    "sharegpt": Format(_read_conversation("conversations"), ("conversations",)),
    "prompt_completion": Format(_from_prompt_completion, ("prompt", "completion")),
    "alpaca": Format(_from_alpaca, ("instruction", "output"), ("input", "history")),
    "question_answer": Format(_from_question_answer, ("question", "answer")),
    "text": Format(_from_text, ("text",)),
    "preference": Format(_from_preference, ("chosen", "rejected"), (*_PAIR_PROMPTS, "input")),
}


def detect(rows: Sequence[JsonRow], where: str) -> str:
    """Return the format whose columns the rows have.

    Raises:
        UserError: it is none of them.

    Example:
        >>> detect([{"question": "2 + 3?", "answer": "5"}], "train.jsonl")
        'question_answer'
    """
    # Arrow has every column in every row, so those that hold something come before all others.
    columns = {name for row in rows for name, value in row.items() if value is not None}
    present = {name for row in rows for name in row}
    # LLaMA-Factory's pairs, whose conversations are the prompt
    if {"conversations", "chosen", "rejected"} <= columns:
        return "preference"
    # The first format whose columns are all there. Further columns do not count.
    for names in (columns, present):
        for name, form in FORMATS.items():
            if set(form.columns) <= names:
                return name
    expected = "; ".join(f"{name} ({', '.join(form.columns)})" for name, form in FORMATS.items())
    shown = ", ".join(f"'{name}'" for name in sorted(columns)) or "none"
    readable = {name: (*form.optional, *SHARED_COLUMNS) for name, form in FORMATS.items()}
    required = {name: form.columns for name, form in FORMATS.items()}
    advice = suggest_columns(columns, required, readable)
    raise UserError(
        f"{where}: the columns {shown} match no format; expected those of {expected}{advice}"
    )


def normalize(rows: Sequence[JsonRow], form: str, where: str) -> list[Record]:
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


def read_rows(rows: Sequence[JsonRow], form: str) -> tuple[dict[int, Record], dict[int, str]]:
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
            present = ", ".join(f"'{name}'" for name in row if row[name] is not None) or "none"
            bad[number] = f" has no column '{error}' (format {form}); it has {present}"
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
