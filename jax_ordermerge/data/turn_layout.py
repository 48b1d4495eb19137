"""Where responses lie in the text of a conversation, found in a conversation of placeholders.

What a template writes for the messages before a response can only be known by rendering them. For
every response of a conversation this is quadratic in its length. But templates copy what messages
say and do not look at it. So responses are found once in a conversation of the same shape whose
contents are numbers, and the text between these numbers is found again in the text of every
conversation of the shape. A conversation whose text differs in anything else has no layout.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from jax_ordermerge.data.formats import Record
from jax_ordermerge.data.messages import Message
from jax_ordermerge.json_types import JsonValue

# Numbers, because JSON and text print them alike. Nine digits are the length of the ids of calls
# that Mistral's templates check. The last one stands for the tools.
FIRST_MARK: Final = 730_000_000
TOOLS_MARK: Final = FIRST_MARK + 99_999
MARK: Final = re.compile(r"7300\d{5}")
# Templates take a content apart at these.
REASONING_TAG: Final = re.compile(r"(</?think>)")


class Turn(NamedTuple):
    """The learned part of a message: its number, and first and last + 1 character in the text."""

    message: int
    start: int
    end: int


class _Gap(NamedTuple):
    """The text before what a message (or the tools) says, and whether its content is all it is."""

    literal: str
    mark: int
    is_content: bool


class _Border(NamedTuple):
    """A place in the text: so many characters after the start of a literal."""

    literal: int
    offset: int


def with_placeholders(record: Record) -> Record:
    """Return a record of the same shape whose messages and tools say nothing but numbers.

    Roles, the names of keys, and blank texts stay: templates look at these.

    Example:
        >>> with_placeholders(Record.single_turn("2 + 3?", "5")).messages
        ({'role': 'user', 'content': '730000000'}, {'role': 'assistant', 'content': '730000001'})
    """
    return dataclasses.replace(
        record,
        messages=tuple(
            _message(message, FIRST_MARK + number) for number, message in enumerate(record.messages)
        ),
        # One stands for all: what is between the first and the last is not looked at.
        tools=tuple(_placeholder(tool, TOOLS_MARK) for tool in record.tools[-1:]),
        input="",
    )


def shape(placeholders: Record) -> bytes:
    """Return a key that is equal for records of the same placeholders."""
    described = (
        placeholders.messages,
        placeholders.learned,
        placeholders.tools,
        dict(placeholders.template_kwargs),
    )
    return hashlib.blake2b(json.dumps(described, default=repr).encode(), digest_size=16).digest()


def _message(message: Message, mark: int) -> Message:
    return {
        key: value if key == "role" else _placeholder(value, mark) for key, value in message.items()
    }


def _placeholder(value: JsonValue, mark: int) -> JsonValue:
    if isinstance(value, str):
        return "".join(
            str(mark) if part.strip() and not REASONING_TAG.fullmatch(part) else part
            for part in REASONING_TAG.split(value)
        )
    if isinstance(value, Mapping):
        return {key: _argument(key, part, mark) for key, part in value.items()}
    if isinstance(value, list):
        return [_placeholder(part, mark) for part in value]
    return value


def _argument(key: str, value: JsonValue, mark: int) -> JsonValue:
    # Templates compare it, of tools and of their parameters.
    if key == "type":
        return value
    # The names of arguments differ from call to call. That they end in braces does not.
    if key in ("arguments", "parameters") and isinstance(value, Mapping) and value:
        return {str(mark): mark}
    return _placeholder(value, mark)


class TurnLayout:
    """The text of a template around what messages say, with the places of the responses in it.

    Example:
        >>> pattern = with_placeholders(Record.single_turn("a", "b"))
        >>> layout = TurnLayout.of("Q:730000000 A:730000001.", [Turn(1, 14, 24)], pattern)
        >>> layout.find("Q:2 + 3? A:5.", Record.single_turn("2 + 3?", "5"))
        [Turn(message=1, start=11, end=13)]
        >>> layout.find("Q:2 + 3? B:5.", Record.single_turn("2 + 3?", "5")) is None
        True
    """

    def __init__(
        self, gaps: Sequence[_Gap], last: str, turns: Sequence[tuple[int, _Border, _Border]]
    ) -> None:
        self.gaps, self.last, self.turns = gaps, last, turns

    @classmethod
    def of(cls, text: str, turns: Sequence[Turn], placeholders: Record) -> "TurnLayout | None":
        """Return the layout of a text of placeholders with these turns.

        None where one message is written in several places, or a border is not beside it.
        """
        gaps: list[_Gap] = []
        # starts[n] is where literal n begins: behind the last mark of the gap before it.
        starts, position = [0], 0
        for match in MARK.finditer(text):
            mark = int(match[0])
            if mark != TOOLS_MARK and mark - FIRST_MARK >= len(placeholders.messages):
                return None  # a number of the template
            if gaps and gaps[-1].mark == mark:
                # Parts of one message beside each other, such as its reasoning and its answer, are
                # one gap. Its text is then not the content alone.
                gaps[-1] = gaps[-1]._replace(is_content=False)
            elif any(gap.mark == mark for gap in gaps):
                return None
            else:
                is_content = mark != TOOLS_MARK and placeholders.messages[mark - FIRST_MARK][
                    "content"
                ] == str(mark)
                gaps.append(_Gap(text[position : match.start()], mark, is_content))
                starts.append(match.end())
            # Also where a gap has grown: the next literal begins behind its last mark.
            starts[-1] = position = match.end()
        last = text[position:]
        literals = [*(gap.literal for gap in gaps), last]
        # Without text behind it, nothing says where a gap ends whose text is not known.
        if any(not gap.is_content and not literals[n + 1] for n, gap in enumerate(gaps)):
            return None
        borders = []
        for turn in turns:
            start, end = (_locate(place, starts, literals) for place in (turn.start, turn.end))
            if start is None or end is None:
                return None
            borders.append((turn.message, start, end))
        return cls(gaps, last, borders)

    def find(self, text: str, record: Record) -> list[Turn] | None:
        """Return the turns of a record of this shape in its text, None where the text differs."""
        literals = [*(gap.literal for gap in self.gaps), self.last]
        if not text.startswith(literals[0]):
            return None
        starts, position = [0], len(literals[0])
        for gap, literal in zip(self.gaps, literals[1:], strict=True):
            end = _gap_end(text, position, gap, literal, record)
            if end is None:
                return None
            starts.append(end)
            position = end + len(literal)
        # What the template writes after the last literal is not in the layout.
        if position != len(text):
            return None
        return [
            Turn(message, starts[start.literal] + start.offset, starts[end.literal] + end.offset)
            for message, start, end in self.turns
        ]


def _locate(place: int, starts: Sequence[int], literals: Sequence[str]) -> _Border | None:
    for number, (start, literal) in enumerate(zip(starts, literals, strict=True)):
        if start <= place <= start + len(literal):
            return _Border(number, place - start)
    return None


def _gap_end(text: str, start: int, gap: _Gap, literal: str, record: Record) -> int | None:
    """Return where the text of a gap ends, which is where the next literal begins."""
    if not gap.is_content:
        end = text.find(literal, start)
        return None if end < 0 else end
    content = str(record.messages[gap.mark - FIRST_MARK]["content"])
    # Templates trim contents, at both ends or line feeds only.
    for written in (content, content.strip(), content.strip("\n"), content.lstrip("\n")):
        if text.startswith(written, start) and text.startswith(literal, start + len(written)):
            return start + len(written)
    return None
