"""Files, hub datasets and generated records into tokenized examples.

The only module of this package that opens files; `formats.py`, `chat.py` and `pack.py` are pure.
"""

import csv
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from jax_ordermerge import config as schema
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.data import chat, formats
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.data.order import permutation
from jax_ordermerge.data.unused import check_unused
from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JsonRow = dict[str, Any]
Split = Literal["train", "validation", "test"]
GENERATED: Final = "generated:"
SUFFIXES: Final = (".json", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".txt")
HUB_NAME: Final = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[^@]+))?"
)
# Separates texts, as in the files of TinyStories. A text file without it is one text.
TEXT_END: Final = "<|endoftext|>"
# Records tokenized at a time: lists of Python integers take ten times the memory of their array.
CHUNK: Final = 4096


def load(path: str, split: str = "train", *, limit: int | None = None) -> list[JsonRow]:
    """Read the rows of a data source.

    Args:
        path: a file (json list or `{"data": [...]}`, jsonl, either also .gz, parquet, csv with a
            header, txt: one text, or several separated by `<|endoftext|>`) or its address in a
            bucket (gs://, s3://); a hub dataset `owner/name[:config][@split]`; or
            `generated:NAME[@split]`.
        split: split of a hub or generated dataset whose path names none.
        limit: largest number of rows; the first ones are returned.

    Returns:
        One dict per row. All values of a csv are strings. NaN is null.

    Raises:
        UserError: the source is absent, unreadable, of an unknown kind, or empty.
    """
    if path.startswith(GENERATED):
        from jax_ordermerge.data import synthetic  # only this branch needs it

        name, _, named_split = path.removeprefix(GENERATED).partition("@")
        rows: list[JsonRow] = [dict(row) for row in synthetic.generated(name, named_split or split)]
    elif remote.address(path) is not None or Path(path).exists() or path.endswith(SUFFIXES):
        rows = _read_file(remote.fetch(path))
    elif match := HUB_NAME.fullmatch(path):
        rows = _read_hub(match["name"], match["config"], match["split"] or split, limit)
    else:
        raise UserError(
            f"data {path} not found; expected a file ({' '.join(SUFFIXES)}), a hub dataset"
            " owner/name, or generated:NAME"
        )
    if not rows:
        raise UserError(f"data {path} holds no rows")
    return rows[:limit]


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
        for row in load(path, split, limit=limit)
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
    sources = {"data": path, "format": form, "template": template} | _file_digest(path)
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
) -> tuple["_ExampleBuilder", dict[int, str]]:
    """Tokenize the records of a source, and say what is wrong with those that are refused."""
    # A pair has two sequences. They are tokenized side by side, so that both are used or dropped.
    sides = [records]
    rejected = {row: record.rejected for row, record in records.items() if record.rejected}
    if rejected:
        sides.append(rejected)
    builder = _ExampleBuilder(data.max_length, data.too_long, len(sides))
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


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a Hugging Face directory from local files, without running its code.

    Raises:
        UserError: the directory or its tokenizer is absent or cannot be read.
    """
    # its import warns where torch is absent, which no tokenizer needs
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # slow to import

    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(
            f"tokenizer directory {directory} not found; give the Hugging Face directory of the"
            " base model"
        )
    # transformers asks for tiktoken, which does not read this file either
    only_model = (folder / "tokenizer.model").is_file() and not (
        (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    )
    if only_model and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{directory} has only tokenizer.model, which needs sentencepiece; install it, or copy"
            " the tokenizer.json of the base model"
        )
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in files):
        raise UserError(
            f"{directory} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json);"
            " copy that of the base model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises errors of many kinds on a broken file
        raise UserError(
            f"the tokenizer in {directory} cannot be read: {_first_line(error)}"
        ) from error
    return tokenizer


class _ExampleBuilder:
    """Collects the tokens of examples that are used and counts the others.

    An example has one sequence, or two for pairs; `tokens` and `answers` are lists per sequence.
    """

    def __init__(self, length: int, too_long: str, sequences: int = 1) -> None:
        self.length, self.too_long = length, too_long
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
        self.ids.append(number)

    def build(self) -> list[Examples]:
        """Return the examples of each side."""
        # The number of a row is the number of its example, unless a row gave several.
        has_rows = len(self.rows) == len(self.ids) and len(set(self.rows)) == len(self.rows)
        ids = self.rows if has_rows else self.ids
        rows = None if has_rows or not self.rows else np.asarray(self.rows, np.int64)
        examples = []
        for tokens, answers, records in zip(self.tokens, self.answers, self.records, strict=True):
            used = [record for record in records if record.text is None]
            examples.append(
                Examples(
                    tokens=Ragged.of(tokens, np.int32),
                    answers=Ragged.of(answers, np.bool_),
                    ids=np.asarray(ids, np.int64),
                    rows=rows,
                    prompts=[record.prompt for record in used],
                    responses=[record.response for record in used],
                )
            )
        return examples


# ------------------------------------------------------------------ files and the hub


def _read_file(path: Path) -> list[JsonRow]:
    if not path.exists():
        raise UserError(f"data file {path} not found")
    if not path.is_file():
        raise UserError(f"data {path} is a directory; give a file of it")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"data file {path} has an unknown suffix; expected {' '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return [_nan_to_null(row) for row in pyarrow.parquet.read_table(path).to_pylist()]
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig", newline="") as file
        ):
            return _parse(file.read(), path)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data file {path} cannot be read: {_first_line(error)}") from error


def _parse(text: str, path: Path, kind: str = "") -> list[JsonRow]:
    # `utf-8-sig` above drops a byte order mark, which spreadsheets write before the first column
    kind = kind or path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "txt":
        texts = (part.strip("\n") for part in text.split(TEXT_END))
        return [{"text": part} for part in texts if part.strip()]
    if kind == "csv":
        csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 131,072
        rows: Any = list(csv.DictReader(io.StringIO(text, newline="")))
    elif kind == "json":
        try:
            document = _parse_json(text)
        except json.JSONDecodeError as error:
            # JSON Lines under the name of JSON: a second object follows the first
            if not error.msg.startswith("Extra data"):
                raise
            return _parse(text, path, "jsonl")
        rows = document.get("data") if isinstance(document, dict) else document
        if not isinstance(rows, list):
            raise UserError(
                f'data file {path}: expected a list of objects, or {{"data": [...]}};'
                " jsonl files end in .jsonl"
            )
    else:
        rows = []
        # split("\n") and not splitlines(), which also splits at U+2028 inside JSON strings
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [_parse_json(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise UserError(f"data file {path}: line {number} is not JSON: {error}") from error
    # csv.DictReader collects surplus fields under the key None
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or None in row:
            shown = "more fields than the header" if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"data file {path}: row {number} is {shown}, expected an object with named columns"
            )
    return rows


def _parse_json(text: str) -> Any:
    # pandas writes NaN for an empty cell. Python's parser would make a number of it, which a
    # template prints as the text "nan".
    return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {name: _nan_to_null(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_nan_to_null(part) for part in value]
    return value


def _file_digest(path: str) -> dict[str, str]:
    if path.startswith(GENERATED) or not (local := remote.fetch(path)).is_file():
        return {}
    with local.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_hub(name: str, subset: str | None, split: str, limit: int | None) -> list[JsonRow]:
    import datasets  # slow to import

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"hub dataset {name} (split {split}) cannot be loaded: {_first_line(error)};"
            " or is this a missing file?"
        ) from error
    rows = table.select(range(min(limit or len(table), len(table)))).to_list()
    return [_nan_to_null(row) for row in rows]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
