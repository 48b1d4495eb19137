"""Tokens of texts that alternate between context and response, with a mask of what is learned."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Piece(NamedTuple):
    """A part of the rendered text."""

    text: str
    learned: bool


class Encoded(NamedTuple):
    """Token numbers of one example, and whether each belongs to a response."""

    tokens: list[int]
    answers: list[bool]


class _Prefix(NamedTuple):
    """The text before a border: the first `start` tokens of the example, and further text."""

    start: int
    tail: str


def tokenize_texts(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[list[int]], Sequence]:
    """Return the token numbers of texts, and their encodings where the tokenizer has any.

    Special tokens are those of the text alone: templates write their own, and BOS would stand
    twice.
    """
    # transformers fails on an empty batch.
    if not texts:
        return [], []
    # One call for all texts: fast tokenizers tokenize a batch on all cores.
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return batch["input_ids"], batch.encodings or [None] * len(texts)


def encode_pieces(
    examples: Sequence[Sequence[Piece]], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Tokenize texts whose pieces alternate between context and response, in few calls.

    The tokens of every prefix of pieces are compared with those of the text, so that each border
    between two pieces is known in tokens. The prompt, which is all but the last piece, keeps its
    own tokens.
    """
    texts = ["".join(piece.text for piece in pieces) for pieces in examples]
    token_lists, encodings = tokenize_texts(texts, tokenizer)
    splitting = _splitting_tokens(tokenizer)
    prefixes = [
        list(_prefixes(pieces, text, tokens, encoding, splitting))
        for pieces, text, tokens, encoding in zip(
            examples, texts, token_lists, encodings, strict=True
        )
    ]
    tails = _tokenize_once([prefix.tail for group in prefixes for prefix in group], tokenizer)
    # A token across the last border would change the prompt: the last piece is tokenized apart
    # wherever the tokens of the text do not go on with those of the last prefix.
    apart: dict[int, _Prefix] = {}
    for number, group in enumerate(prefixes):
        if group:
            prompt_end = tails[group[-1].tail]
            start = group[-1].start
            if token_lists[number][start : start + len(prompt_end)] != prompt_end:
                apart[number] = group[-1]
    last_pieces = _tokenize_once([examples[number][-1].text for number in apart], tokenizer)
    for number, prefix in apart.items():
        token_lists[number] = [
            *token_lists[number][: prefix.start],
            *tails[prefix.tail],
            *last_pieces[examples[number][-1].text],
        ]
    return [
        _mark_answers(pieces, tokens, group, tails)
        for pieces, tokens, group in zip(examples, token_lists, prefixes, strict=True)
    ]


def _prefixes(
    pieces: Sequence[Piece],
    text: str,
    tokens: Sequence[int],
    encoding: object,
    splitting: Mapping[int, str],
) -> Iterator[_Prefix]:
    """Yield the text before each border.

    A tokenizer splits a text at the special tokens in it before it does anything else. The tokens
    of a prefix are therefore those of the text before the last special token of the prefix, and
    those of the rest by itself. To tokenize whole prefixes is quadratic in the number of pieces.
    """
    starts, ends, numbers = [0], [0], [0]
    for number, token in enumerate(tokens):
        # One that stands for unknown text has the number of a special token, but other text.
        if token in splitting and encoding is not None:
            start, end = encoding.token_to_chars(number)  # type: ignore[attr-defined]
            if text[start:end].strip() == splitting[token].strip():
                starts.append(start)
                ends.append(end)
                numbers.append(number)
    border = 0
    for piece in pieces[:-1]:
        border += len(piece.text)
        last = bisect_right(ends, border) - 1
        yield _Prefix(numbers[last], text[starts[last] : border])


def _splitting_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Return the special tokens at which a text is always split, wherever they stand in it."""
    if getattr(tokenizer, "split_special_tokens", False):
        return {}
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and not token.normalized and not token.single_word
    }


def _tokenize_once(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, list[int]]:
    # most tails are the same few words of the template
    unique = list(dict.fromkeys(texts))
    return dict(zip(unique, tokenize_texts(unique, tokenizer)[0], strict=True))


def _mark_answers(
    pieces: Sequence[Piece],
    tokens: list[int],
    prefixes: Sequence[_Prefix],
    tails: Mapping[str, Sequence[int]],
) -> Encoded:
    answers: list[bool] = []
    for piece, prefix in zip(pieces, prefixes, strict=False):
        # Only before an earlier response can a border lie inside a token. The token then counts as
        # part of that response.
        common = prefix.start
        for token in tails[prefix.tail]:
            if common == len(tokens) or tokens[common] != token:
                break
            common += 1
        # Negative where a border lies before the one already marked, which adds nothing.
        answers += [piece.learned] * (common - len(answers))
    answers += [pieces[-1].learned] * (len(tokens) - len(answers))
    return Encoded(tokens, answers)
