"""Rows of data sources: files, hub datasets and generated records, as dicts of columns."""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any, Final, NamedTuple

from jax_ordermerge.checkpoint import remote
from jax_ordermerge.data import values
from jax_ordermerge.data.provenance import DataFile
from jax_ordermerge.errors import UserError, first_line

JsonRow = dict[str, Any]
GENERATED: Final = "generated:"
SUFFIXES: Final = (".json", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".txt")
HUB_NAME: Final = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[^@]+))?"
)
# Separates texts, as in the files of TinyStories. A text file without it is one text.
TEXT_END: Final = "<|endoftext|>"


class Table(NamedTuple):
    """The rows of a data source, and the files that they were read from, in the same order."""

    rows: list[JsonRow]
    files: tuple[DataFile, ...]
    passed_over: tuple[str, ...] = ()


def load(path: str, split: str = "train", *, limit: int | None = None) -> list[JsonRow]:
    """Return the rows of a data source, see `read`."""
    return read(path, split, limit=limit).rows


def read(path: str, split: str = "train", *, limit: int | None = None) -> Table:
    """Read a data source.

    Args:
        path: a file (json list or `{"data": [...]}`, jsonl, either also .gz, parquet, csv with a
            header, txt: one text, or several separated by `<|endoftext|>`) or its address in a
            bucket (gs://, s3://); a hub dataset `owner/name[:config][@split]`; or
            `generated:NAME[@split]`.
        split: split of a hub or generated dataset whose path names none.
        limit: largest number of rows; the first ones are returned.

    Returns:
        Rows as one dict each. All values of a csv are strings. NaN is null.

    Raises:
        UserError: the source is absent, unreadable, of an unknown kind, or empty.
    """
    sha256 = ""
    if path.startswith(GENERATED):
        from jax_ordermerge.data import synthetic  # only this branch needs it

        name, _, named_split = path.removeprefix(GENERATED).partition("@")
        rows: list[JsonRow] = [dict(row) for row in synthetic.generated(name, named_split or split)]
    elif remote.address(path) is not None or Path(path).exists() or path.endswith(SUFFIXES):
        local = remote.fetch(path)
        rows = _read_file(local)
        sha256 = _digest(local)
    elif match := HUB_NAME.fullmatch(path):
        rows = _read_hub(match["name"], match["config"], match["split"] or split, limit)
    else:
        raise UserError(
            f"data {path} not found; expected a file ({' '.join(SUFFIXES)}), a hub dataset"
            " owner/name, or generated:NAME"
        )
    if not rows:
        raise UserError(f"data {path} holds no rows")
    rows = rows[:limit]
    return Table(rows, (DataFile(path, len(rows), sha256),))


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

            # Without the option a map is a list of pairs, which templates print as one.
            rows = pyarrow.parquet.read_table(path).to_pylist(maps_as_pydicts="strict")
            return [values.plain(row) for row in rows]
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig", newline="") as file
        ):
            return _parse(file.read(), path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data file {path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, csv.Error, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data file {path} cannot be read: {first_line(error)}") from error


def _parse(text: str, path: Path, kind: str = "") -> list[JsonRow]:
    # `utf-8-sig` above drops a byte order mark, which spreadsheets write before the first column
    kind = kind or path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if "\0" in text:
        # UTF-16 without a byte order mark passes for UTF-8 with a null after each letter.
        raise UserError(f"data file {path} holds null characters; is it UTF-16? save it as UTF-8")
    if kind == "txt":
        text = text.replace("\r\n", "\n")  # line ends of Windows, as open() reads them
        texts = (part.strip("\n") for part in text.split(TEXT_END))
        return [{"text": part} for part in texts if part.strip()]
    if kind == "csv":
        rows: Any = _parse_csv(text, path)
    elif kind == "json":
        try:
            document = values.parse_json(text)
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
        if isinstance(document, dict) and (
            lists := [name for name, part in document.items() if isinstance(part, list)][1:]
        ):
            raise UserError(
                f"data file {path} has several lists: data, {', '.join(lists)}; one is expected"
            )
    else:
        rows = []
        # split("\n") and not splitlines(), which also splits at U+2028 inside JSON strings
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [values.parse_json(line)] if line.strip() else []
            except ValueError as error:
                raise UserError(f"data file {path}: line {number} is not JSON: {error}") from error
    # csv.DictReader collects surplus fields under the key None
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or None in row:
            shown = "more fields than the header" if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"data file {path}: row {number} is {shown}, expected an object with named columns"
            )
    return rows


def _parse_csv(text: str, path: Path) -> list[dict[Any, Any]]:
    csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 131,072
    # Not strict, a quote that is never closed would take in the rest of the file as one cell.
    reader = csv.DictReader(io.StringIO(text.lstrip("\r\n"), newline=""), strict=True)
    names = list(reader.fieldnames or ())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"data file {path}: the header names {', '.join(map(repr, twice))} more than once"
        )
    # pandas writes its index under no name, and reads it under this one
    reader.fieldnames = [name or "Unnamed: 0" for name in names]
    return list(reader)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_hub(name: str, subset: str | None, split: str, limit: int | None) -> list[JsonRow]:
    import datasets  # slow to import

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"hub dataset {name} (split {split}) cannot be loaded: {first_line(error)};"
            " or is this a missing file?"
        ) from error
    rows = table.select(range(min(limit or len(table), len(table)))).to_list()
    return [values.plain(row) for row in rows]
