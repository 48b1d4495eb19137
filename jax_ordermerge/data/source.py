"""Files, hub datasets and generated records into tokenized examples. The shell of this room: it alone opens files."""

import csv
import dataclasses
import gzip
import hashlib
import io
import json
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
from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
GENERATED: Final = "generated:"
SUFFIXES: Final = (".json", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".txt")
HUB_NAME: Final = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[^@]+))?"
)
# as in the TinyStories distribution; a text file without it is one text
TEXT_END: Final = "<|endoftext|>"
CHUNK: Final = 4096  # records tokenized at a time: lists of Python integers take ten times the memory of their array


def load(path: str, split: str = "train", *, limit: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a data source.

    Args:
        path: a file (json list or `{"data": [...]}`, jsonl, either also .gz, parquet, csv with a header, txt: one text, or several
            between `<|endoftext|>`) or the address of one (gs://, s3://), a hub dataset `owner/name[:config][@split]`, or `generated:NAME[@split]`.
        split: of a hub or generated dataset that names none.
        limit: at most so many rows, the first ones.

    Returns:
        One dict a row. Everything in a csv is a string.

    Raises:
        UserError: the source is absent, unreadable, of an unknown kind, or empty.
    """
    if path.startswith(GENERATED):
        from jax_ordermerge.data import synthetic  # here, since only this branch needs it

        name, _, own = path.removeprefix(GENERATED).partition("@")
        rows: list[dict[str, Any]] = [dict(row) for row in synthetic.generated(name, own or split)]
    elif remote.address(path) is not None or Path(path).exists() or path.endswith(SUFFIXES):
        rows = _read_file(remote.fetch(path))
    elif match := HUB_NAME.fullmatch(path):
        rows = _read_hub(match["name"], match["config"], match["split"] or split, limit)
    else:
        raise UserError(
            f"data {path} not found; expected a file ({' '.join(SUFFIXES)}), a hub dataset owner/name, or generated:NAME"
        )
    if not rows:
        raise UserError(f"data {path} holds no rows")
    return rows[:limit]


def load_examples(
    data: schema.Data, tokenizer: "PreTrainedTokenizerBase", split: Split, *, seed: int
) -> Examples | None:
    """Load, template and tokenize one split; None where the config has none (no held-out examples, no validation examples).

    `train` and `validation` come from `data.train`, and so does `test` where it has no file of its own: `test_examples` and
    `validation_examples` of the examples that are used are set aside by `set_aside`. `limit` counts rows of the file, before anything
    is dropped, and windows of texts.

    Args:
        data: the section of the config.
        tokenizer: of the base model, see `load_tokenizer`.
        split: which part.
        seed: seed of the run; only the choice of what is set aside depends on it.

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
    """Return all splits that the config has as `load_examples` does, reading and tokenizing each source once.

    Raises:
        UserError: see `load_examples`.
    """
    train = tokenize(data.train, data, tokenizer, "train", limit=data.limit)
    held: dict[str, Examples] = {}
    sizes = {"test": data.test_examples, "validation": data.validation_examples}
    for split, count in sizes.items():
        if count:
            train, held[split] = set_aside(train, count, seed, split)
    if data.test is not None:
        held["test"] = tokenize(data.test, data, tokenizer, "test", limit=data.test_limit)
    return {"train": train, **held}


def tokenize(
    path: str,
    data: schema.Data,
    tokenizer: "PreTrainedTokenizerBase",
    split: str = "train",
    *,
    limit: int | None = None,
) -> Examples:
    """Load one source whole and tokenize it by the rules (format, template, length) of the config's section.

    Examples longer than `max_length` are dropped or truncated at their end, as `too_long` says; those that keep no learned token are
    dropped. A text is instead cut into windows that overlap by one token, so that each of its tokens is a target once. A preference
    pair is one example: it is dropped where either of its sequences would be, and also where both are the same tokens, since there
    is nothing to prefer.

    Raises:
        UserError: see `load_examples`.
    """
    # only where they are so named: training and test data may come from different places
    rows = [
        row | {name: row[own] for name, own in data.columns.items() if own in row}
        for row in load(path, split, limit=limit)
    ]
    form = formats.detect(rows[0], path) if data.format == "auto" else data.format
    records = formats.normalize(rows, form, path)
    template = chat.resolve_template(data.template, form, records, tokenizer)
    pairs = records[0].rejected is not None
    kept = _Kept(data.max_length, data.too_long, 2 if pairs else 1)
    for start in range(0, len(records), CHUNK):
        part = records[start : start + CHUNK]
        sides = [part, [record.rejected for record in part if record.rejected]] if pairs else [part]
        for origin, sequences in enumerate(
            zip(*(chat.encode(side, template, tokenizer) for side in sides), strict=True), start
        ):
            kept.window(*sequences) if form == "text" else kept.fit(sequences, origin)
    kept.cut(limit)  # a row gives several windows
    counts = {"read": len(rows), **kept.counts, "used": len(kept.origins)}
    if not kept.origins:
        said = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
        raise UserError(
            f"data {path}: no example is left with data.max_length = {data.max_length} ({said}); raise it"
        )
    sources = {"data": path, "format": form, "template": template} | _file_digest(path)
    chosen = kept.examples(0, [] if form == "text" else records)
    rejected = (
        kept.examples(1, [record.rejected for record in records if record.rejected])
        if pairs
        else None
    )
    return dataclasses.replace(chosen, counts=counts, sources=sources, rejected=rejected)


def set_aside(examples: Examples, count: int, seed: int, split: str) -> tuple[Examples, Examples]:
    """Return (rest, chosen): `count` examples chosen by the stream `(split,)` of the seed, both in the file's order.

    Raises:
        UserError: nothing would be left to train on.

    Example:
        >>> five = Examples(
        ...     Ragged.of([[1, 2]] * 5, np.int32), Ragged.of([[0, 1]] * 5, np.bool_), np.arange(5)
        ... )
        >>> train, validation = set_aside(five, 2, 0, "validation")
        >>> train.ids.tolist(), validation.ids.tolist()
        ([2, 3, 4], [0, 1])
    """
    if count >= len(examples):
        raise UserError(
            f"data.{split}_examples = {count} leaves nothing of {len(examples)} training examples; lower it"
        )
    chosen = np.zeros(len(examples), bool)
    chosen[permutation(len(examples), seed, split)[:count]] = True
    return examples.take(np.flatnonzero(~chosen)), examples.take(np.flatnonzero(chosen))


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a Hugging Face directory: local files only, none of its code.

    Raises:
        UserError: the directory or its tokenizer is absent or cannot be read.
    """
    # else its import warns where torch is absent, which no tokenizer needs
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # slow to import

    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(
            f"tokenizer directory {directory} not found; give the Hugging Face directory of the base model"
        )
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise UserError(
            f"{directory} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy that of the base model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises nearly anything on a broken file
        raise UserError(
            f"the tokenizer in {directory} cannot be read: {_first_line(error)}"
        ) from error
    return tokenizer


class _Kept:
    """The examples that are used, as arrays, and counts of the others."""

    def __init__(self, length: int, too_long: str, sequences: int = 1) -> None:
        self.length, self.too_long = length, too_long
        self.tokens: list[list[np.ndarray]] = [[] for _ in range(sequences)]
        self.answers: list[list[np.ndarray]] = [[] for _ in range(sequences)]
        self.origins: list[int] = []
        self.counts = {"dropped_too_long": 0, "truncated": 0, "dropped_no_response_tokens": 0}
        if sequences > 1:
            self.counts["dropped_same_tokens"] = 0

    def window(self, encoded: chat.Encoded) -> None:
        for start in range(0, max(len(encoded.tokens) - 1, 1), max(self.length - 1, 1)):
            self._add([encoded], start, len(self.origins))

    def fit(self, sequences: Sequence[chat.Encoded], origin: int) -> None:
        long = any(len(one.tokens) > self.length for one in sequences)
        if long and self.too_long == "drop":
            self.counts["dropped_too_long"] += 1
        elif not all(
            any(one.answers[1 : self.length]) for one in sequences
        ):  # the first token is nobody's target
            self.counts["dropped_no_response_tokens"] += 1
        elif (
            len(sequences) > 1
            and sequences[0].tokens[: self.length] == sequences[1].tokens[: self.length]
        ):
            self.counts["dropped_same_tokens"] += 1
        else:
            self.counts["truncated"] += long
            self._add(sequences, 0, origin)

    def cut(self, limit: int | None) -> None:
        if limit is not None:
            self.tokens, self.answers = (
                [rows[:limit] for rows in part] for part in (self.tokens, self.answers)
            )
            self.origins = self.origins[:limit]

    def _add(self, sequences: Sequence[chat.Encoded], start: int, origin: int) -> None:
        end = start + self.length
        for one, tokens, answers in zip(sequences, self.tokens, self.answers, strict=True):
            tokens.append(np.asarray(one.tokens[start:end], np.int32))
            answers.append(np.asarray(one.answers[start:end], np.bool_))
        self.origins.append(origin)

    def examples(self, side: int, records: Sequence[formats.Record]) -> Examples:
        return Examples(
            tokens=Ragged.of(self.tokens[side], np.int32),
            answers=Ragged.of(self.answers[side], np.bool_),
            ids=np.asarray(self.origins, np.int64),
            prompts=[records[row].prompt for row in self.origins] if records else (),
            responses=[records[row].response for row in self.origins] if records else (),
        )


# --- files ---


def _read_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(
            f"data file {path} not found"
            if not path.exists()
            else f"data {path} is a directory; give a file of it"
        )
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"data file {path} is of no known kind; expected {' '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
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


def _parse(text: str, path: Path) -> list[dict[str, Any]]:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "txt":
        texts = (part.strip("\n") for part in text.split(TEXT_END))
        return [{"text": part} for part in texts if part.strip()]
    if kind == "csv":
        rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
    elif kind == "json":
        whole = json.loads(text)
        found = whole.get("data") if isinstance(whole, dict) else whole
        if not isinstance(found, list):
            raise UserError(
                f'data file {path}: expected a list of objects, or {{"data": [...]}}; jsonl files end in .jsonl'
            )
        rows = found
    else:
        rows = [
            _line(line, number, path)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or None in row:
            shown = "more fields than the header" if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"data file {path}: row {number} is {shown}, expected an object with named columns"
            )
    return rows


def _line(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"data file {path}: line {number} is not JSON: {error}") from error


def _file_digest(path: str) -> dict[str, str]:
    if path.startswith(GENERATED) or not (local := remote.fetch(path)).is_file():
        return {}
    with local.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_hub(name: str, subset: str | None, split: str, limit: int | None) -> list[dict[str, Any]]:
    import datasets  # slow to import

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"hub dataset {name} (split {split}) cannot be loaded: {_first_line(error)}; or is this a missing file?"
        ) from error
    return table.select(range(min(limit or len(table), len(table)))).to_list()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
