"""Columns and keys of rows that nothing reads. They are refused, not lost. Pure functions."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from jax_ordermerge.data import turns
from jax_ordermerge.data.formats import FORMATS, SHARED_COLUMNS, Record, Row
from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names that describe a row and are not meant to be learned, in any format and at any depth, as are
# names that end in "_id". Many templates do not print the name of the tool that answers.
_NEUTRAL = (
    "id idx index uuid row source origin dataset split category topic subject type task domain "
    "level difficulty tag tags language lang license url created date time timestamp model "
    "generator metadata meta score score_chosen score_rejected messages.name"
)
NEUTRAL: Final = frozenset(_NEUTRAL.split())
# tatsu-lab/alpaca has the rendered row beside its parts.
NEUTRAL_OF_FORMAT: Final = {"alpaca": ("text",)}
# A key is tried in so many records: a template may use it in some places only, as Qwen3 does with
# the reasoning of the last turn.
TRIALS: Final = 8


def check_unused(
    rows: Sequence[Row],
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
        rows: rows of a source.
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
    used = {*FORMATS[form].columns, *FORMATS[form].optional}
    used |= set() if form == "text" else set(SHARED_COLUMNS)
    used |= {alias for name, alias in (aliases or {}).items() if name in used}
    # An empty cell says nothing: Arrow and CSV have every column in every row.
    columns = {name for row in rows for name, value in row.items() if _is_filled(value)}
    unused = (columns - used) | set(unused_keys(records, template, tokenizer))
    neutral = NEUTRAL | set(NEUTRAL_OF_FORMAT.get(form, ())) | set(ignore)
    refused = sorted(
        name
        for name in unused
        if not {name, name.rpartition(".")[2]} & neutral and not name.endswith("_id")
    )
    if refused:
        raise UserError(
            f"{where}: nothing reads {', '.join(refused)} (format {form}, template {template});"
            " rename them with data.columns, or name them in data.ignore_columns to pass over them"
        )
    return sorted(unused)


def unused_keys(
    records: Sequence[Record], template: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """Return the keys of messages, and `tools`, that do not change the text of a chat template.

    A key counts as used where the text is another one without it. Only this is certain: the text
    of a template does not tell which variable has the attribute that it names.
    """
    places: dict[str, list[Record]] = {}
    for record in records:
        for side in (record, record.rejected):
            if side is not None:
                for key in _keys(side):
                    places.setdefault(key, []).append(side)
    return [
        key
        for key, holders in places.items()
        if template != "chat"
        or not any(_changes_text(record, key, tokenizer) for record in holders[:TRIALS])
    ]


def _is_filled(value: Any) -> bool:
    # 0 and False are values; an array has no truth value
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def _keys(record: Record) -> set[str]:
    keys = {"tools"} if record.tools else set()
    keys |= {f"chat_template_kwargs.{name}" for name in record.template_kwargs}
    for message in record.messages:
        keys |= {f"messages.{name}" for name in message} - {
            "messages.role",
            "messages.content",
            "messages.tool_calls",
        }
        for call in message.get("tool_calls", ()):
            keys |= {f"messages.tool_calls.{name}" for name in call if name != "function"}
            further = set(call.get("function", ())) - {"name", "arguments"}
            keys |= {f"messages.tool_calls.function.{name}" for name in further}
    return keys


def _changes_text(record: Record, key: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    try:
        return _texts(record, tokenizer) != _texts(_without(record, key), tokenizer)
    except UserError:
        return True  # the template needs it, or refuses the record, which is reported elsewhere


def _texts(record: Record, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    # Some variables, such as enable_thinking, stand in the generation prompt alone.
    return turns.render_chat(tokenizer, record), turns.render_chat(
        tokenizer, record, -1, generation=True
    )


def _without(record: Record, key: str) -> Record:
    place, _, name = key.partition(".")
    if key == "tools":
        return dataclasses.replace(record, tools=())
    if place == "chat_template_kwargs":
        kwargs = {
            variable: value
            for variable, value in record.template_kwargs.items()
            if variable != name
        }
        return dataclasses.replace(record, template_kwargs=kwargs)
    *path, last = name.split(".")
    messages = copy.deepcopy([dict(message) for message in record.messages])
    for message in messages:
        targets = [message] if not path else list(message.get("tool_calls", ()))
        for target in targets:
            inner = target.get("function", {}) if len(path) == 2 else target
            inner.pop(last, None)
    return dataclasses.replace(record, messages=tuple(messages))
