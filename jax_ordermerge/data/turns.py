"""Conversations as text of a chat template, split into context and learned responses."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from jax_ordermerge.data.formats import Record
from jax_ordermerge.data.messages import Message
from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A template with this mark says itself what assistants write.
GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
COMMENT: Final = re.compile(r"\{#.*?#\}", re.DOTALL)


class ChangedPrefix(UserError):
    """The text of a conversation does not begin with that of its first messages."""


class Piece(NamedTuple):
    """A part of the rendered text."""

    text: str
    learned: bool


class SpecialTokens(NamedTuple):
    """BOS, EOS and all special tokens of a tokenizer."""

    bos: int | None  # None where the tokenizer does not add one
    eos: int
    ids: frozenset[int]
    texts: tuple[str, ...]


def split_turns(
    record: Record, tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens
) -> list[Piece]:
    """Split the text of a conversation into context and responses, in turn, ending in a response.

    A response begins after its generation prompt and ends with its end token.

    Raises:
        UserError: the template refuses the record, leaves out a part of it, or does not let the
            responses be separated.
    """
    # The comment on top of a published template names the marks, too.
    if GENERATION.search(COMMENT.sub("", str(tokenizer.chat_template))):
        pieces = _split_marked_turns(record, tokenizer, special)
    else:
        pieces = _split_unmarked_turns(record, tokenizer, special)
    _check_context(record, render_chat(tokenizer, record))
    return pieces


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    record: Record,
    end: int | None = None,
    *,
    generation: bool = False,
) -> str:
    """Return the text of the messages before number `end`, perhaps with a generation prompt.

    Raises:
        UserError: the template refuses the messages.
    """
    messages = record.messages[:end]
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(record.tools) or None,
            tokenize=False,
            add_generation_prompt=generation,
            **record.template_kwargs,
        )
    except Exception as error:  # templates raise errors of any kind on roles they do not take
        roles = ", ".join(str(message["role"]) for message in messages) or "none"
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"the chat template refuses the roles {roles}: {reason}") from error
    return str(text)


def _split_unmarked_turns(
    record: Record, tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens
) -> list[Piece]:
    """Split a conversation into context and responses with a template that does not mark them."""
    text = render_chat(tokenizer, record)
    pieces: list[Piece] = []
    done = 0
    for number in record.learned:
        prompt = render_chat(tokenizer, record, number, generation=True)
        answered = render_chat(tokenizer, record, number + 1)
        # Some templates rewrite earlier turns (drop the reasoning, add a date). Then no split of
        # the final text is what generation would have seen.
        if not (text.startswith(answered) and answered.startswith(prompt)):
            raise ChangedPrefix(
                f"the chat template changes the text before the response in message {number} once"
                " it is answered, so the response cannot be separated; mark responses in the"
                " template with {% generation %} or set data.template"
            )
        end = len(_without_separator(answered, special))
        _check_learned(record, number, text[len(prompt) : end], tokenizer)
        pieces += [Piece(text[done : len(prompt)], False), Piece(text[len(prompt) : end], True)]
        done = end
    return pieces


def _split_marked_turns(
    record: Record, tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens
) -> list[Piece]:
    """Split a conversation with a template that marks responses with {% generation %}.

    The marks say only which text belongs to which response. As without marks, a response begins
    after its generation prompt and ends with its end token: templates mark the line feeds around
    it, or the head of the turn, which a model does not write.
    """
    text, spans = _render_marked(tokenizer, record, len(record.messages))
    pieces: list[Piece] = []
    done = 0
    for number in record.learned:
        # Counted in prefixes, because a template may mark a turn in several parts, or not at all.
        before = len(_render_marked(tokenizer, record, number)[1])
        answered, answered_spans = _render_marked(tokenizer, record, number + 1)
        turn = spans[before : len(answered_spans)]
        if not turn:
            continue
        context = render_chat(tokenizer, record, number)
        prompt = render_chat(tokenizer, record, number, generation=True)
        header = prompt.removeprefix(context)
        first, last = turn[0][0], turn[-1][1]
        start = text.rfind(header, max(0, first - len(header)), first + len(header)) + len(header)
        is_last = number == record.learned[-1]
        if start < len(header) or (is_last and not text.startswith(prompt)):
            raise UserError(
                f"the generation prompt of the chat template does not precede the response in"
                f" message {number} that it marks with {{% generation %}}: generation would use"
                " another prompt than training; mend the template or set data.template"
            )
        # What closes the turn where nothing follows it. The next turn's start is never in it.
        closing = answered[answered_spans[-1][1] :]
        end = last + len(closing) if text[last:].startswith(closing) else last
        end = start + len(_without_separator(text[start:end], special))
        _check_learned(record, number, text[start:end], tokenizer)
        pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
        done = end
    if not pieces:
        raise UserError("the chat template marks no response with {% generation %}")
    return pieces


def _check_learned(
    record: Record, number: int, learned: str, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Check that all that an assistant message says is in the text that is learned."""
    content = list(_content_of(record.messages[number]))
    missing = _first_missing(content, learned)
    if missing is not None:
        # Qwen3 with enable_thinking: false has the empty reasoning in its generation prompt.
        context = render_chat(tokenizer, record, number)
        turn = render_chat(tokenizer, record, number + 1).removeprefix(context)
        if turn.rstrip().endswith(learned.rstrip()):
            missing = _first_missing(content, turn)
    if missing is not None:
        raise UserError(
            f"the chat template leaves {missing[:60]!r} out of the response in message {number},"
            " so it would not be learned; use a template that prints it"
        )


def _check_context(record: Record, text: str) -> None:
    # Earlier answers may be shortened on purpose, e.g. without their reasoning.
    for number, message in enumerate(record.messages):
        content = str(message["content"])
        if message["role"] != "assistant" and _first_missing([content], text) is not None:
            raise UserError(
                f"the chat template leaves out message {number} ({message['role']}):"
                f" {content[:60]!r}; use another role, or a template that prints it"
            )


def _content_of(message: Message) -> Iterator[str]:
    """Yield what must be in the text of an assistant message."""
    yield str(message["content"])
    for key in ("reasoning_content", "reasoning", "thinking"):
        yield str(message.get(key) or "")
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        yield str(function["name"])
        yield from _leaves(function.get("arguments", {}))


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield str(name)
            yield from _leaves(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _first_missing(parts: Sequence[str], text: str) -> str | None:
    """Return the first part that is not in a text, whatever the white space of both.

    A part may stand in the text as it is or as JSON, as templates print calls and their results.
    """
    # Templates trim contents and put line feeds around reasoning.
    squeezed = "".join(text.split())
    for part in parts:
        forms = [part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]]
        # as templates without `tojson` print booleans
        forms += [part.capitalize()] if part in ("true", "false") else []
        if not any("".join(form.split()) in squeezed for form in forms):
            return part
    return None


def _without_separator(turn: str, special: SpecialTokens) -> str:
    # White space after the end of a turn separates it from the next one. The model does not have
    # to write it.
    stripped = turn.rstrip()
    return stripped if stripped.endswith(special.texts) else turn


def _render_marked(
    tokenizer: "PreTrainedTokenizerBase", record: Record, end: int
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of the messages before number `end`, and its marked spans in characters."""
    from transformers.utils.chat_template_utils import render_jinja_template  # slow to import

    # `apply_chat_template` gives marks in tokens only, where borders inside a token are lost.
    if end == 0:
        return "", []
    text = render_chat(tokenizer, record, end)
    (marked,), (spans,) = render_jinja_template(
        [list(record.messages[:end])],
        tools=list(record.tools) or None,
        chat_template=tokenizer.get_chat_template(tools=list(record.tools) or None),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **record.template_kwargs},
    )
    assert marked == text, "transformers rendered a marked template in two ways"
    return text, [(start, stop) for start, stop in spans if stop > start]
