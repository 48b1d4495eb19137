"""Examples of several sources as one, in parts that are set aside, and by weight."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.data.order import permutation
from jax_ordermerge.errors import UserError


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Return the examples of several sources, in their order. Ids go on from source to source.

    Args:
        parts: examples of one source each.

    Raises:
        UserError: some sources hold preference pairs and others do not.

    Example:
        >>> from jax_ordermerge.data.provenance import SourceInfo
        >>> a, b = (
        ...     Examples(
        ...         Ragged.of([[1, 2]] * n, np.int32),
        ...         Ragged.of([[0, 1]] * n, np.bool_),
        ...         np.arange(n),
        ...         sources=(SourceInfo(name, name, id_count=n),),
        ...     )
        ...     for name, n in (("a", 2), ("b", 1))
        ... )
        >>> both = concatenate([a, b])
        >>> both.ids.tolist(), both.source.tolist(), both.row_numbers.tolist()
        ([0, 1, 2], [0, 0, 1], [0, 1, 0])
    """
    if len(parts) == 1:
        return parts[0]
    # By `id_count` and not by the examples: ids do not shift when rows of an earlier source are
    # dropped.
    first_ids = np.cumsum([0, *(part.sources[0].id_count for part in parts)])
    sources = tuple(
        dataclasses.replace(part.sources[0], first_id=int(first))
        for part, first in zip(parts, first_ids, strict=False)
    )
    # one source of each kind, for the message
    kinds = {part.rejected is not None: part.sources[0].name for part in parts}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds[True]} holds preference pairs and {kinds[False]} does not; give sources of"
            " one kind"
        )
    ids = np.concatenate([part.ids + first for part, first in zip(parts, first_ids, strict=False)])
    rows = np.concatenate([part.row_numbers for part in parts])
    source = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    counts: dict[str, int] = {}
    for part in parts:
        counts |= {name: counts.get(name, 0) + count for name, count in part.counts.items()}
    sides = [
        Examples(
            tokens=Ragged.concatenate([part.tokens for part in side]),
            answers=Ragged.concatenate([part.answers for part in side]),
            ids=ids,
            prompts=_texts([part.prompts for part in side], side),
            responses=_texts([part.responses for part in side], side),
            rows=rows,
            source=source,
            ends=tuple(sorted({token for part in side for token in part.ends})),
        )
        for side in zip(*(part.parts for part in parts), strict=True)
    ]
    return dataclasses.replace(
        sides[0], counts=counts, sources=sources, rejected=sides[1] if len(sides) > 1 else None
    )


def _texts(texts: Sequence[Sequence[str]], parts: Sequence[Examples]) -> list[str]:
    # Windows of texts have no prompts. Beside others they have empty ones: lists stay aligned.
    if not any(texts):
        return []
    return [
        text
        for part, part_texts in zip(parts, texts, strict=True)
        for text in part_texts or [""] * len(part)
    ]


def set_aside(examples: Examples, count: int, seed: int, split: str) -> tuple[Examples, Examples]:
    """Return (rest, selected): `count` examples selected by the stream `(split,)` of the seed.

    Both are in the order of the file.

    Raises:
        UserError: no example would be left to train on.

    Example:
        >>> tokens, answers = Ragged.of([[1, 2]] * 5, np.int32), Ragged.of([[0, 1]] * 5, np.bool_)
        >>> train, validation = set_aside(
        ...     Examples(tokens, answers, np.arange(5)), 2, 0, "validation"
        ... )
        >>> train.ids.tolist(), validation.ids.tolist()
        ([2, 3, 4], [0, 1])
    """
    # Drawn over all examples and cut: with a larger count the smaller choice is a part of the
    # larger.
    order = permutation(len(examples), seed, split)
    if examples.rows is not None:
        # Answers of one conversation stay on one side: each is in the prompt of the next. A
        # conversation has the place of the first of its answers in the permutation.
        group, _ = _groups(examples)
        place = np.full(len(examples), len(examples))
        np.minimum.at(place, group[order], np.arange(len(examples)))
        order = np.argsort(place[group], kind="stable")
        ends = np.flatnonzero(np.diff(group[order], append=-1)) + 1
        # As many conversations as do not exceed the count, but at least one.
        fitting = int(np.searchsorted(ends, count, "right"))
        count = int(ends[max(fitting - 1, 0)])
    if count >= len(examples):
        raise UserError(
            f"data.{split}_examples = {count} leaves none of {len(examples)} training examples;"
            " lower it"
        )
    # by a mask, so that both parts keep the order of the file
    selected = np.zeros(len(examples), bool)
    selected[order[:count]] = True
    rest, held_out = (examples.take(np.flatnonzero(part)) for part in (~selected, selected))
    # weights are of training
    sources = tuple(dataclasses.replace(source, weight=1.0) for source in held_out.sources)
    return rest, dataclasses.replace(held_out, sources=sources)


def apply_weights(examples: Examples, seed: int) -> Examples:
    """Leave out and repeat rows by the weights of their sources, and count them.

    A weight is cut into an integer and a fraction f. Each of the n rows of the source is there as
    often as the integer says. round(f n) of them, the first of the permutation by the stream
    `("weight", number of the source)`, are there once more. The answers of a conversation go
    together. All members of a run have these same examples; only their orders differ.

    Raises:
        UserError: a weight leaves nothing of a source, or gives more copies than there are ids.

    Example:
        >>> from jax_ordermerge.data.provenance import SourceInfo
        >>> tokens, answers = Ragged.of([[1, 2]] * 4, np.int32), Ragged.of([[0, 1]] * 4, np.bool_)
        >>> source = SourceInfo("a", "a.jsonl", weight=1.5, id_count=4)
        >>> weighted = apply_weights(Examples(tokens, answers, np.arange(4), sources=(source,)), 0)
        >>> weighted.ids.tolist(), weighted.row_numbers.tolist()
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1])
    """
    if all(source.weight == 1 for source in examples.sources):
        return examples
    group, first = _groups(examples)
    # Weights are of rows and not of examples: a conversation counts once, however many answers it
    # has.
    group_source = examples.source_numbers[first]
    copies = np.zeros(len(first), np.int64)  # of each row
    sizes = np.bincount(group)
    sources, counts = [], dict(examples.counts)
    for number, source in enumerate(examples.sources):
        rows = np.flatnonzero(group_source == number)
        complete = int(source.weight)
        further = round((source.weight - complete) * len(rows))
        # A source that would silently vanish is a mistake of the config.
        if len(rows) and not complete and not further:
            raise UserError(
                f"data.train: weight {source.weight:g} leaves none of the {len(rows)} rows of"
                f" {source.name}; raise it, or remove the source"
            )
        copies[rows] = complete
        copies[rows[permutation(len(rows), seed, "weight", number)[:further]]] += 1
        changes = {
            "left_out_by_weight": int(sizes[rows][copies[rows] == 0].sum()),
            "repeated_by_weight": int((sizes * np.maximum(copies - 1, 0))[rows].sum()),
        }
        sources.append(dataclasses.replace(source, counts={**source.counts, **changes}))
        counts |= {name: counts.get(name, 0) + count for name, count in changes.items()}
    # All first copies, then all second ones: the ids of first copies are those without weights.
    id_count = sum(source.id_count for source in examples.sources)
    largest = int(copies.max(initial=0))
    if largest * id_count > np.iinfo(np.int32).max:
        raise UserError(
            f"data.train: {largest} copies of {id_count} rows are more than 2^31; lower the weight"
        )
    copied = [np.flatnonzero(copies[group] > copy) for copy in range(largest)]
    weighted = examples.take(np.concatenate(copied))
    ids = np.concatenate([examples.ids[rows] + copy * id_count for copy, rows in enumerate(copied)])
    rows = weighted.row_numbers
    rejected = weighted.rejected
    if rejected is not None:
        rejected = dataclasses.replace(rejected, ids=ids, rows=rows)
    return dataclasses.replace(
        weighted, ids=ids, rows=rows, rejected=rejected, sources=tuple(sources), counts=counts
    )


def _groups(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Number the rows of all sources: the row of each example, and the first example of each."""
    rows = examples.row_numbers
    # one number for source and row: sorting pairs takes ten times as long
    keys = examples.source_numbers * (rows.max(initial=0) + 1) + rows
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return group, first
