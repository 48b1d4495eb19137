"""Rows of data sources: files, hub datasets and generated records, as dicts of columns."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from jax_ordermerge.checkpoint.remote import file_digest
from jax_ordermerge.data import values
from jax_ordermerge.data.listing import EXPECTED, HUB_NAME, list_files
from jax_ordermerge.data.provenance import DataFile
from jax_ordermerge.errors import UserError, first_line
from jax_ordermerge.json_types import Json, JsonValue

GENERATED: Final = "generated:"
# Quotes in .tsv files are those of .csv files, as pandas and spreadsheets write and read them.
DELIMITERS: Final = {"csv": ",", "tsv": "\t"}
# Separates texts, as in the files of TinyStories. A text file without it is one text.
TEXT_END: Final = "<|endoftext|>"


class Table(NamedTuple):
    """The rows of a data source, and the files that they were read from, in the same order."""

    rows: list[Json]
    files: tuple[DataFile, ...]
    passed_over: tuple[str, ...] = ()


def load(path: str, split: str = "train", *, limit: int | None = None) -> list[Json]:
    """Return the rows of a data source, see `read`."""
    return read(path, split, limit=limit).rows


def read(path: str, split: str = "train", *, limit: int | None = None) -> Table:
    """Read a data source.

    Args:
        path: a file (json list or `{"data": [...]}`, jsonl, csv or tsv with a header, parquet, txt:
            one text, or several separated by `<|endoftext|>`; all but parquet also .gz and .zst),
            or a directory or a glob of such files, see `listing`, or one of these in a bucket
            (gs://, s3://); a hub dataset `owner/name[:config][@split]`; or
            `generated:NAME[@split]`.
        split: split of a hub or generated dataset whose path names none.
        limit: largest number of rows; the first ones are returned.

    Returns:
        Rows as one dict each. All values of a csv or tsv are strings. NaN is null.

    Raises:
        UserError: the source is absent, unreadable, of an unknown kind, or empty.
    """
    passed_over: tuple[str, ...] = ()
    if path.startswith(GENERATED):
        from jax_ordermerge.data import synthetic  # only this branch needs it

        name, _, named_split = path.removeprefix(GENERATED).partition("@")
        rows: list[Json] = [dict(row) for row in synthetic.generated(name, named_split or split)]
        files = [DataFile(_with_split(path, split), len(rows[:limit]))]
    elif (listing := list_files(path)) is not None:
        rows, files, passed_over = *_read_files(listing.files, limit), listing.passed_over
    elif match := HUB_NAME.fullmatch(path):
        rows = _read_hub(match["name"], match["config"], match["split"] or split, limit)
        files = [DataFile(_with_split(path, split), len(rows))]
    else:
        raise UserError(
            f"data {path} not found; expected a file ({EXPECTED}), a directory, a glob, a hub"
            " dataset owner/name, or generated:NAME"
        )
    if not rows:
        raise UserError(
            f"data {path} holds no rows; expected one example per row, in CSV below a header"
        )
    return Table(rows[:limit], tuple(files), passed_over)


def _read_files(
    paths: Iterable[tuple[str, Path]], limit: int | None
) -> tuple[list[Json], list[DataFile]]:
    """Read files one after another, until there are `limit` rows."""
    rows: list[Json] = []
    files = []
    for name, path in paths:
        left = None if limit is None else limit - len(rows)
        if left == 0:
            break
        part = _read_file(path, name)[:left]
        files.append(DataFile(name, len(part), file_digest(path)))
        rows += part
    return rows, files


def _read_file(path: Path, name: str) -> list[Json]:
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            # An absolute path, since a relative one such as `s3:x/a.parquet` is read as a URI.
            table = pyarrow.parquet.read_table(path.absolute())
            # Without the option a map is a list of pairs, which templates print as one.
            rows = table.to_pylist(maps_as_pydicts="strict")
            return [values.plain(row) for row in rows]
        # `utf-8-sig` drops a byte order mark, which spreadsheets write before the first column
        return _parse(_read_bytes(path).decode("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data file {name} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, csv.Error, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data file {name} cannot be read: {first_line(error)}") from error


def _read_bytes(path: Path) -> bytes:
    codec = path.suffix.lower()
    if codec == ".gz":
        with gzip.open(path) as file:
            return file.read()
    if codec == ".zst":
        import pyarrow as pa

        with pa.input_stream(str(path), compression="zstd") as stream:
            return bytes(stream.read())
    return path.read_bytes()


def _parse(text: str, name: str, kind: str = "") -> list[Json]:
    plain_name = name.lower().removesuffix(".gz").removesuffix(".zst")
    kind = kind or plain_name.rsplit(".", 1)[-1]
    if "\0" in text:
        # UTF-16 without a byte order mark passes for UTF-8 with a null after each letter.
        raise UserError(f"data file {name} holds null characters; is it UTF-16? save it as UTF-8")
    if kind == "txt":
        text = text.replace("\r\n", "\n")  # line ends of Windows, as open() reads them
        texts = (part.strip("\n") for part in text.split(TEXT_END))
        return [{"text": part} for part in texts if part.strip()]
    if kind in DELIMITERS:
        rows: JsonValue = _parse_csv(text, name, DELIMITERS[kind])
    elif kind == "json":
        try:
            document = values.parse_json(text)
        except json.JSONDecodeError as error:
            # JSON Lines under the name of JSON: a second object follows the first
            if not error.msg.startswith("Extra data"):
                raise
            return _parse(text, name, "jsonl")
        rows = document.get("data") if isinstance(document, dict) else document
        if not isinstance(rows, list):
            raise UserError(
                f'data file {name}: expected a list of objects, or {{"data": [...]}};'
                " jsonl files end in .jsonl"
            )
        if isinstance(document, dict) and (
            lists := [key for key, part in document.items() if isinstance(part, list)][1:]
        ):
            raise UserError(
                f"data file {name} has several lists: data, {', '.join(lists)}; one is expected"
            )
    else:
        rows = []
        # split("\n") and not splitlines(), which also splits at U+2028 inside JSON strings
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [values.parse_json(line)] if line.strip() else []
            except ValueError as error:
                raise UserError(f"data file {name}: line {number} is not JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"data file {name}: row {number} is {type(row).__name__}, expected an object with"
                " named columns"
            )
    return rows


def _parse_csv(text: str, name: str, delimiter: str) -> list[Json]:
    csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 131,072
    # Not strict, a quote that is never closed would take in the rest of the file as one cell.
    content = text.lstrip("\r\n")
    skipped = text[: len(text) - len(content)].count("\n")
    lines = io.StringIO(content, newline="")
    reader = csv.DictReader(lines, strict=True, delimiter=delimiter)
    columns = list(reader.fieldnames or ())
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise UserError(
            f"data file {name}: the header names {', '.join(map(repr, twice))} more than once"
        )
    # pandas writes its index under no name, and reads it under this one
    reader.fieldnames = [column or "Unnamed: 0" for column in columns]
    rows = []
    for row in reader:
        # surplus fields are collected under the key None
        if surplus := row.pop(None, None):
            shown = "the tab" if delimiter == "\t" else f"'{delimiter}'"
            raise UserError(
                f"data file {name}: line {skipped + reader.line_num} has"
                f" {len(columns) + len(surplus)} fields, the header has {len(columns)}; put a text"
                f" that holds {shown} in double quotes"
            )
        rows.append(row)
    return rows


def identify(path: str, split: str | None) -> list[str]:
    """Return a name for each file of a path, equal where two paths lead to one file.

    Args:
        path: as of `read`.
        split: of a hub or generated dataset.

    Raises:
        UserError: a split is given for files; or see `list_files`.
    """
    listing = None if path.startswith(GENERATED) else list_files(path)
    if listing is None:
        return [_with_split(path, split or "train")]
    if split is not None:
        raise UserError(
            f"data {path}: split = {split} is of hub datasets, files have none; remove it"
        )
    return [str(local.resolve()) for _, local in listing.files]


def _with_split(path: str, split: str) -> str:
    return path if "@" in path else f"{path}@{split}"


def _read_hub(name: str, subset: str | None, split: str, limit: int | None) -> list[Json]:
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
