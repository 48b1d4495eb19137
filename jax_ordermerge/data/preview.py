"""What a model is trained on, as text for readers: examples with what is learned marked."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Final, NamedTuple

import numpy as np

from jax_ordermerge.data import chat
from jax_ordermerge.data.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS: Final = 8
BAR: Final = 40  # characters of the longest bar
# Characters of a segment that are shown at its start and at its end.
SHOWN: Final = 400
# Characters that move a cursor or turn the direction of writing, as a row may have on purpose.
_UNSAFE: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Segment(NamedTuple):
    """Consecutive tokens as text: whether a response is learned, and whether they are special."""

    text: str
    learned: bool
    special: bool


class Marks(NamedTuple):
    """What is written around learned runs, and around special tokens."""

    learned: tuple[str, str]
    special: tuple[str, str]


# Two of each: one is frequent in texts. Special tokens stand out by their own text.
BRACKETS: Final = Marks(("[[", "]]"), ("", ""))
COLOURS: Final = Marks(("\x1b[32m", "\x1b[39m"), ("\x1b[7m", "\x1b[27m"))


def choose_marks(stream: IO[str]) -> Marks:
    """Return colours for a terminal, else brackets. `NO_COLOR` (no-color.org) is respected."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return BRACKETS if plain else COLOURS


def segments(
    tokens: np.ndarray, answers: np.ndarray, tokenizer: "PreTrainedTokenizerBase"
) -> list[Segment]:
    """Return an example as text, cut where learned or special tokens begin or end.

    Args:
        tokens: int32[n].
        answers: bool[n], True where the token belongs to a response.
        tokenizer: which made them.
    """
    special = np.isin(tokens, list(chat.special_tokens(tokenizer).ids))
    # the first token of a sequence has nothing to be predicted from
    learned = np.array(answers, bool)
    learned[:1] = False
    # four kinds of tokens; a segment ends where the kind changes
    kinds = 2 * learned + special
    ends = [*(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(tokens)]
    parts: list[Segment] = []
    done = ""
    for end in ends if len(tokens) else []:
        # From the start each time: many tokenizers drop the space before the first token.
        text = tokenizer.decode(
            tokens[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        # A character whose bytes are in two segments belongs to the second one.
        done = done if text.startswith(done) else done.rstrip("\ufffd")
        parts.append(Segment(text[len(done) :], bool(learned[end - 1]), bool(special[end - 1])))
        done = text
    return parts


def show(parts: Iterable[Segment], marks: Marks, *, shorten: bool = False) -> str:
    """Return segments as one text with marks.

    Control characters are written as escapes: a terminal would obey them.

    Args:
        parts: of an example.
        marks: what is written around learned runs.
        shorten: leave out the middle of long segments.

    Example:
        >>> parts = [Segment("Answer:", False, False), Segment(" 5", True, False)]
        >>> show([*parts, Segment("</s>", True, True)], BRACKETS)
        'Answer:[[ 5</s>]]'
    """
    text, is_learned = [], False
    for part in parts:
        if part.learned != is_learned:
            text.append(marks.learned[0] if part.learned else marks.learned[1])
            is_learned = part.learned
        inner = part.text
        if shorten and len(inner) > 3 * SHOWN:
            left_out = len(inner) - 2 * SHOWN
            inner = f"{inner[:SHOWN]} ... ({left_out:,} characters) ... {inner[-SHOWN:]}"
        inner = "".join(map(_escape, inner))
        text.append(marks.special[0] + inner + marks.special[1] if part.special else inner)
    if is_learned:
        text.append(marks.learned[1])
    return "".join(text)


def show_example(
    examples: Examples,
    row: int,
    tokenizer: "PreTrainedTokenizerBase",
    marks: Marks,
    *,
    shorten: bool = False,
) -> str:
    """Return an example as text with marks; of a preference pair the chosen sequence first."""
    sequences = [
        show(segments(part.tokens[row], part.answers[row], tokenizer), marks, shorten=shorten)
        for part in examples.parts
    ]
    if len(sequences) == 1:
        return sequences[0]
    return "\n".join(
        f"{name}:\n{text}" for name, text in zip(("chosen", "rejected"), sequences, strict=True)
    )


class Bin(NamedTuple):
    """How many examples have from `first` to `last` tokens."""

    first: int
    last: int
    examples: int


def length_bins(lengths: np.ndarray) -> list[Bin]:
    """Return the distribution of lengths in at most 8 bins of one width.

    Example:
        >>> length_bins(np.array([3, 4, 4, 20]))[:2]
        [Bin(first=3, last=5, examples=3), Bin(first=6, last=8, examples=0)]
    """
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    # an integer: a bin of 3.5 tokens would mean nothing
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((lengths - low) // width).tolist()
    return [
        Bin(low + number * width, min(low + (number + 1) * width - 1, high), count)
        for number, count in enumerate(counts)
    ]


def show_bins(bins: Sequence[Bin]) -> str:
    """Return bins as lines of text.

    Example:
        >>> print(show_bins(length_bins(np.array([3, 4, 4, 40]))))
                   3-7 |        3 ########################################
                  8-12 |        0
        ...
                 38-40 |        1 #############
    """
    most = max((count for _, _, count in bins), default=1)
    lines = []
    for first, last, count in bins:
        label = f"{first:,}" if first == last else f"{first:,}-{last:,}"
        lines.append(f"  {label:>13} | {count:>8,} {'#' * round(BAR * count / most)}".rstrip())
    return "\n".join(lines)


def learned_tokens(examples: Examples) -> int:
    """Return how many tokens are learned: those of responses that have something before them."""
    return int(sum(mask[1:].sum() for part in examples.parts for mask in part.answers))


def _escape(character: str) -> str:
    is_control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    if is_control or character in _UNSAFE:
        return character.encode("unicode_escape").decode()
    return character


def first_rows(examples: Examples, count: int) -> Sequence[int]:
    """Return the first `count` rows of each source."""
    numbers = examples.source_numbers
    return [
        int(row)
        for source in range(len(examples.sources))
        for row in np.flatnonzero(numbers == source)[:count]
    ]
