"""Chat templates that print today's date, pinned to one date.

The clock would be a hidden input: a run that continues after midnight would read other tokens, and
two processes could disagree. So the date is an input like any other. It becomes part of the
template's text: every reader of `tokenizer.chat_template` sees it, and a digest of it covers it.
"""

import datetime as dt
import json
import re
from typing import TYPE_CHECKING, Final

from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The function of transformers with which templates read the clock (Llama 3.2, SmolLM3, Mistral).
_CLOCK: Final = re.compile(r"\bstrftime_now\b")
_COMMENT: Final = re.compile(r"\{#.*?#\}", re.DOTALL)
_DIRECTIVE: Final = re.compile(r"%[-_0^#]?[A-Za-z]")
# A macro hides the function of that name. Why not a keyword argument, which hides it too? From 5.24
# on transformers passes plain data alone to a template and makes text of a function. The line feed
# at the end is dropped (trim_blocks), and what follows is the first line again (lstrip_blocks).
_MACRO: Final = (
    "{%- macro strftime_now(format) -%}"
    r"{%- set pinned = namespace(text=format | replace('%%', '\x00')) -%}"
    "{%- for code, value in CODES.items() -%}"
    "{%- set pinned.text = pinned.text | replace(code, value) -%}"
    "{%- endfor -%}"
    r"{{- pinned.text | replace('\x00', '%') -}}"
    "{%- endmacro %}\n"
)


def prints_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a chat template of the tokenizer reads the clock."""
    return any(
        _CLOCK.search(_COMMENT.sub("", template)) for template in _templates(tokenizer).values()
    )


def reads_clock(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a chat template prints another date tomorrow: it is not pinned."""
    pinned = _MACRO.partition("CODES")[0]
    return prints_date(tokenizer) and not all(
        template.startswith(pinned) for template in _templates(tokenizer).values()
    )


def pin_date(
    tokenizer: "PreTrainedTokenizerBase",
    configured: dt.date | None = None,
    recorded: dt.date | None = None,
) -> dt.date | None:
    """Let the chat templates of a tokenizer print one date, at midnight, instead of today's.

    All processes call it, and all get the date of process 0.

    Args:
        tokenizer: is changed in place. Files that are exported are copied from those of the base,
            so a served model prints the date of its day, as its family does.
        configured: `data.date`.
        recorded: the date of the first start of a run, which goes before today's.

    Returns:
        the date; None where no template prints one.

    Raises:
        UserError: a date is configured, and no template prints one.
    """
    from jax_ordermerge import processes  # imports jax, which `pin_local_date` does without

    date = _choose_date(tokenizer, configured, recorded)
    if date is not None:
        date = dt.date.fromordinal(processes.broadcast(date.toordinal()))
        _pin_all(tokenizer, date)
    return date


def pin_local_date(
    tokenizer: "PreTrainedTokenizerBase",
    configured: dt.date | None = None,
    recorded: dt.date | None = None,
) -> dt.date | None:
    """Do what `pin_date` does in a process that has no peers."""
    date = _choose_date(tokenizer, configured, recorded)
    if date is not None:
        _pin_all(tokenizer, date)
    return date


def _choose_date(
    tokenizer: "PreTrainedTokenizerBase", configured: dt.date | None, recorded: dt.date | None
) -> dt.date | None:
    if prints_date(tokenizer):
        return configured or recorded or today()
    if configured is None:
        return None
    raise UserError(
        f"data.date = {configured}: the chat template does not read the clock (strftime_now);"
        " remove it"
    )


def _pin_all(tokenizer: "PreTrainedTokenizerBase", date: dt.date) -> None:
    pinned = {name: _pin(template, date) for name, template in _templates(tokenizer).items()}
    tokenizer.chat_template = pinned if isinstance(tokenizer.chat_template, dict) else pinned[""]


def today() -> dt.date:
    """Return the local date, which is what a template that reads the clock would print."""
    return dt.date.today()


def _templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    # a tokenizer may have several, by name: one for tools, one for documents
    template = tokenizer.chat_template
    return template if isinstance(template, dict) else {"": str(template or "")}


def _pin(template: str, date: dt.date) -> str:
    # Every directive in the text of the template, because the clock may be asked by a variable.
    midnight = dt.datetime.combine(date, dt.time())
    codes = sorted(set(_DIRECTIVE.findall(template)))
    values = json.dumps({code: midnight.strftime(code) for code in codes})
    return _MACRO.replace("CODES", values) + template
