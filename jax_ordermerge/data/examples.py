"""Tokenized examples in flat arrays: two arrays and their offsets, whatever the number of examples."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np


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
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.empty(offsets[-1], dtype)
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
            flat[start:end] = row
        return cls(flat, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """int64[n]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row):  # type: ignore[no-untyped-def]  # rows by one number only, never by slice
        row = range(len(self))[row]
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Tokenized examples, n rows.

    Attributes:
        tokens: row i is int32[length], prompt and response.
        answers: row i is bool[length], True where the token belongs to the response.
        ids: int64[n], the example's number in its file, from 0, each once; of texts, the number of the window cut from them.
        prompts: n texts before the last response, as in the file and not templated.
        responses: n texts of the last response, as in the file: the references of an evaluation.
        counts: `read`, `used`, and what was dropped or truncated and why.
        sources: where the examples came from, e.g. file and SHA-256.
        rejected: of preference pairs, the other response to each prompt, row by row; everything else is of the chosen one. None where
            there are no pairs.
        reference: float32[n, 2], log-probabilities of the chosen and the rejected response under the reference model, which training
            on pairs needs; None where not known.

    Example:
        >>> two = Examples(
        ...     Ragged.of([[1, 2, 3], [4, 5]], np.int32),
        ...     Ragged.of([[0, 1, 1], [0, 1]], np.bool_),
        ...     np.arange(2),
        ... )
        >>> len(two), two.longest, two.tokens[1].tolist(), two.answers[0].tolist(), two.digest[:8]
        (2, 3, [4, 5], [False, True, True], '96d91af4')
    """

    tokens: Ragged
    answers: Ragged
    ids: np.ndarray
    prompts: Sequence[str] = ()
    responses: Sequence[str] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rejected: "Examples | None" = None
    reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """int64[n], tokens an example; of a pair, of its longer sequence."""
        own = self.tokens.lengths
        return own if self.rejected is None else np.maximum(own, self.rejected.tokens.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max(initial=0))

    @property
    def parts(self) -> "tuple[Examples, ...]":
        """The sequences of an example one by one: these examples, or of pairs the chosen and the rejected ones."""
        if self.rejected is None:
            return (self,)
        return dataclasses.replace(self, rejected=None, reference=None), self.rejected

    @property
    def sequences(self) -> "Examples":
        """What a forward pass reads: these examples, or of n pairs 2 n rows, chosen and rejected in turn, numbered from 0.

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
        tokens = [
            row for pair in zip(self.tokens, self.rejected.tokens, strict=True) for row in pair
        ]
        answers = [
            row for pair in zip(self.answers, self.rejected.answers, strict=True) for row in pair
        ]
        return Examples(
            Ragged.of(tokens, np.int32), Ragged.of(answers, np.bool_), np.arange(2 * len(self))
        )

    def prompt(self, row: int) -> np.ndarray:
        """Return the tokens before the last response of a row, int32: what the model is given when it has to answer.

        Example:
            >>> one = Examples(
            ...     Ragged.of([[1, 7, 8, 9]], np.int32),
            ...     Ragged.of([[0, 0, 1, 1]], np.bool_),
            ...     np.arange(1),
            ... )
            >>> one.prompt(0).tolist()
            [1, 7]
        """
        given = np.flatnonzero(~self.answers[row])
        return self.tokens[row][: given[-1] + 1 if given.size else 0]

    @property
    def digest(self) -> str:
        """SHA-256 over lengths, tokens, response masks and ids, as hexadecimal."""
        kinds = ("<i8", "<i4", "u1", "<i8")
        whole = hashlib.sha256()
        for part in self.parts:
            arrays = (part.tokens.offsets, part.tokens.flat, part.answers.flat, part.ids)
            for array, kind in zip(arrays, kinds, strict=True):
                whole.update(np.ascontiguousarray(array, dtype=kind).tobytes())
        return whole.hexdigest()

    def take(self, rows: np.ndarray) -> "Examples":
        """Return the examples of `rows` (int[m]), in that order, with the same counts and sources."""
        return Examples(
            tokens=Ragged.of([self.tokens[row] for row in rows], np.int32),
            answers=Ragged.of([self.answers[row] for row in rows], np.bool_),
            ids=self.ids[rows],
            prompts=[self.prompts[row] for row in rows] if self.prompts else (),
            responses=[self.responses[row] for row in rows] if self.responses else (),
            counts=dict(self.counts),
            sources=dict(self.sources),
            rejected=None if self.rejected is None else self.rejected.take(rows),
            reference=None if self.reference is None else self.reference[rows],
        )
