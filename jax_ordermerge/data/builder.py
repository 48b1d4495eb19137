"""Collecting tokenized sequences as `Examples`, with counts of those that are dropped."""

from collections.abc import Collection, Sequence

import numpy as np

from jax_ordermerge.data import chat, formats
from jax_ordermerge.data.examples import Examples, Ragged


class ExampleBuilder:
    """Collects the tokens of examples that are used and counts the others.

    An example has one sequence, or two for pairs; `tokens` and `answers` are lists per sequence.

    Args:
        length: largest number of tokens of an example.
        too_long: what happens to a longer one, `data.too_long`.
        sequences: per example.
        special: ids of special tokens. Only these can be ends: where a template lets a turn end in
            an ordinary word, the word does not end a response anywhere else.
    """

    def __init__(
        self, length: int, too_long: str, sequences: int = 1, special: Collection[int] = ()
    ) -> None:
        self.length, self.too_long, self.special = length, too_long, special
        self.ends: set[int] = set()
        self.tokens: list[list[np.ndarray]] = [[] for _ in range(sequences)]
        self.answers: list[list[np.ndarray]] = [[] for _ in range(sequences)]
        self.records: list[list[formats.Record]] = [[] for _ in range(sequences)]
        self.ids: list[int] = []
        self.rows: list[int] = []
        self.number = -1
        self.counts = {"dropped_too_long": 0, "truncated": 0, "dropped_no_response_tokens": 0}
        if sequences > 1:
            self.counts["dropped_same_tokens"] = 0

    def add_windows(self, text: chat.TrainingSequence) -> None:
        # a window starts with the last token of the one before it, which predicts the next token
        for start in range(0, max(len(text.encoded.tokens) - 1, 1), max(self.length - 1, 1)):
            self._append([text], start, len(self.ids))

    def add(self, sequences: Sequence[chat.TrainingSequence], row: int) -> None:
        # Also for those that are dropped: ids do not depend on `max_length`.
        self.number += 1
        encoded = [sequence.encoded for sequence in sequences]
        visible = [sequence.tokens[: self.length] for sequence in encoded]
        is_long = any(len(sequence.tokens) > self.length for sequence in encoded)
        if is_long and self.too_long == "drop":
            self.counts["dropped_too_long"] += 1
        # the first token of a sequence is no target
        elif not all(any(sequence.answers[1 : self.length]) for sequence in encoded):
            self.counts["dropped_no_response_tokens"] += 1
        elif len(visible) > 1 and visible[0] == visible[1]:
            self.counts["dropped_same_tokens"] += 1
        else:
            self.counts["truncated"] += is_long
            self._append(sequences, 0, self.number)
            self.rows.append(row)

    def truncate(self, limit: int) -> None:
        """Keep the first `limit` examples."""
        del self.ids[limit:], self.rows[limit:]
        for tokens, answers, records in zip(self.tokens, self.answers, self.records, strict=True):
            del tokens[limit:], answers[limit:], records[limit:]

    def _append(self, sequences: Sequence[chat.TrainingSequence], start: int, number: int) -> None:
        end = start + self.length
        for side, (record, encoded) in enumerate(sequences):
            self.tokens[side].append(np.asarray(encoded.tokens[start:end], np.int32))
            self.answers[side].append(np.asarray(encoded.answers[start:end], np.bool_))
            self.records[side].append(record)
        # Of a pair the chosen response; the rejected one is not what a model shall end like.
        self._add_ends(sequences[0].encoded, start, end)
        self.ids.append(number)

    def _add_ends(self, encoded: chat.Encoded, start: int, end: int) -> None:
        # One token further than the example: a response that is cut there has no end.
        learned = np.asarray([*encoded.answers[start : end + 1], False])
        last = np.flatnonzero(learned[:-1] & ~learned[1:])
        self.ends.update(
            encoded.tokens[start + index] for index in last.tolist() if start + index < end
        )

    def build(self) -> list[Examples]:
        """Return the examples of each side."""
        # The number of a row is the number of its example, unless a row gave several.
        has_rows = len(self.rows) == len(self.ids) and len(set(self.rows)) == len(self.rows)
        ids = self.rows if has_rows else self.ids
        rows = None if has_rows or not self.rows else np.asarray(self.rows, np.int64)
        examples = []
        for tokens, answers, records in zip(self.tokens, self.answers, self.records, strict=True):
            # Texts have neither prompt nor response.
            used = [record for record in records if record.text is None]
            examples.append(
                Examples(
                    tokens=Ragged.of(tokens, np.int32),
                    answers=Ragged.of(answers, np.bool_),
                    ids=np.asarray(ids, np.int64),
                    rows=rows,
                    prompts=[record.prompt for record in used],
                    responses=[record.response for record in used],
                    ends=tuple(sorted(self.ends.intersection(self.special))),
                )
            )
        return examples
