"""Prompt templates, and tokens with a mask of what is learned. Pure functions of a tokenizer.

A model is trained on exactly the prompt tokens from which it generates. The prompt is tokenized
alone. The training example is the tokens of prompt and response together where these begin with the
tokens of the prompt. Elsewhere it is the tokens of the prompt followed by those of the response,
tokenized apart: a token across the border, such as of a space that ends the prompt, would otherwise
change the prompt.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from jax_ordermerge.data.formats import Record
from jax_ordermerge.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The template that `auto` stands for, where the data are not messages.
BY_FORMAT: Final = {
    "alpaca": "alpaca",
    "question_answer": "gsm8k",
    "prompt_completion": "plain",
    "text": "plain",
    "preference": "plain",
}
TEMPLATES: Final = ("plain", "alpaca", "gsm8k", "chat")
# A template with this mark says itself what assistants write.
GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")

# The two prompts of Stanford Alpaca, as published in tatsu-lab/stanford_alpaca (Apache-2.0).
ALPACA_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT: Final = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Encoded(NamedTuple):
    """Token numbers of one example, and whether each belongs to a response."""

    tokens: list[int]
    answers: list[bool]


class Piece(NamedTuple):
    """A part of the rendered text."""

    text: str
    learned: bool


def resolve_template(
    template: str, form: str, records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """Return the template that `auto` stands for. Any other name is returned unchanged.

    `auto` is `chat` for messages. Otherwise it follows the format: the prompt of Alpaca for
    `alpaca`, of GSM8K for `question_answer`, and `plain` for prompt and completion strings.

    Args:
        template: a name of `TEMPLATES`, or `auto`.
        form: format of the data.
        records: the data; only the first record is read.
        tokenizer: tokenizer of the base model.

    Raises:
        UserError: unknown template; `chat` or messages without a chat template.
    """
    if template not in (*TEMPLATES, "auto"):
        raise UserError(
            f"data.template = '{template}' is not a template{did_you_mean(template, TEMPLATES)}"
        )
    messages = form in ("messages", "sharegpt") or (bool(records) and records[0].context > 0)
    if template == "auto":
        template = "chat" if messages else BY_FORMAT[form]
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template; set data.template to plain, alpaca or gsm8k,"
            " or add a chat_template.jinja to the base"
        )
    return template


def encode(
    records: Sequence[Record], template: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Tokenize examples and mark what is learned.

    The responses are learned, each with the token that ends it. BOS comes first where the tokenizer
    adds it (with `chat`, where the template writes it), never twice. EOS is appended where the last
    token is not EOS (with `chat`, where it is not a special token). For a text, every token but BOS
    is learned.

    Args:
        records: examples of one source.
        template: a name of `TEMPLATES`.
        tokenizer: a fast tokenizer.

    Raises:
        UserError: no EOS; a conversation with a template for one prompt and one response; a chat
            template whose turns cannot be separated.
    """
    special = _special_tokens(tokenizer)
    if records and records[0].text is not None:
        texts = _ids([str(record.text) for record in records], tokenizer)
        return [_add_bos_and_eos(Encoded(ids, [True] * len(ids)), special) for ids in texts]
    if template != "chat":
        pieces = []
        for record in records:
            prompt, response = render(record, template)
            pieces.append([Piece(prompt, False), Piece(response, True)])
        return [_add_bos_and_eos(each, special) for each in _encode_pieces(pieces, tokenizer)]
    marked = GENERATION.search(str(tokenizer.chat_template))
    split = _split_marked_turns if marked else _split_turns
    pieces = [split(record, tokenizer, special) for record in records]
    return [_end_turn(each, special) for each in _encode_pieces(pieces, tokenizer)]


def prompt_tokens(
    record: Record, template: str, tokenizer: "PreTrainedTokenizerBase"
) -> np.ndarray:
    """Return the prompt of the last message of a record, int32[n]: the same tokens as in `encode`.

    The last message itself is not read: `Record.single_turn("2 + 3?")` is enough.
    """
    if template == "chat":
        return np.asarray(_generation_prompt(record, tokenizer), np.int32)
    ids = _ids([render(record, template)[0]], tokenizer)[0]
    return np.asarray(_with_bos(ids, _special_tokens(tokenizer)), np.int32)


def render(record: Record, template: str) -> tuple[str, str]:
    """Return prompt and response of a template for one prompt and one response.

    `plain` concatenates them. `alpaca` is Stanford's text with the response directly after
    `### Response:`. `gsm8k` is `Question: {prompt}\\nAnswer:` and a space before the response, as
    in lm-evaluation-harness.

    Raises:
        UserError: the record is not one user message and one response.

    Example:
        >>> render(Record.single_turn("2 + 3?", "5"), "gsm8k")
        ('Question: 2 + 3?\\nAnswer:', ' 5')
    """
    roles = [message["role"] for message in record.messages]
    if roles != ["user", "assistant"]:
        raise UserError(
            f"template {template} takes one user and one assistant message,"
            f" an example has {', '.join(roles)}; use chat"
        )
    if record.tools or record.template_kwargs:
        raise UserError(
            f"template {template} has no place for tools and chat_template_kwargs; use chat"
        )
    prompt, response = record.prompt, record.response
    # The space belongs to the response: "Answer:" ends in a token of its own, and the first number
    # keeps the space that tokenizers attach to it.
    if template == "gsm8k":
        return f"Question: {prompt}\nAnswer:", f" {response}"
    if template == "alpaca":
        with_input = ALPACA_WITH_INPUT if record.input else ALPACA_WITHOUT_INPUT
        instruction = prompt.removesuffix(f"\n{record.input}") if record.input else prompt
        return with_input.format(instruction=instruction, input=record.input), response
    return prompt, response


class SpecialTokens(NamedTuple):
    """BOS, EOS and all special tokens of a tokenizer."""

    bos: int | None  # None where the tokenizer does not add one
    eos: int
    ids: frozenset[int]
    texts: tuple[str, ...]


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> SpecialTokens:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos_token, so no response could end;"
            " name one in tokenizer_config.json"
        )
    # Both sources are needed: added tokens such as <|im_end|> need not have a role, and tokens with
    # a role (`eos_token`) need not be added tokens.
    special = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    # Tested by what the tokenizer does, not by what it has: Qwen has a BOS that it never adds.
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    texts = tuple(special.values())
    return SpecialTokens(
        bos if adds_bos else None, tokenizer.eos_token_id, frozenset(special), texts
    )


def _ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if not texts:
        return []
    # without special tokens: templates write their own, and BOS would stand twice
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _with_bos(ids: list[int], special: SpecialTokens) -> list[int]:
    return ids if special.bos is None or ids[:1] == [special.bos] else [special.bos, *ids]


def _add_bos_and_eos(encoded: Encoded, special: SpecialTokens) -> Encoded:
    ids = _with_bos(encoded.tokens, special)
    answers = [False] * (len(ids) - len(encoded.tokens)) + encoded.answers
    # BOS starts every sequence; nothing predicts it
    if ids[:1] == [special.bos]:
        answers[0] = False
    if ids[-1:] != [special.eos]:
        ids, answers = [*ids, special.eos], [*answers, True]
    return Encoded(ids, answers)


def _end_turn(encoded: Encoded, special: SpecialTokens) -> Encoded:
    # A template that ends turns with a special token ends the response by it. A second end token
    # would be learned after the end.
    if encoded.tokens[-1] in special.ids:
        return encoded
    return Encoded([*encoded.tokens, special.eos], [*encoded.answers, True])


def _encode_pieces(
    examples: Sequence[Sequence[Piece]], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Tokenize texts whose pieces alternate between context and response, all in one call.

    Every prefix of pieces is tokenized, so that the border between two pieces is known in tokens.
    """
    prefixes = [
        "".join(piece.text for piece in pieces[: end + 1])
        for pieces in examples
        for end in range(len(pieces))
    ]
    prefix_ids = iter(_ids(prefixes, tokenizer))
    encoded = []
    for pieces in examples:
        *starts, tokens = [next(prefix_ids) for _ in pieces]
        # see the module docstring: the prompt keeps its own tokens
        if tokens[: len(starts[-1])] != starts[-1]:
            tokens = starts[-1] + _ids([pieces[-1].text], tokenizer)[0]
        answers: list[bool] = []
        for ids, piece in zip([*starts, tokens], pieces, strict=True):
            answers += [piece.learned] * (_common_prefix(ids, tokens) - len(answers))
        encoded.append(Encoded(tokens, answers))
    return encoded


def _common_prefix(ids: list[int], tokens: list[int]) -> int:
    # Only before an earlier response can a border lie inside a token. The token then counts as part
    # of that response.
    if tokens[: len(ids)] == ids:
        return len(ids)
    return next(index for index in range(len(ids)) if ids[index] != tokens[index])


# ------------------------------------------------------------------ chat templates


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


def _generation_prompt(record: Record, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    text = render_chat(tokenizer, record, -1, generation=True)
    return _ids([text], tokenizer)[0]


def _split_turns(
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
            raise UserError(
                f"the chat template changes the text before the response in message {number} once"
                " it is answered, so the response cannot be separated; mark responses in the"
                " template with {% generation %} or set data.template"
            )
        end = len(_without_separator(answered, special))
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
        pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
        done = end
    if not pieces:
        raise UserError("the chat template marks no response with {% generation %}")
    return pieces


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
