"""Tokenization of a source by several processes: each its share of the rows, and all read all.

The shares lie in the directory of the `example_cache` while they are read. Where a process does not
see the share of another one, as in a directory of its own machine, it tokenizes these rows itself.
"""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ordermerge.data import example_cache
from jax_ordermerge.data.chat import TrainingSequence
from jax_ordermerge.data.examples import Ragged
from jax_ordermerge.data.formats import Record
from jax_ordermerge.data.pieces import Encoded


class Chunk(NamedTuple):
    """Rows that are tokenized at a time.

    Attributes:
        encoded: the sequences of each row, for one side, or for both of a preference pair.
        bad: what is wrong with rows that have none.
    """

    encoded: list[dict[int, list[TrainingSequence]]]
    bad: dict[int, str]


class Shares(NamedTuple):
    """The processes that tokenize a source together.

    Attributes:
        path: of the examples in the cache; the shares lie beside it.
        process: number of this process.
        processes: how many there are.
    """

    path: Path
    process: int
    processes: int

    def file(self, process: int) -> Path:
        """Return the file of the share of a process."""
        # with the suffix of the cache, which removes what a killed run left when it is full
        return self.path.with_name(f"{self.path.stem}.{process}-of-{self.processes}.examples")


def agree(entry: example_cache.Entry | None, is_cached: bool) -> Shares | None:
    """Return who tokenizes a source together; None where each process does all of it or none.

    All processes call it at the same point.

    Args:
        entry: where the examples belong in the cache. With other data, settings or code it has
            another name, and nothing is shared.
        is_cached: whether this process has read the examples from there.

    Example:
        >>> agree(None, False) is None
        True
    """
    # what does not train is one process, and does not wait for jax: `ordermerge data`
    if "jax" not in sys.modules:
        return None
    import jax
    from jax.experimental import multihost_utils

    # first whether there are others: the number of processes starts the devices
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    name = "" if entry is None else entry.path.name
    digest = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8)
    answers = multihost_utils.process_allgather(np.append(digest, np.uint8(is_cached)))
    if entry is None or (answers != answers[0]).any() or answers[0, -1]:
        return None
    return Shares(entry.path, jax.process_index(), jax.process_count())


def encode(
    chunks: Sequence[Sequence[int]],
    sides: Sequence[Mapping[int, Record]],
    encode_chunk: Callable[[Sequence[int]], Chunk],
    shares: Shares | None,
) -> Iterator[Chunk]:
    """Yield all chunks in their order; of several processes each tokenizes every n-th.

    Args:
        chunks: numbers of the rows of each.
        sides: the records of the rows, for one side, or for both of a pair.
        encode_chunk: tokenizes the rows of a chunk.
        shares: who tokenizes; None is this process.
    """
    packed: dict[int, Any] = {}
    if shares is not None:
        from jax_ordermerge import processes  # imports jax

        share = range(shares.process, len(chunks), shares.processes)
        with processes.barrier("tokenize its share of the data"):
            packed = {number: _pack(encode_chunk(chunks[number])) for number in share}
            example_cache.store(shares.file(shares.process), packed)
        with processes.barrier("read the tokenized data"):
            for process in range(shares.processes):
                if process != shares.process:
                    packed |= example_cache.load(shares.file(process)) or {}
        # when all have read it; a cache that others write may be read only
        with contextlib.suppress(OSError):
            shares.file(shares.process).unlink(missing_ok=True)
    for number, rows in enumerate(chunks):
        # one chunk at a time: lists of integers take ten times the memory of arrays
        yield _unpack(packed[number], sides) if number in packed else encode_chunk(rows)


def _pack(chunk: Chunk) -> list[Any]:
    """Return a chunk as what the cache stores: [bad, [rows, tokens, answers] for each side]."""
    sides = []
    for encoded in chunk.encoded:
        rows = [row for row, sequences in encoded.items() for _ in sequences]
        both = [sequence.encoded for sequences in encoded.values() for sequence in sequences]
        tokens = Ragged.of([part.tokens for part in both], np.int32)
        answers = Ragged.of([part.answers for part in both], np.bool_)
        sides.append([np.asarray(rows, np.int64), tokens, answers])
    return [chunk.bad, sides]


def _unpack(packed: Sequence[Any], sides: Sequence[Mapping[int, Record]]) -> Chunk:
    bad, stored = packed
    result: list[dict[int, list[TrainingSequence]]] = []
    for (rows, tokens, answers), records in zip(stored, sides, strict=True):
        encoded: dict[int, list[Encoded]] = {}
        for row, ids, mask in zip(rows.tolist(), tokens, answers, strict=True):
            encoded.setdefault(row, []).append(Encoded(ids.tolist(), mask.tolist()))
        result.append(
            {
                row: [
                    TrainingSequence(*pair)
                    for pair in zip(_parts(records[row], len(parts)), parts, strict=True)
                ]
                for row, parts in encoded.items()
            }
        )
    return Chunk(result, bad)


def _parts(record: Record, count: int) -> list[Record]:
    # several sequences are the answers of a conversation, see `chat.encode_rows`
    return [record] if count == 1 else record.by_answer
