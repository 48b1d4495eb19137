"""Columns and keys of rows that nothing reads. They are refused, not lost. Pure functions."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from jax_ordermerge.data import turns
from jax_ordermerge.data.formats import FORMATS, SHARED_COLUMNS, Record, is_filled
from jax_ordermerge.data.synonyms import advise
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow, JsonValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names that describe a row and are not meant to be learned, in any format and at any depth, as are
# names that end in "_id". Many templates do not print the name of the tool that answers.
_NEUTRAL = (
    "id idx index uuid row source origin dataset split category topic subject type task domain "
    "level difficulty tag tags language lang license url created date time timestamp model "
    "generator metadata meta score score_chosen score_rejected parallel_tool_calls messages.name"
)
# What pandas writes its index under.
NEUTRAL: Final = frozenset([*_NEUTRAL.split(), "Unnamed: 0", "__index_level_0__"])
# tatsu-lab/alpaca has the rendered row beside its parts.
NEUTRAL_OF_FORMAT: Final = {"alpaca": ("text",)}
# A key is tried in so many records: a template may use it in some places only, as Qwen3 does with
# the reasoning of the last turn.
TRIALS: Final = 8
# The names of arguments are data and no keys: one place stands for all of them.
_NAMED_BY_USERS: Final = ("properties", "$defs", "definitions", "patternProperties")
_REMOVED: Final = object()


class Place(NamedTuple):
    """Where a value stands in a record, in all messages of a role and all elements of lists."""

    path: tuple[str, ...]
    role: str = ""

    @property
    def name(self) -> str:
        return ".".join(self.path)


def read_columns(
    rows: Sequence[Json], aliases: Mapping[str, str], ignore: Sequence[str]
) -> list[Json]:
    """Return rows without the columns to ignore, and with those of other names under both.

    Args:
        rows: rows of a source.
        aliases: `data.columns`. They apply where a row has the name: files may differ.
        ignore: `data.ignore_columns`.

    Example:
        >>> read_columns(
        ...     [{"question": "Hi", "solution": "Hello", "answer": "5"}],
        ...     {"answer": "solution"},
        ...     ["answer"],
        ... )
        [{'question': 'Hi', 'solution': 'Hello', 'answer': 'Hello'}]
    """
    if not aliases and not ignore:
        return list(rows)
    # The columns to ignore go first: an alias may then take the name of one of them.
    bare = [{name: value for name, value in row.items() if name not in ignore} for row in rows]
    return [
        row | {name: row[alias] for name, alias in aliases.items() if alias in row} for row in bare
    ]


def check_unused(
    rows: Sequence[JsonRow],
    records: Sequence[Record],
    form: str,
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    aliases: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    where: str = "",
) -> list[str]:
    """Return the columns and keys that are passed over, and refuse all others that nothing reads.

    Args:
        rows: rows of a source, before `read_columns`.
        records: what was read from them.
        form: their format.
        template: a name of `chat.TEMPLATES`.
        tokenizer: its chat template decides which keys of messages are used.
        aliases: `data.columns`: further columns that are read, by the names of the format.
        ignore: columns and keys to pass over, by `data.ignore_columns`.
        where: name of the source, for the message.

    Raises:
        UserError: columns or keys are neither used, nor neutral, nor in `ignore`; all are named.
    """
    aliases = aliases or {}
    readable = {*FORMATS[form].columns, *FORMATS[form].optional}
    readable |= set() if form == "text" else set(SHARED_COLUMNS)
    # The user has put another column in the place of these.
    hidden = {
        name
        for name, alias in aliases.items()
        if name != alias and any(is_filled(row.get(name)) and alias in row for row in rows)
    }
    used = readable - hidden | {alias for name, alias in aliases.items() if name in readable}
    # Empty cells say nothing that could be lost: Arrow and CSV have every column in every row.
    columns = {name for row in rows for name, value in row.items() if is_filled(value)}
    unused = {name: name for name in columns - (used - set(ignore))}
    unused |= unused_keys(records, template, tokenizer, ignore)
    neutral = NEUTRAL | set(NEUTRAL_OF_FORMAT.get(form, ())) | set(ignore) | hidden
    refused = sorted(
        shown
        for shown, name in unused.items()
        if not {name, name.rpartition(".")[2]} & neutral and not name.endswith("_id")
    )
    if refused:
        raise UserError(
            f"{where}: nothing reads {', '.join(refused)} (format {form}, template {template});"
            f" {advise(refused, readable - columns)}"
        )
    return sorted(unused)


def unused_keys(
    records: Sequence[Record],
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    ignore: Sequence[str] = (),
) -> dict[str, str]:
    """Return the keys of messages, tools and variables that do not change a template's text.

    A key counts as used where the text is another one with another value. Only this is certain: the
    text of a template does not tell which variable has the attribute that it names.

    Args:
        records: of a source.
        template: a name of `chat.TEMPLATES`.
        tokenizer: with the chat template.
        ignore: keys that `without_keys` removes.

    Returns:
        The names by what is shown: with the role where messages of other roles use the key.
    """
    holders: dict[Place, list[Record]] = {}
    for record in records:
        # Of a pair both sides: a key may stand in rejected responses only.
        for side in (record, record.rejected):
            if side is not None:
                for place in set(_places(side)):
                    if len(holders.setdefault(place, [])) < TRIALS:
                        holders[place].append(side)
    used: set[Place] = set()
    unused: set[Place] = set()
    # Outer places first: of a key that is not read, the keys in it are not named too.
    for place in sorted(holders, key=lambda place: len(place.path)):
        if any(place._replace(path=place.path[:end]) in unused for end in range(len(place.path))):
            continue
        is_used = (
            place.name not in ignore
            and template == "chat"
            and any(_changes_text(record, place, tokenizer) for record in holders[place])
        )
        (used if is_used else unused).add(place)
    if template == "chat":
        # that the calls of a message are in the text is checked for each row
        unused.discard(Place(("messages", "tool_calls"), "assistant"))
    names = {place.name for place in used}
    return {
        f"{place.name} ({place.role})" if place.name in names else place.name: place.name
        for place in sorted(unused)
    }


def without_keys(record: Record, names: Sequence[str]) -> Record:
    """Return a record without the keys of messages, tools or variables that have these names.

    Raises:
        UserError: a name is that of what messages say.
    """
    for name in names:
        path = tuple(name.split("."))
        if len(path) < 2 or path[0] not in ("messages", "tools", "chat_template_kwargs"):
            continue
        if name in ("messages.role", "messages.content", "messages.tool_calls"):
            raise UserError(f"data.ignore_columns: {name} is what is trained; change the rows")
        # a place has a role, and a name to ignore means it in all of them
        for role in {message["role"] for message in record.messages}:
            record = _edited(record, Place(path, role), lambda value: _REMOVED)
        if record.rejected is not None:
            rejected = without_keys(record.rejected, [name])
            record = dataclasses.replace(record, rejected=rejected)
    return record


def _places(record: Record) -> Iterator[Place]:
    for message in record.messages:
        if len(message) > 2:  # most have no more than role and content
            bare = {key: value for key, value in message.items() if key not in ("role", "content")}
            yield from _nested(bare, Place(("messages",), message["role"]))
    yield from _nested({"tools": record.tools}, Place(()))
    yield from _nested(record.template_kwargs, Place(("chat_template_kwargs",)))


def _nested(value: object, place: Place) -> Iterator[Place]:
    """Yield the places of all values in a mapping, and in those in it."""
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(item, Mapping):
            continue
        for key, part in item.items():
            if is_filled(part):
                named = place.path[-1:] and place.path[-1] in _NAMED_BY_USERS
                inner = place._replace(path=(*place.path, "*" if named else key))
                yield inner
                # that what a call says is in the text is checked for each call
                if key != "arguments":
                    yield from _nested(part, inner)


def _changes_text(record: Record, place: Place, tokenizer: "PreTrainedTokenizerBase") -> bool:
    try:
        text = _texts(record, tokenizer)
        return any(
            _texts(_edited(record, place, change), tokenizer) != text
            for change in (_alter, _remove)
        )
    except UserError:
        return True  # the template needs it, or refuses the record, which is reported elsewhere


def _texts(record: Record, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    # Some variables, such as enable_thinking, stand in the generation prompt alone.
    return turns.render_chat(tokenizer, record), turns.render_chat(
        tokenizer, record, -1, generation=True
    )


def _alter(value: object) -> object:
    """Return another value of the same type; what holds others is removed."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value + "x" if isinstance(value, str) else _REMOVED


def _remove(value: object) -> object:
    # A text that matters only by being there is not read.
    return value if isinstance(value, str) else _REMOVED


def _edited(record: Record, place: Place, change: Callable[[JsonValue], object]) -> Record:
    outer, *path = place.path
    if outer == "messages":
        messages = tuple(
            _edit(message, path, change) if message["role"] == place.role else message
            for message in record.messages
        )
        return dataclasses.replace(record, messages=messages)
    parts = {"tools": record.tools, "chat_template_kwargs": record.template_kwargs}
    edited = _edit(parts, place.path, change)
    return dataclasses.replace(
        record,
        tools=tuple(edited.get("tools", ())),
        template_kwargs=edited.get("chat_template_kwargs", {}),
    )


def _edit(
    value: JsonValue, path: Sequence[str], change: Callable[[JsonValue], object]
) -> JsonValue:
    """Return a value with what stands at a path changed or removed, in all elements of lists."""
    if isinstance(value, (list, tuple)):
        return [_edit(item, path, change) for item in value]
    if not isinstance(value, Mapping):
        return value
    name, *rest = path
    edited = {}
    for key, part in value.items():
        if name in (key, "*"):
            part = _edit(part, rest, change) if rest else change(part)
        if part is not _REMOVED:
            edited[key] = part
    return edited
