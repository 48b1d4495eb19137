"""The splits of a run: what data.json records of them, whether they changed, what they share."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jax_ordermerge.config import Config
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout, read_json


class Overlap(NamedTuple):
    """Examples of a split that are examples of another split, too.

    Attributes:
        split, other_split: names.
        examples: number of the examples of `split` that are in `other_split`.
        total: number of the examples of `split`.
        first_ids: of the first three of them.
        first_places: their rows.
    """

    split: str
    other_split: str
    examples: int
    total: int
    first_ids: list[int]
    first_places: list[str]

    def __str__(self) -> str:
        return (
            f"{self.examples} of {self.total} {self.split} examples are {self.other_split} examples"
            f" too (the first: {', '.join(self.first_places)})"
        )


def find_overlaps(splits: Mapping[str, Examples]) -> list[Overlap]:
    """Return what the validation and the test split share with any other split.

    Tokens are compared, not ids: the same example may be in two files. Of preference pairs the
    chosen sequences are compared, since these are what a member has learned.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> train, test = (
        ...     Examples(Ragged.of(rows, np.int32), Ragged.of(rows, np.bool_), np.arange(len(rows)))
        ...     for rows in ([[1, 2], [3]], [[4], [3]])
        ... )
        >>> [str(overlap) for overlap in find_overlaps({"train": train, "test": test})]
        ['1 of 2 test examples are train examples too (the first: row 1)']
    """
    # the bytes of rows and not tuples: a tuple of Python integers takes ten times the memory
    rows = {
        name: [np.ascontiguousarray(row, "<i4").tobytes() for row in examples.tokens]
        for name, examples in splits.items()
    }
    distinct = {name: set(split_rows) for name, split_rows in rows.items()}
    overlaps = []
    for split in (name for name in splits if name != "train"):
        for other_split in (name for name in splits if name != split):
            shared = [n for n, row in enumerate(rows[split]) if row in distinct[other_split]]
            if shared:
                # Three are enough to find the mistake; the count says how large it is.
                first_ids = splits[split].ids[shared[:3]].tolist()
                places = [splits[split].place(number) for number in shared[:3]]
                overlaps.append(
                    Overlap(split, other_split, len(shared), len(rows[split]), first_ids, places)
                )
    return overlaps


def refuse_overlaps(overlaps: Iterable[Overlap], remedy: str) -> None:
    """Refuse splits that share examples.

    Args:
        overlaps: of the splits.
        remedy: what the reader can do.

    Raises:
        UserError: one line with every pair of splits, counts and first rows.
    """
    # validation and test are in the list both ways
    pairs = {frozenset((overlap.split, overlap.other_split)): str(overlap) for overlap in overlaps}
    # one line for all pairs: whoever mends the files does it once
    if pairs:
        raise UserError(f"{'; '.join(pairs.values())}: {remedy}")


def check_splits(
    config: Config, splits: Mapping[str, Examples], overlaps: Iterable[Overlap]
) -> None:
    """Check the examples against the objective and against each other.

    Args:
        config: of the run.
        splits: its examples.
        overlaps: what `find_overlaps` found in them.

    Raises:
        UserError: pairs or no pairs for the wrong objective, or splits that share examples.
    """
    # Learned as responses, the chosen ones would train, and the rejected ones be lost in silence.
    if splits["train"].rejected is not None and config.objective.kind != "dpo":
        raise UserError(
            f"data.train: {splits['train'].sources[0].name} holds preference pairs,"
            " objective.kind = sft learns responses; set it to dpo"
        )
    if splits["train"].rejected is None and config.objective.kind == "dpo":
        raise UserError(
            f"data.train: {splits['train'].sources[0].name} has format"
            f" {splits['train'].sources[0].format}, objective.kind = dpo learns preference pairs;"
            " remove format"
        )
    if not config.data.allow_overlap:
        refuse_overlaps(
            overlaps,
            "a loss on learned examples is not held out; remove them from one of the files, or"
            " set data.allow_overlap to true to count and report them",
        )


def describe(splits: Mapping[str, Examples], overlaps: Iterable[Overlap]) -> dict[str, Json]:
    """Return what data.json records, by split."""
    descriptions: dict[str, Json] = {
        name: {
            "source": _source_names(examples),
            "sources": _describe_sources(examples),
            "digest": examples.digest,
            "examples": len(examples),
            "tokens": sum(int(part.lengths.sum()) for part in examples.parts),
            "counts": dict(examples.counts),
            "ends": list(examples.ends),
        }
        for name, examples in splits.items()
    }
    for overlap in overlaps:
        record = {"examples": overlap.examples, "first_ids": overlap.first_ids}
        descriptions[overlap.split].setdefault("overlaps", {})[overlap.other_split] = record
    return descriptions


def count_lines(descriptions: Mapping[str, Json]) -> list[str]:
    """Return for each source of splits what was read, and where it went; the counts add up.

    Args:
        descriptions: see `describe`. Splits that were set aside from another one share its line.

    Example:
        >>> counts = {"read": 9, "dropped_too_long": 1, "truncated": 0, "used": 8}
        >>> train = {"source": "a.jsonl", "counts": counts, "examples": 6}
        >>> count_lines({"train": train, "validation": train | {"examples": 2}})
        ['a.jsonl: 9 read, 1 dropped too long, 6 train, 2 validation']
    """
    by_source: dict[str, list[str]] = {}
    for name, description in descriptions.items():
        key = json.dumps([description["source"], description["counts"]], sort_keys=True)
        by_source.setdefault(key, []).append(name)
    lines = []
    for names in by_source.values():
        description = descriptions[names[0]]
        counts = [f"{description['counts'].get('read', 0):,} read"]
        counts += [
            f"{count:,} {what.replace('_', ' ')}"
            for what, count in description["counts"].items()
            if count and what not in ("read", "used")
        ]
        counts += [f"{descriptions[name]['examples']:,} {name}" for name in names]
        lines.append(f"{description['source']}: {', '.join(counts)}")
    return lines


def source_lines(sources: Sequence[Json]) -> list[str]:
    """Return lines about the sources of a split, as data.json describes them.

    A source alone needs no line, since the line of the split is about it, but for files that were
    passed over.

    Example:
        >>> source = {"name": "a", "examples": 6, "weight": 0.5, "passed_over": ["README.md"]}
        >>> source_lines([source])
        ['a: 6 examples, weight 0.5', 'a: passed over README.md']
    """
    lines = []
    for source in sources:
        if len(sources) > 1 or source["weight"] != 1:
            weight = f", weight {source['weight']:g}" if source["weight"] != 1 else ""
            lines.append(f"{source['name']}: {source['examples']} examples{weight}")
        if source["passed_over"]:
            lines.append(f"{source['name']}: passed over {', '.join(source['passed_over'])}")
    return lines


def check_same_data(run: RunLayout, splits: Mapping[str, Examples]) -> None:
    """Refuse data that differ from those that the training of a run directory has read.

    Every stage draws the orders again and finds samples by their row. Other rows in the same file
    would be taken for the samples that the members learned, without any sign of it.

    Args:
        run: layout of the run directory; one without data.json has no training yet.
        splits: the examples of this start.

    Raises:
        UserError: one line that names each split that differs, its file and what changed.
    """
    recorded: Json = read_json(run.data) or {}
    # They are recorded when the training begins; before that nothing can contradict them.
    if not recorded:
        return
    changes = []
    # Both names: a split that came or went changes what is trained on, or what is held out, too.
    for name in dict.fromkeys([*recorded, *splits]):
        before = recorded.get(name)
        examples = splits.get(name)
        if before is None or examples is None:
            changes.append(f"{name} {'was absent' if before is None else 'is absent'}")
        # The digest is of tokens, so a file that was moved or compressed is the same data.
        elif before["digest"] != examples.digest:
            changes.append(f"{name} ({_describe_change(before, examples)})")
    if changes:
        raise UserError(
            f"the data of {run.root} changed since its training began: {', '.join(changes)};"
            " restore them, or train in another directory with --set output=DIRECTORY"
        )


def _describe_sources(examples: Examples) -> list[Json]:
    # of a pair both sequences: they are what is read in training
    lengths = np.sum([part.lengths for part in examples.parts], 0)
    numbers = examples.source_numbers
    return [
        dataclasses.asdict(source)
        | {
            "files": [file._asdict() for file in source.files],
            "examples": int((numbers == number).sum()),
            "tokens": int(lengths[numbers == number].sum()),
        }
        for number, source in enumerate(examples.sources)
    ]


def _source_names(examples: Examples) -> str:
    return ", ".join(source.name for source in examples.sources)


def _describe_change(before: Json, examples: Examples) -> str:
    """Return the sources of a split, and how they differ from their record."""
    names = _source_names(examples)
    if before["examples"] != len(examples):
        return f"{names}: {before['examples']} examples -> {len(examples)}"
    # The examples are of tokens, so they may differ while the bytes of their files are the same.
    digests = [file.sha256 for source in examples.sources for file in source.files]
    # one mapping without files, and no list, in runs of before there were mixtures
    sources = before["sources"] if isinstance(before["sources"], list) else []
    recorded = [file["sha256"] for source in sources for file in source["files"]]
    # Hub and generated data have no file, and the digest "".
    if "" not in digests and digests == recorded:
        return f"{names}: same content, other tokens; the template or the tokenizer changed"
    return f"{names}: other content, {len(examples)} examples as before"
