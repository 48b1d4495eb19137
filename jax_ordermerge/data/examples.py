"""Tokenized examples in flat arrays.

Why not lists of arrays? Millions of small numpy objects take ten times the memory of their tokens.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jax_ordermerge.data.provenance import SourceInfo


class Ragged(Sequence[np.ndarray]):
    """Rows of different lengths over one flat array; a row is a view.

    Example:
        >>> rows = Ragged.of([np.array([5, 6]), np.array([7])], np.int32)
        >>> len(rows), rows[1].tolist(), rows.lengths.tolist(), rows.flat.tolist()
        (2, [7], [2, 1], [5, 6, 7])
    """

    def __init__(self, flat: np.ndarray, offsets: np.ndarray) -> None:
        self.flat, self.offsets = flat, offsets

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | np.ndarray], dtype: type[np.generic]) -> "Ragged":
        """Copy rows into one flat array of `dtype`."""
        # int64: a corpus may have more than 2^31 tokens
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.empty(offsets[-1], dtype)
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
            flat[start:end] = row
        return cls(flat, offsets)

    @classmethod
    def concatenate(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """Return the rows of all parts, in their order.

        Example:
            >>> rows = Ragged.of([[5, 6], [7]], np.int32)
            >>> Ragged.concatenate([rows, rows]).offsets.tolist()
            [0, 2, 3, 5, 6]
        """
        # Offsets of a part count from its own start.
        starts = np.cumsum([0, *(len(part.flat) for part in parts)])
        offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
        return cls(
            np.concatenate([part.flat for part in parts]),
            np.concatenate([np.zeros(1, np.int64), *offsets]),
        )

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row, int64[n]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row):  # type: ignore[no-untyped-def]  # a number, never a slice
        row = range(len(self))[row]  # raises IndexError and takes negative numbers as lists do
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Tokenized examples, n rows.

    Attributes:
        tokens: row i is int32[length], prompt and response.
        answers: row i is bool[length], True where the token belongs to the response.
        ids: int64[n], distinct numbers of the examples in their source, from its `first_id`; for
            texts, the numbers of the windows that they are cut into; the numbers of the answers
            where each answer of a conversation is an example. The second and further copies of a
            row that an epoch has several times follow the ids of the last source.
        prompts: n texts before the last response, as in the file, without the template.
        responses: n texts of the last response, as in the file: the references of an evaluation.
        counts: `read`, `used`, and how many were dropped or truncated for which reason.
        sources: where the examples came from.
        rejected: the rejected responses of preference pairs, row by row; all other attributes
            describe the chosen ones. None where the examples are not pairs.
        reference: float32[n, 2], log-probabilities of the chosen and the rejected response under
            the reference model, which training on pairs needs. None before they are measured.
        ends: the special tokens that end learned responses, in the order of their numbers. A model
            that is trained on these examples ends its responses by them.
        rows: int64[n], numbers of the rows (of texts: windows) in their source. None where these
            are the ids.
        source: int32[n], numbers of the sources in `sources`. None where all are of the first.

    Example:
        >>> examples = Examples(
        ...     Ragged.of([[1, 2, 3], [4, 5]], np.int32),
        ...     Ragged.of([[0, 1, 1], [0, 1]], np.bool_),
        ...     np.arange(2),
        ... )
        >>> len(examples), examples.longest, examples.tokens[1].tolist(), examples.digest[:8]
        (2, 3, [4, 5], '96d91af4')
    """

    tokens: Ragged
    answers: Ragged
    ids: np.ndarray
    prompts: Sequence[str] = ()
    responses: Sequence[str] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sources: tuple[SourceInfo, ...] = ()
    rejected: "Examples | None" = None
    reference: np.ndarray | None = None
    rows: np.ndarray | None = None
    ends: tuple[int, ...] = ()
    source: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, int64[n]; for a pair, those of its longer sequence."""
        lengths = self.tokens.lengths
        # The batch of a pair has one length for both sequences.
        if self.rejected is None:
            return lengths
        return np.maximum(lengths, self.rejected.tokens.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max(initial=0))

    @property
    def loss_counts(self) -> np.ndarray:
        """What summed losses are divided by, float64[n]: response tokens; 1 for a preference pair.

        The first token of an example has no context to be predicted from, so it never counts. No
        model is needed for these numbers.

        Example:
            >>> rows = [[1, 2, 3], [4, 5]]
            >>> masks = [[1, 1, 1], [0, 1]]
            >>> Examples(
            ...     Ragged.of(rows, np.int32), Ragged.of(masks, np.bool_), np.arange(2)
            ... ).loss_counts.tolist()
            [2.0, 1.0]
        """
        if self.rejected is not None:
            return np.ones(len(self))
        # float64: their sum over a corpus may pass 2^24, where float32 stops counting.
        return np.array([mask[1:].sum() for mask in self.answers], np.float64)

    @property
    def source_numbers(self) -> np.ndarray:
        """Number of the source of each example, int32[n]."""
        return np.zeros(len(self), np.int32) if self.source is None else self.source

    @property
    def rows_by_source(self) -> dict[str, np.ndarray]:
        """Numbers of the examples of each source that has some, int64[m] by its name."""
        by_number = {
            source.name: np.flatnonzero(self.source_numbers == number)
            for number, source in enumerate(self.sources)
        }
        return {name: rows for name, rows in by_number.items() if len(rows)}

    @property
    def row_numbers(self) -> np.ndarray:
        """Number of the row of each example in its source, int64[n]; of texts, of the window."""
        return self.ids if self.rows is None else self.rows

    def place(self, index: int) -> str:
        """Return where an example is from, for messages: its row, and the file if there are more.

        Example:
            >>> tokens, answers = Ragged.of([[1]] * 2, np.int32), Ragged.of([[1]] * 2, np.bool_)
            >>> Examples(tokens, answers, np.array([4, 7])).place(1)
            'row 7'
        """
        row = int(self.row_numbers[index])
        # With one file its name is in the message already.
        files = [file for source in self.sources for file in source.files]
        if len(files) < 2:
            return f"row {row}"
        source = self.sources[self.source_numbers[index]]
        # a window of a text may be of any of the files
        file, row = (source.path, row) if source.format == "text" else source.locate(row)
        return f"{file} row {row}"

    @property
    def parts(self) -> "tuple[Examples, ...]":
        """These examples, or for pairs the chosen and the rejected ones apart."""
        if self.rejected is None:
            return (self,)
        return dataclasses.replace(self, rejected=None, reference=None), self.rejected

    @property
    def sequences(self) -> "Examples":
        """These examples, or for n pairs 2 n rows: chosen and rejected in turn, with ids from 0.

        Example:
            >>> chosen, rejected = (
            ...     Examples(Ragged.of(rows, np.int32), Ragged.of(rows, np.bool_), np.arange(2))
            ...     for rows in ([[1], [2]], [[3], [4]])
            ... )
            >>> dataclasses.replace(chosen, rejected=rejected).sequences.tokens.flat.tolist()
            [1, 3, 2, 4]
        """
        if self.rejected is None:
            return self

        def interleave(chosen: Ragged, rejected: Ragged, dtype: type[np.generic]) -> Ragged:
            rows = [row for pair in zip(chosen, rejected, strict=True) for row in pair]
            return Ragged.of(rows, dtype)

        # In turn, so that a reshape of their losses to [n, 2] has a pair in each row.
        tokens = interleave(self.tokens, self.rejected.tokens, np.int32)
        answers = interleave(self.answers, self.rejected.answers, np.bool_)
        return Examples(tokens, answers, np.arange(2 * len(self)))

    def prompt(self, row: int) -> np.ndarray:
        """Return the tokens before the last response of a row, int32: the prompt of generation.

        Example:
            >>> tokens = Ragged.of([[1, 7, 8, 9]], np.int32)
            >>> answers = Ragged.of([[0, 0, 1, 1]], np.bool_)
            >>> Examples(tokens, answers, np.arange(1)).prompt(0).tolist()
            [1, 7]
        """
        # After the last token that is not learned: an earlier answer of a conversation is in the
        # prompt.
        context = np.flatnonzero(~self.answers[row])
        return self.tokens[row][: context[-1] + 1 if context.size else 0]

    @property
    def digest(self) -> str:
        """SHA-256 over lengths, tokens, response masks and ids, as hexadecimal."""
        dtypes = ("<i8", "<i4", "u1", "<i8")  # little endian: the digest is the same everywhere
        sha256 = hashlib.sha256()
        # Texts and counts do not enter: the digest is of what is trained on.
        for part in self.parts:
            arrays = (part.tokens.offsets, part.tokens.flat, part.answers.flat, part.ids)
            for array, dtype in zip(arrays, dtypes, strict=True):
                sha256.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return sha256.hexdigest()

    def take(self, rows: np.ndarray) -> "Examples":
        """Return the examples of `rows`, int[m], in that order. Counts and sources stay."""
        return Examples(
            tokens=Ragged.of([self.tokens[row] for row in rows], np.int32),
            answers=Ragged.of([self.answers[row] for row in rows], np.bool_),
            ids=self.ids[rows],
            rows=None if self.rows is None else self.rows[rows],
            prompts=[self.prompts[row] for row in rows] if self.prompts else (),
            responses=[self.responses[row] for row in rows] if self.responses else (),
            # what was read, whatever is taken of it
            counts=dict(self.counts),
            sources=self.sources,
            rejected=None if self.rejected is None else self.rejected.take(rows),
            reference=None if self.reference is None else self.reference[rows],
            ends=self.ends,
            source=None if self.source is None else self.source[rows],
        )
