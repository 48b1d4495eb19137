"""Prompt templates, and tokens with a mask of what is learned. Pure functions of a tokenizer.

A model is trained on exactly the prompt tokens from which it generates. The prompt is tokenized
alone. The training example is the tokens of prompt and response together where these begin with the
tokens of the prompt. Elsewhere it is the tokens of the prompt followed by those of the response,
tokenized apart: a token across the border, such as of a space that ends the prompt, would otherwise
change the prompt.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from jax_ordermerge.data import turns
from jax_ordermerge.data.formats import Record
from jax_ordermerge.data.pieces import Encoded, Piece, encode_pieces, tokenize_texts
from jax_ordermerge.data.turns import SpecialTokens, TurnSplitter
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


class TrainingSequence(NamedTuple):
    """The tokens of a record, or of its beginning up to one of its answers."""

    record: Record
    encoded: Encoded


def resolve_template(
    template: str,
    form: str,
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    where: str = "data",
) -> str:
    """Return the template that `auto` stands for. Any other name is returned unchanged.

    `auto` is `chat` for messages. Otherwise it follows the format: the prompt of Alpaca for
    instructions, of GSM8K for `question_answer`, and `plain` for prompt and completion strings.

    Args:
        template: a name of `TEMPLATES`, or `auto`.
        form: format of the data.
        records: the data.
        tokenizer: tokenizer of the base model.
        where: name of the source, for error messages.

    Raises:
        UserError: unknown template; `chat` or messages without a chat template; `auto` where some
            records would have another template than others.
    """
    if template not in (*TEMPLATES, "auto"):
        raise UserError(
            f"data.template = '{template}' is not a template{did_you_mean(template, TEMPLATES)}"
        )
    if template == "auto":
        by_record = dict.fromkeys(_template_of(record, form) for record in records or [Record()])
        if len(by_record) > 1:
            raise UserError(
                f"{where}: some rows have messages or instructions and others none, so"
                f" data.template = auto is ambiguous ({', '.join(by_record)}); set data.template"
            )
        (template,) = by_record
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template; set data.template to plain, alpaca or gsm8k,"
            " or add a chat_template.jinja to the base"
        )
    return template


def _template_of(record: Record, form: str) -> str:
    if form in ("messages", "sharegpt") or record.context > 0:
        return "chat"
    # A pair says by its columns whether its prompt is an instruction; other formats by themselves.
    return "alpaca" if record.is_instruction else BY_FORMAT[form]


def count_irregularities(
    records: Sequence[Record], template: str, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, int]:
    """Count the irregularities in the rows of a source, by name; those that occur.

    `messages_after_last_response` are left out: nothing that follows a response is in its context.
    `rows_with_special_tokens` have the text of a special token in a message of a conversation.
    Tokenizers make the token of it, here as in transformers, so a user who writes it ends a turn.
    """
    counts = {"messages_after_last_response": sum(record.unanswered for record in records)}
    if template == "chat":
        special = re.compile("|".join(map(re.escape, special_tokens(tokenizer).texts)))
        counts["rows_with_special_tokens"] = sum(
            any(special.search(str(message["content"])) for message in record.messages)
            for record in records
        )
    return {name: count for name, count in counts.items() if count}


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
    encoded, bad = encode_rows(dict(enumerate(records)), template, tokenizer)
    for reason in bad.values():
        raise UserError(reason.removeprefix(": "))
    return [sequence.encoded for sequences in encoded.values() for sequence in sequences]


def encode_rows(
    records: Mapping[int, Record],
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    by_answer: bool = True,
) -> tuple[dict[int, list[TrainingSequence]], dict[int, str]]:
    """Tokenize records by row number, and say what is wrong with the others: see `encode`.

    Args:
        records: examples of one source.
        template: a name of `TEMPLATES`.
        tokenizer: a fast tokenizer.
        by_answer: make a sequence of each learned answer where the template changes the text
            before an answer once the conversation goes on.

    Returns:
        The sequences of each row, one but for such templates, and a reason for each row that has
        none.

    Raises:
        UserError: no EOS.
    """
    special = special_tokens(tokenizer)
    splitter = TurnSplitter(tokenizer, special)
    pieces: dict[int, list[list[Piece]]] = {}
    parts: dict[int, list[Record]] = {}
    bad: dict[int, str] = {}
    for number, record in records.items():
        try:
            parts[number], pieces[number] = _split(record, template, splitter, by_answer)
            # Tokenizers raise a TypeError for all texts at once where one cannot be encoded.
            "".join(piece.text for sequence in pieces[number] for piece in sequence).encode()
        except UserError as error:
            bad[number] = f": {error}"
        except UnicodeEncodeError as error:
            del pieces[number]
            half = ascii(str(error.object)[error.start])
            bad[number] = f": {half} is half of a character (a lone surrogate); mend the text"
    encoded = iter(
        encode_pieces([sequence for group in pieces.values() for sequence in group], tokenizer)
    )
    # The template `chat` says nothing about texts.
    is_chat = template == "chat" and not any(record.text is not None for record in records.values())
    # A chat template writes BOS itself, or wants none.
    finish = _end_turn if is_chat else _add_bos_and_eos
    return {
        number: [TrainingSequence(part, finish(next(encoded), special)) for part in parts[number]]
        for number in pieces
    }, bad


def _split(
    record: Record, template: str, splitter: TurnSplitter, by_answer: bool
) -> tuple[list[Record], list[list[Piece]]]:
    """Split a record, or each of its beginnings, into context and what is learned."""
    if record.text is not None:
        return [record], [[Piece(record.text, True)]]
    if template != "chat":
        prompt, response = render(record, template)
        return [record], [[Piece(prompt, False), Piece(response, True)]]
    try:
        return [record], [splitter.split(record)]
    except turns.ChangedPrefix:
        # Qwen3's template drops the reasoning of earlier answers. Each answer then has its own
        # prefix, the one that generation sees, so each needs a sequence of its own.
        parts = record.by_answer
        if not by_answer or len(parts) < 2:
            raise
        return parts, [splitter.split(part) for part in parts]


def prompt_tokens(
    record: Record, template: str, tokenizer: "PreTrainedTokenizerBase"
) -> np.ndarray:
    """Return the prompt of the last message of a record, int32[n]: the same tokens as in `encode`.

    The last message itself is not read: `Record.single_turn("2 + 3?")` is enough.
    """
    if template == "chat":
        text = turns.render_chat(tokenizer, record, -1, generation=True)
        return np.asarray(tokenize_texts([text], tokenizer)[0][0], np.int32)
    ids = tokenize_texts([render(record, template)[0]], tokenizer)[0][0]
    return np.asarray(_with_bos(ids, special_tokens(tokenizer)), np.int32)


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
    # Dropped in silence, the model would call tools of which its prompt does not speak.
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


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> SpecialTokens:
    """Return BOS, EOS and all special tokens of a tokenizer but the one for unknown text.

    Raises:
        UserError: the tokenizer has no EOS.
    """
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
    # It stands for text, so it ends nothing, unless the tokenizer has no other EOS (as GPT-2).
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        special.pop(tokenizer.unk_token_id, None)
    # Tested by what the tokenizer does, not by what it has: Qwen has a BOS that it never adds.
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    texts = tuple(special.values())
    return SpecialTokens(
        bos if adds_bos else None, tokenizer.eos_token_id, frozenset(special), texts
    )


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
