"""Sources into tokenized examples, and the splits of a run."""

import dataclasses
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from jax_ordermerge import config as schema
from jax_ordermerge.data import chat, files, formats
from jax_ordermerge.data.builder import ExampleBuilder
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.order import permutation
from jax_ordermerge.data.unused import check_unused
from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
# Records tokenized at a time: lists of Python integers take ten times the memory of their array.
CHUNK: Final = 4096


def load_examples(
    data: schema.Data, tokenizer: "PreTrainedTokenizerBase", split: Split, *, seed: int
) -> Examples | None:
    """Load, template and tokenize one split. Return None where the config has no such split.

    `validation` is set aside from `data.train`, and so is `test` where it has no file: see
    `set_aside`. `limit` counts rows of the file before any is dropped, and windows of texts.

    Args:
        data: the section of the config.
        tokenizer: tokenizer of the base model, see `load_tokenizer`.
        split: which split.
        seed: seed of the run; only the choice of the examples set aside depends on it.

    Raises:
        UserError: bad input, with the source and the row; nothing left after dropping.
    """
    if split == "test" and data.test is not None:
        return tokenize(data.test, data, tokenizer, "test", limit=data.test_limit)
    if split != "train" and not (
        data.validation_examples if split == "validation" else data.test_examples
    ):
        return None
    return load_splits(data.model_copy(update={"test": None}), tokenizer, seed=seed)[split]


def load_splits(
    data: schema.Data, tokenizer: "PreTrainedTokenizerBase", *, seed: int
) -> dict[str, Examples]:
    """Return all splits of the config, see `load_examples`. Each source is tokenized once.

    Raises:
        UserError: see `load_examples`.
    """
    train = tokenize(data.train, data, tokenizer, "train", limit=data.limit)
    held_out: dict[str, Examples] = {}
    sizes = {"test": data.test_examples, "validation": data.validation_examples}
    for split, count in sizes.items():
        if count:
            train, held_out[split] = set_aside(train, count, seed, split)
    if data.test is not None:
        held_out["test"] = tokenize(data.test, data, tokenizer, "test", limit=data.test_limit)
    return {"train": train, **held_out}


def tokenize(
    path: str,
    data: schema.Data,
    tokenizer: "PreTrainedTokenizerBase",
    split: str = "train",
    *,
    limit: int | None = None,
) -> Examples:
    """Load one source and tokenize it with the format, template and length of the config.

    Examples longer than `max_length` are dropped or truncated at their end (`too_long`). Examples
    without a learned token are dropped. A text is cut into windows that overlap by one token, so
    that each token is a target once. A preference pair is one example: it is dropped where either
    of its sequences would be, and where both have the same tokens, because then there is no
    preference to learn.

    Raises:
        UserError: see `load_examples`.
    """
    # `columns` applies where a file has the name: training and test files may differ
    rows = [
        row | {name: row[alias] for name, alias in data.columns.items() if alias in row}
        for row in files.load(path, split, limit=limit)
    ]
    form = formats.detect(rows[0], path) if data.format == "auto" else data.format
    records, bad = formats.read_rows(rows, form)
    if bad and (data.bad_rows == "refuse" or not records):
        raise formats.bad_rows_error(bad, path)
    if data.learn == "last" and form != "text":
        records = {row: record.last_answer for row, record in records.items()}
    template = chat.resolve_template(data.template, form, list(records.values()), tokenizer)
    ignored = check_unused(
        rows,
        list(records.values()),
        form,
        template,
        tokenizer,
        aliases=data.columns,
        ignore=data.ignore_columns,
        where=path,
    )
    builder, template_bad = _encode_all(records, form, template, data, tokenizer)
    bad |= template_bad
    if bad and (data.bad_rows == "refuse" or len(bad) == len(rows)):
        raise formats.bad_rows_error(dict(sorted(bad.items())), path)
    if form == "text" and limit is not None:
        builder.truncate(limit)  # a row of texts gives several windows
    counts = {"read": len(rows), **builder.counts, "used": len(builder.ids)}
    if bad:
        counts["dropped_bad_rows"] = len(bad)
    if not builder.ids:
        reasons = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
        raise UserError(
            f"data {path}: no example is left with data.max_length = {data.max_length}"
            f" ({reasons}); raise it"
        )
    sources = {"data": path, "format": form, "template": template} | files.file_digest(path)
    if ignored:
        sources["ignored"] = ", ".join(ignored)
    chosen, *rejected = builder.build()
    return dataclasses.replace(
        chosen, counts=counts, sources=sources, rejected=rejected[0] if rejected else None
    )


def _encode_all(
    records: dict[int, formats.Record],
    form: str,
    template: str,
    data: schema.Data,
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[ExampleBuilder, dict[int, str]]:
    """Tokenize the records of a source, and say what is wrong with those that are refused."""
    # A pair has two sequences. They are tokenized side by side, so that both are used or dropped.
    sides = [records]
    rejected = {row: record.rejected for row, record in records.items() if record.rejected}
    if rejected:
        sides.append(rejected)
    special = chat.special_tokens(tokenizer).ids
    builder = ExampleBuilder(data.max_length, data.too_long, len(sides), special)
    bad: dict[int, str] = {}
    numbers = list(records)
    for start in range(0, len(numbers), CHUNK):
        chunk = numbers[start : start + CHUNK]
        encoded = []
        for side in sides:
            sequences, reasons = chat.encode_rows(
                {row: side[row] for row in chunk}, template, tokenizer, by_answer=len(sides) == 1
            )
            encoded.append(sequences)
            bad |= reasons
        for row in chunk:
            if row in bad:
                continue
            if form == "text":
                builder.add_windows(encoded[0][row][0])
            else:
                for pair in zip(*(sequences[row] for sequences in encoded), strict=True):
                    builder.add(pair, row)
    return builder, bad


def set_aside(examples: Examples, count: int, seed: int, split: str) -> tuple[Examples, Examples]:
    """Return (rest, selected): `count` examples selected by the stream `(split,)` of the seed.

    Both are in the order of the file.

    Raises:
        UserError: no example would be left to train on.

    Example:
        >>> from jax_ordermerge.data.examples import Ragged
        >>> tokens, answers = Ragged.of([[1, 2]] * 5, np.int32), Ragged.of([[0, 1]] * 5, np.bool_)
        >>> train, validation = set_aside(
        ...     Examples(tokens, answers, np.arange(5)), 2, 0, "validation"
        ... )
        >>> train.ids.tolist(), validation.ids.tolist()
        ([2, 3, 4], [0, 1])
    """
    order = permutation(len(examples), seed, split)
    if examples.rows is not None:
        # Answers of one conversation stay on one side: each is in the prompt of the next.
        order = np.concatenate(
            [np.flatnonzero(examples.rows == row) for row in dict.fromkeys(examples.rows[order])]
        )
        ends = np.flatnonzero(np.diff(examples.rows[order], append=-1)) + 1
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
    return examples.take(np.flatnonzero(~selected)), examples.take(np.flatnonzero(selected))
