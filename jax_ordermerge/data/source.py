"""Sources into tokenized examples, and the splits of a run."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from jax_ordermerge import config as schema
from jax_ordermerge.config.data import DataSource, DataSources, list_sources
from jax_ordermerge.data import chat, example_cache, files, formats
from jax_ordermerge.data.builder import ExampleBuilder
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.mixture import apply_weights, concatenate, set_aside
from jax_ordermerge.data.provenance import SourceInfo, summarize_bad_rows
from jax_ordermerge.data.shares import Chunk, Shares, agree, encode
from jax_ordermerge.data.unused import check_unused, read_columns, without_keys
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json

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
    `set_aside`. `limit` counts rows of a source before any is dropped, and windows of texts.

    Args:
        data: the section of the config.
        tokenizer: tokenizer of the base model, see `load_tokenizer`.
        split: which split.
        seed: seed of the run; only the choice of the examples set aside depends on it.

    Raises:
        UserError: bad input, with the source and the row; nothing left after dropping.
    """
    if split == "test" and data.test is not None:
        return tokenize(data.test, data, tokenizer, "test")
    if split != "train" and not (
        data.validation_examples if split == "validation" else data.test_examples
    ):
        return None
    return _load_splits(data.model_copy(update={"test": None}), tokenizer, seed)[split]


def load_splits(
    data: schema.Data, tokenizer: "PreTrainedTokenizerBase", *, seed: int, shared: bool = False
) -> dict[str, Examples]:
    """Return all splits of the config, see `load_examples`. Each source is tokenized once.

    Weights apply to what is left to train on, so that held-out examples depend on no weight and no
    copy of them is trained on.

    Args:
        data: the section of the config.
        tokenizer: tokenizer of the base model, see `load_tokenizer`.
        seed: seed of the run.
        shared: whether all processes call it, so that each may tokenize a share.

    Raises:
        UserError: see `load_examples`; no source has a column of `data.columns`.
    """
    splits = _load_splits(data, tokenizer, seed, shared)
    # A misspelt name would leave the column that a file has under the right name.
    read = {name for part in splits.values() for info in part.sources for name in info.columns}
    unread = [f"{name}: {alias}" for name, alias in data.columns.items() if name not in read]
    if unread:
        raise UserError(f"data.columns: no row of any source has the column of {', '.join(unread)}")
    return splits


def _load_splits(
    data: schema.Data, tokenizer: "PreTrainedTokenizerBase", seed: int, shared: bool = False
) -> dict[str, Examples]:
    train = tokenize(data.train, data, tokenizer, "train", shared=shared)
    held_out: dict[str, Examples] = {}
    # In this order: the test examples are the same with and without validation examples.
    sizes = {"test": data.test_examples, "validation": data.validation_examples}
    for split, count in sizes.items():
        if count:
            train, held_out[split] = set_aside(train, count, seed, split)
    if data.test is not None:
        held_out["test"] = tokenize(data.test, data, tokenizer, "test", shared=shared)
    return {"train": apply_weights(train, seed), **held_out}


def tokenize(
    sources: DataSources,
    data: schema.Data,
    tokenizer: "PreTrainedTokenizerBase",
    split: Literal["train", "test"] = "train",
    *,
    shared: bool = False,
) -> Examples:
    """Load sources and tokenize each with its format and template, and the length of the config.

    Examples longer than `max_length` are dropped or truncated at their end (`too_long`). Examples
    without a learned token are dropped. A text is cut into windows that overlap by one token, so
    that each token is a target once. A preference pair is one example: it is dropped where either
    of its sequences would be, and where both have the same tokens, because then there is no
    preference to learn. What was tokenized before is read from the `example_cache`. Of several
    processes that share the work each tokenizes a share of the rows, see `shares`.

    Raises:
        UserError: see `load_examples`.
    """
    listed = list_sources(sources)
    _refuse_same_files(listed)
    # Once for all sources: it hashes the whole tokenizer.
    fingerprint = example_cache.fingerprint(tokenizer)
    parts = []
    for source in listed:
        settings = settings_of(source, data, split)
        entry = example_cache.locate(source, settings, split, fingerprint)
        examples = None if entry is None else example_cache.read(entry, source)
        team = agree(entry, examples is not None) if shared else None
        if examples is None:
            examples = _tokenize_source(source, settings, tokenizer, split, team)
            # process 0 for all that share the directory; in another one the file is absent
            is_writer = team is None or team.process == 0
            if entry is not None and (is_writer or not entry.path.exists()):
                example_cache.write(entry, examples)
        parts.append(examples)
        # After each source and not at the end: the next one may take an hour.
        _refuse_same_content(listed, parts)
    return concatenate(parts)


def _refuse_same_content(sources: Sequence[DataSource], parts: Sequence[Examples]) -> None:
    """Refuse copies of a file under other names, as `_refuse_same_files` does for paths to it."""
    readers: dict[str, tuple[str, DataSource]] = {}
    for source, part in zip(sources, parts, strict=False):
        for file in part.sources[0].files:
            path, reader = readers.setdefault(file.sha256, (file.path, source))
            # An empty file is a copy of every other one, and hub data have no digest.
            is_copy = path != file.path and file.sha256 and file.rows
            if is_copy and (reader is source or not (reader.name and source.name)):
                raise UserError(
                    f"data: {file.path} is a copy of {path}; remove one of them, or give a name to"
                    " each of their sources"
                )


def _refuse_same_files(sources: Sequence[DataSource]) -> None:
    """Refuse a file that is read twice, unless its sources have different names on purpose."""
    readers: dict[str, DataSource] = {}
    for source in sources:
        for file in files.identify(source.path, source.split):
            reader = readers.get(file)
            if reader and (reader is source or not (reader.name and source.name)):
                raise UserError(
                    f"data: {file} is read twice, by {reader.label} and {source.label}; give"
                    " weight: 2 to use its rows twice, or a name to each source"
                )
            readers[file] = source


def settings_of(source: DataSource, data: schema.Data, split: str) -> schema.Data:
    """Return the section of the config as it is for one source, its limit under `limit`.

    Example:
        >>> source = DataSource(path="a.jsonl", template="plain")
        >>> settings = settings_of(source, schema.Data(template="chat", test_limit=5), "test")
        >>> settings.template, settings.limit
        ('plain', 5)
    """
    names = ("format", "template", "columns", "ignore_columns", "limit")
    settings = {name: getattr(source, name) for name in names if getattr(source, name) is not None}
    limit = data.test_limit if split == "test" else data.limit
    return data.model_copy(update={"limit": limit} | settings)


def read_table(source: DataSource, data: schema.Data, split: str) -> tuple[files.Table, list[Json]]:
    """Read a source: its table as in the files, and its rows with the columns of its format.

    Args:
        source: what to read.
        data: the settings of the source, see `settings_of`.
        split: of a hub or generated dataset that names none.

    Raises:
        UserError: see `files.read`.
    """
    table = files.read(source.path, source.split or split, limit=data.limit)
    return table, read_columns(table.rows, data.columns, data.ignore_columns)


def _tokenize_source(
    source: DataSource,
    data: schema.Data,
    tokenizer: "PreTrainedTokenizerBase",
    split: str,
    shares: Shares | None = None,
) -> Examples:
    table, rows = read_table(source, data, split)
    # Columns of any row: JSON Lines may leave out a key where it is empty. An alias of `data` that
    # this source lacks may be of another source; one of its own is a mistake.
    present = {column for row in table.rows for column in row}
    columns = {name: alias for name, alias in data.columns.items() if alias in present}
    for name, alias in (source.columns or {}).items():
        if name not in columns:
            raise UserError(
                f"data {source.path}: no row has the column of columns: {name}: {alias}"
            )
    info = SourceInfo(
        source.label,
        source.path,
        weight=source.weight,
        files=table.files,
        passed_over=table.passed_over,
        columns=columns,
    )
    form = formats.detect(rows, source.path) if data.format == "auto" else data.format
    records, bad = formats.read_rows(rows, form)
    # `detect` and the template need records, so bad rows are refused in two steps: here those of
    # the format, below those of the template.
    if bad and (data.bad_rows == "refuse" or not records):
        raise formats.bad_rows_error(bad, info.locate)
    if data.learn == "last" and form != "text":
        records = {row: record.last_answer for row, record in records.items()}
    template = chat.resolve_template(
        data.template, form, list(records.values()), tokenizer, source.path
    )
    ignored = check_unused(
        table.rows,
        list(records.values()),
        form,
        template,
        tokenizer,
        aliases=data.columns,
        ignore=data.ignore_columns,
        where=source.path,
    )
    records = {row: without_keys(record, data.ignore_columns) for row, record in records.items()}
    builder, template_bad = _encode_all(records, form, template, data, tokenizer, shares)
    bad |= template_bad
    if bad and (data.bad_rows == "refuse" or len(bad) == len(rows)):
        raise formats.bad_rows_error(dict(sorted(bad.items())), info.locate)
    if form == "text" and data.limit is not None:
        builder.truncate(data.limit)  # a row of texts gives several windows
    counts = {"read": len(rows), **builder.counts, "used": len(builder.ids)}
    if bad:
        counts["dropped_bad_rows"] = len(bad)
    # of the rows that are trained on: what a dropped row holds changes nothing
    used = [record for row, record in records.items() if row not in bad]
    counts |= chat.count_irregularities(used, template, tokenizer)
    if not builder.ids:
        reasons = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
        raise UserError(
            f"data {source.path}: no example is left with data.max_length = {data.max_length}"
            f" ({reasons}); raise it"
        )
    # one side, or of pairs two
    chosen, *rejected = builder.build()
    info = dataclasses.replace(
        info,
        format=form,
        template=template,
        ignored=tuple(ignored),
        counts=counts,
        bad_rows=summarize_bad_rows(bad, table.files),
        # numbers of rows, or of windows or answers where a row gave several
        id_count=max(len(rows), builder.number + 1, len(builder.ids)),
    )
    return dataclasses.replace(
        chosen, counts=counts, sources=(info,), rejected=rejected[0] if rejected else None
    )


def _encode_all(
    records: dict[int, formats.Record],
    form: str,
    template: str,
    data: schema.Data,
    tokenizer: "PreTrainedTokenizerBase",
    shares: Shares | None,
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
    # at least one chunk for each process
    size = CHUNK if shares is None else max(1, min(CHUNK, -(-len(numbers) // shares.processes)))
    chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def encode_chunk(rows: Sequence[int]) -> Chunk:
        encoded = []
        reasons: dict[int, str] = {}
        for side in sides:
            sequences, bad_rows = chat.encode_rows(
                {row: side[row] for row in rows}, template, tokenizer, by_answer=len(sides) == 1
            )
            encoded.append(sequences)
            reasons |= bad_rows
        return Chunk(encoded, reasons)

    all_encoded = encode(chunks, sides, encode_chunk, shares)
    for chunk, (encoded, reasons) in zip(chunks, all_encoded, strict=True):
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
