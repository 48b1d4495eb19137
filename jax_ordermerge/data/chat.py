"""Prompt templates, and tokens with a mask of what is learned. Pure, given a tokenizer.

What a model is given when it generates are the very tokens it was trained on: the prompt is tokenized alone, and the training example
is the tokens of the whole text where these begin with the prompt's, else the prompt's tokens followed by those of the response
tokenized alone (a merge across the border, such as of a space that ends the prompt, would otherwise change the prompt).
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from jax_ordermerge.data.formats import Message, Record
from jax_ordermerge.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BY_FORMAT: Final = {
    "alpaca": "alpaca",
    "question_answer": "gsm8k",
    "prompt_completion": "plain",
    "text": "plain",
    "preference": "plain",
}
TEMPLATES: Final = ("plain", "alpaca", "gsm8k", "chat")
GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")

# The two prompts of Stanford Alpaca, as published in tatsu-lab/stanford_alpaca (Apache-2.0).
ALPACA_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT: Final = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Encoded(NamedTuple):
    """One example: token numbers, and for each whether it belongs to a response."""

    tokens: list[int]
    answers: list[bool]


class Piece(NamedTuple):
    """A stretch of rendered text."""

    text: str
    learned: bool


def resolve_template(
    template: str, form: str, records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """Return the template that `auto` stands for; any other is returned as it is.

    `auto` is `chat` where the data are messages and the tokenizer has a chat template; else it follows the format: Alpaca's prompt for
    `alpaca`, GSM8K's for `question_answer`, and `plain` for prompt and completion strings.

    Args:
        template: a name of `TEMPLATES`, or `auto`.
        form: format of the data.
        records: the data; only the first is looked at.
        tokenizer: of the base model.

    Raises:
        UserError: unknown template; `chat` without a chat template; messages without a chat template.
    """
    if template not in (*TEMPLATES, "auto"):
        raise UserError(
            f"data.template = '{template}' is not a template{did_you_mean(template, TEMPLATES)}"
        )
    messages = form in ("messages", "sharegpt") or (bool(records) and records[0].given > 0)
    if template == "auto":
        template = "chat" if messages else BY_FORMAT[form]
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template; set data.template to plain, alpaca or gsm8k, or add a chat_template.jinja to the base"
        )
    return template


def encode(
    records: Sequence[Record], template: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Tokenize examples and mark what is learned.

    Learned are the responses with the token that ends them. BOS stands first where the tokenizer puts it (at `chat`, where its
    template writes it), never twice; EOS is appended to what does not end in it (at `chat`, in any special token). Of a text, every
    token but BOS is learned.

    Args:
        records: examples of one source.
        template: a name of `TEMPLATES`.
        tokenizer: a fast tokenizer.

    Raises:
        UserError: no EOS; a conversation under a template for one prompt and one response; a chat template whose turns cannot be told
            apart.
    """
    ends = _ends(tokenizer)
    if records and records[0].text is not None:
        return [
            _closed(Encoded(ids, [True] * len(ids)), ends)
            for ids in _ids([str(r.text) for r in records], tokenizer)
        ]
    if template != "chat":
        pieces = [
            [Piece(prompt, False), Piece(response, True)]
            for prompt, response in (render(r, template) for r in records)
        ]
        return [_closed(encoded, ends) for encoded in _encode_pieces(pieces, tokenizer)]
    if GENERATION.search(str(tokenizer.chat_template)):
        encoded = [_by_template(record, tokenizer, ends) for record in records]
    else:
        encoded = _encode_pieces(
            [_by_turns(record, tokenizer, ends) for record in records], tokenizer
        )
    return [_ended(one, ends) for one in encoded]


def prompt_tokens(
    record: Record, template: str, tokenizer: "PreTrainedTokenizerBase"
) -> np.ndarray:
    """Return what the model is given to answer the last message of a record: int32[n], the prompt's tokens of `encode`.

    The last message itself is not looked at: `Record.asked("2 + 3?")` will do.
    """
    if template == "chat":
        ids = _ids([_rendered(tokenizer, record.messages[:-1], asking=True)], tokenizer)[0]
    else:
        ids = _with_bos(_ids([render(record, template)[0]], tokenizer)[0], _ends(tokenizer))
    return np.asarray(ids, np.int32)


def render(record: Record, template: str) -> tuple[str, str]:
    """Return prompt and response of a template for one prompt and one response.

    `plain` joins them with nothing between. `alpaca` is Stanford's wording, the response directly after `### Response:`. `gsm8k` is
    `Question: {prompt}\\nAnswer:` and a space before the response, as lm-evaluation-harness asks it.

    Raises:
        UserError: the record is not one user message and one response.

    Example:
        >>> render(Record.asked("2 + 3?", "5"), "gsm8k")
        ('Question: 2 + 3?\\nAnswer:', ' 5')
    """
    roles = [message["role"] for message in record.messages]
    if roles != ["user", "assistant"]:
        raise UserError(
            f"template {template} takes one user and one assistant message, an example has {', '.join(roles)}; use chat"
        )
    prompt, response = record.prompt, record.response
    if template == "gsm8k":
        return f"Question: {prompt}\nAnswer:", f" {response}"
    if template == "alpaca":
        with_input = ALPACA_WITH_INPUT if record.input else ALPACA_WITHOUT_INPUT
        return with_input.format(instruction=prompt, input=record.input), response
    return f"{prompt}\n{record.input}" if record.input else prompt, response


class Ends(NamedTuple):
    """What a tokenizer begins and ends with."""

    bos: int | None  # None where the tokenizer does not put one
    eos: int
    special: frozenset[int]
    special_texts: tuple[str, ...]


def _ends(tokenizer: "PreTrainedTokenizerBase") -> Ends:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos_token, so no response could end; name one in tokenizer_config.json"
        )
    special = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    # asked of what it does and not of what it has: a Qwen has a BOS that it never writes
    adds = (
        tokenizer.bos_token_id is not None
        and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )
    return Ends(
        tokenizer.bos_token_id if adds else None,
        tokenizer.eos_token_id,
        frozenset(special),
        tuple(special.values()),
    )


def _ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    # no special tokens here: templates write their own, and adding them again would double BOS
    return (
        tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        if texts
        else []
    )


def _with_bos(ids: list[int], ends: Ends) -> list[int]:
    return ids if ends.bos is None or ids[:1] == [ends.bos] else [ends.bos, *ids]


def _closed(encoded: Encoded, ends: Ends) -> Encoded:
    ids = _with_bos(encoded.tokens, ends)
    answers = [False] * (len(ids) - len(encoded.tokens)) + encoded.answers
    if ids[:1] == [ends.bos]:
        answers[0] = False
    if ids[-1:] != [ends.eos]:
        ids, answers = [*ids, ends.eos], [*answers, True]
    return Encoded(ids, answers)


def _ended(encoded: Encoded, ends: Ends) -> Encoded:
    if encoded.tokens[-1] in ends.special:
        return encoded
    return Encoded([*encoded.tokens, ends.eos], [*encoded.answers, True])


def _encode_pieces(
    examples: Sequence[Sequence[Piece]], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    prefixes = [
        "".join(piece.text for piece in pieces[: end + 1])
        for pieces in examples
        for end in range(len(pieces))
    ]
    numbers = iter(_ids(prefixes, tokenizer))
    encoded = []
    for pieces in examples:
        *begun, whole = [next(numbers) for _ in pieces]
        if whole[: len(begun[-1])] != begun[-1]:
            whole = begun[-1] + _ids([pieces[-1].text], tokenizer)[0]
        answers: list[bool] = []
        for ids, piece in zip([*begun, whole], pieces, strict=True):
            answers += [piece.learned] * (_common(ids, whole) - len(answers))
        encoded.append(Encoded(whole, answers))
    return encoded


def _common(ids: list[int], whole: list[int]) -> int:
    # only before an earlier response can the border lie inside a token; it then counts as that response's
    if whole[: len(ids)] == ids:
        return len(ids)
    return next(at for at, (one, other) in enumerate(zip(ids, whole, strict=False)) if one != other)


# --- chat ---


def _rendered(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, asking: bool = False
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=asking
            )
        )
    except Exception as error:  # a template raises whatever it likes on roles it does not take
        roles = ", ".join(str(message["role"]) for message in messages) or "none"
        raise UserError(
            f"the chat template refuses the roles {roles}: {' '.join(str(error).split())[:120]}"
        ) from error


def _by_turns(record: Record, tokenizer: "PreTrainedTokenizerBase", ends: Ends) -> list[Piece]:
    whole = _rendered(tokenizer, record.messages)
    pieces: list[Piece] = []
    done = 0
    for at, message in enumerate(record.messages):
        if at < record.given or message["role"] != "assistant":
            continue
        asked = _rendered(tokenizer, record.messages[:at], asking=True)
        said = _rendered(tokenizer, record.messages[: at + 1])
        if not (whole.startswith(said) and said.startswith(asked)):
            raise UserError(
                f"the chat template writes what stands before the response in message {at} differently once it is answered, so the "
                "response cannot be told apart; mark responses in the template with {% generation %} or set data.template"
            )
        # white space after the end of a turn separates it from the next one: nothing that the model has to write
        end = len(said.rstrip()) if said.rstrip().endswith(ends.special_texts) else len(said)
        pieces += [Piece(whole[done : len(asked)], False), Piece(whole[len(asked) : end], True)]
        done = end
    return pieces


def _by_template(record: Record, tokenizer: "PreTrainedTokenizerBase", ends: Ends) -> Encoded:
    whole = tokenizer.apply_chat_template(
        list(record.messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    ids, marked = list(whole["input_ids"]), np.asarray(whole["assistant_masks"], bool)
    asked = _ids([_rendered(tokenizer, record.messages[:-1], asking=True)], tokenizer)[0]
    if ids[: len(asked)] != asked or not marked[len(asked) :].any():
        raise UserError(
            "the chat template's generation prompt does not begin the last response that it marks with {% generation %}: a model would "
            "be asked otherwise than it is trained; mend the template or set data.template"
        )
    if record.given:
        marked[
            : len(_ids([_rendered(tokenizer, record.messages[: record.given])], tokenizer)[0])
        ] = False
    # the token that ends a turn is learned with it, also where the template closes {% endgeneration %} before it
    for end in np.flatnonzero(marked[:-1] & ~marked[1:]) + 1:
        marked[end] |= ids[end] in ends.special and ids[end - 1] not in ends.special
    # the last response begins where the generation prompt ends, wherever the template marks it: this is what the model has to write
    last = int(np.flatnonzero(marked)[-1]) + 1
    marked[len(asked) : last] = True
    before = np.flatnonzero(~marked[: len(asked)])
    marked[before[-1] + 1 if before.size else 0 : len(asked)] = False
    return Encoded(ids[:last], marked[:last].tolist())
