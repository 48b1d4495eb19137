"""Conversations as text of a chat template, split into context and learned responses."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from jax_ordermerge.data.formats import Record
from jax_ordermerge.data.messages import Message
from jax_ordermerge.data.pieces import Piece
from jax_ordermerge.data.turn_layout import Turn, TurnLayout, shape, with_placeholders
from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A template with this mark says itself what assistants write.
GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
COMMENT: Final = re.compile(r"\{#.*?#\}", re.DOTALL)


class ChangedPrefix(UserError):
    """The text of a conversation does not begin with that of its first messages."""


class SpecialTokens(NamedTuple):
    """BOS, EOS and all special tokens of a tokenizer."""

    bos: int | None  # None where the tokenizer does not add one
    eos: int
    ids: frozenset[int]
    texts: tuple[str, ...]


class TurnSplitter:
    """Splits conversations into context and responses with the template of one tokenizer.

    Args:
        tokenizer: its chat template is used.
        special: its special tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens) -> None:
        self.tokenizer, self.special = tokenizer, special
        # The comment on top of a published template names the marks, too.
        is_marked = GENERATION.search(COMMENT.sub("", str(tokenizer.chat_template)))
        self._find_turns = _find_marked_turns if is_marked else _find_unmarked_turns
        self._seen: set[bytes] = set()
        self._layouts: dict[bytes, TurnLayout | None] = {}

    def split(self, record: Record) -> list[Piece]:
        """Split the text of a conversation into context and responses, ending in a response.

        A response begins after its generation prompt and ends with its end token.

        Raises:
            UserError: the template refuses the record, leaves out a part of it, or does not let the
                responses be separated.
        """
        text = render_chat(self.tokenizer, record)
        turns = self._look_up(record, text)
        if turns is None:
            turns = self._find_turns(record, text, self.tokenizer, self.special)
            for turn in turns:
                _check_learned(record, turn.message, text[turn.start : turn.end], self.tokenizer)
        _check_context(record, text)
        pieces, done = [], 0
        for turn in turns:
            pieces += [
                Piece(text[done : turn.start], False),
                Piece(text[turn.start : turn.end], True),
            ]
            done = turn.end
        return pieces

    def _look_up(self, record: Record, text: str) -> list[Turn] | None:
        """Return the turns by the layout of the record's shape, None where they must be found."""
        placeholders = with_placeholders(record)
        key = shape(placeholders)
        # A layout takes as many renderings as a record, so the first of a shape is not worth one.
        if key not in self._seen:
            self._seen.add(key)
            return None
        if key not in self._layouts:
            self._layouts[key] = self._find_layout(placeholders)
        layout = self._layouts[key]
        # The checks of `_check_learned` and the end of a turn, on the text that was found: where
        # they do not hold, the slow way decides, and says what is wrong.
        turns = None if layout is None else layout.find(text, record)
        if turns is None or any(
            # The end of the turn may then be that of the content.
            str(record.messages[turn.message]["content"]).rstrip().endswith(self.special.texts)
            or _first_missing(
                _content_of(record.messages[turn.message]), text[turn.start : turn.end]
            )
            is not None
            for turn in turns
        ):
            return None
        return turns

    def _find_layout(self, placeholders: Record) -> TurnLayout | None:
        try:
            text = render_chat(self.tokenizer, placeholders)
            turns = self._find_turns(placeholders, text, self.tokenizer, self.special)
        # A template may refuse numbers as contents. Each record is then split by itself.
        except UserError:
            return None
        return TurnLayout.of(text, turns, placeholders)


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


def _find_unmarked_turns(
    record: Record, text: str, tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens
) -> list[Turn]:
    """Find the responses in the text of a template that does not mark them."""
    turns: list[Turn] = []
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
        turns.append(Turn(number, len(prompt), len(_without_separator(answered, special))))
    return turns


def _find_marked_turns(
    record: Record, text: str, tokenizer: "PreTrainedTokenizerBase", special: SpecialTokens
) -> list[Turn]:
    """Find the responses in the text of a template that marks them with {% generation %}.

    The marks say only which text belongs to which response. As without marks, a response begins
    after its generation prompt and ends with its end token: templates mark the line feeds around
    it, or the head of the turn, which a model does not write.
    """
    spans = _marked_spans(tokenizer, record, text, len(record.messages))
    turns: list[Turn] = []
    for number in record.learned:
        context = render_chat(tokenizer, record, number)
        answered = render_chat(tokenizer, record, number + 1)
        # Counted in prefixes, because a template may mark a turn in several parts, or not at all.
        before = len(_marked_spans(tokenizer, record, context, number))
        answered_spans = _marked_spans(tokenizer, record, answered, number + 1)
        turn = spans[before : len(answered_spans)]
        if not turn:
            continue
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
        turns.append(Turn(number, start, start + len(_without_separator(text[start:end], special))))
    if not turns:
        raise UserError("the chat template marks no response with {% generation %}")
    return turns


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
    position = 0
    for number, message in enumerate(record.messages):
        if message["role"] == "assistant":
            parts = [str(call["function"]["name"]) for call in message.get("tool_calls", ())]
        else:
            parts = [str(message["content"])]
        # Contents stand in order: a search from the start for each is quadratic.
        place = text.find(parts[0], position) if parts else position
        if place >= 0 and len(parts) == 1:
            position = place + len(parts[0])
        elif (missing := _first_missing(parts, text)) is not None:
            raise UserError(
                f"the chat template leaves out message {number} ({message['role']}):"
                f" {missing[:60]!r}; use another role, or a template that prints it"
            )


def _content_of(message: Message) -> Iterator[str]:
    """Yield what must be in the text of an assistant message."""
    yield str(message["content"])
    for key in ("reasoning_content", "reasoning", "thinking"):
        yield str(message.get(key) or "")
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        yield str(function["name"])
        # names of arguments too: an argument without its name is another call
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


def _first_missing(parts: Iterable[str], text: str) -> str | None:
    """Return the first part that is not in a text, whatever the white space of both.

    A part may stand in the text as it is or as JSON, as templates print calls and their results.
    """
    squeezed = ""
    for part in parts:
        if part in text:
            continue
        # Templates trim contents and put line feeds around reasoning.
        squeezed = squeezed or "".join(text.split())
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


def _marked_spans(
    tokenizer: "PreTrainedTokenizerBase", record: Record, text: str, end: int
) -> list[tuple[int, int]]:
    """Return the marked spans of the messages before number `end`, in characters of their text."""
    from transformers.utils.chat_template_utils import render_jinja_template  # slow to import

    # `apply_chat_template` gives marks in tokens only, where borders inside a token are lost.
    if end == 0:
        return []
    (marked,), (spans,) = render_jinja_template(
        [list(record.messages[:end])],
        tools=list(record.tools) or None,
        chat_template=tokenizer.get_chat_template(tools=list(record.tools) or None),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **record.template_kwargs},
    )
    assert marked == text, "transformers rendered a marked template in two ways"
    return [(start, stop) for start, stop in spans if stop > start]
