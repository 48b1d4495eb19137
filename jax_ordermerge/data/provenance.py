"""Where examples come from: sources, their files, and what was dropped of them."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

_REASONS, _ROWS = 10, 5  # shown of bad rows


class DataFile(NamedTuple):
    """A file, hub dataset or generated dataset that was read.

    Attributes:
        path: as it was named, or below the directory that was named.
        rows: how many rows of it were read.
        sha256: of its bytes, as hexadecimal; empty where there is no single file.
    """

    path: str
    rows: int
    sha256: str = ""


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """One source of examples.

    Attributes:
        name: for readers.
        path: a file, directory, glob, hub dataset or generated dataset.
        format: a key of `formats.FORMATS`.
        template: a name of `chat.TEMPLATES`.
        weight: how often an epoch has each row.
        files: what was read, in this order; rows are numbered through.
        passed_over: files of a directory or glob that are no data.
        columns: columns of the format that were read under other names, and these names.
        ignored: columns and keys of rows that nothing reads.
        counts: `read`, `used`, and how many were dropped or truncated for which reason.
        bad_rows: what is wrong with the rows that `data.bad_rows: drop` leaves out, and which.
        first_id: the lowest id of an example of this source.
        id_count: how many ids belong to this source, those of dropped examples included.

    Example:
        >>> files = (DataFile("a.jsonl", 2), DataFile("b.jsonl", 3))
        >>> SourceInfo("d", "d", files=files).locate(3)
        ('b.jsonl', 1)
    """

    name: str
    path: str
    format: str = ""
    template: str = ""
    weight: float = 1.0
    files: tuple[DataFile, ...] = ()
    passed_over: tuple[str, ...] = ()
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bad_rows: tuple[str, ...] = ()
    first_id: int = 0
    id_count: int = 0

    def locate(self, row: int) -> tuple[str, int]:
        """Return the file of a row of this source, and the number of the row in that file."""
        return locate(self.files, row)


def locate(files: tuple[DataFile, ...], row: int) -> tuple[str, int]:
    """Return the file of a row whose number goes through all files, and its number there.

    Example:
        >>> locate((DataFile("a.jsonl", 2), DataFile("b.jsonl", 3)), 2)
        ('b.jsonl', 0)
    """
    for file in files:
        if row < file.rows:
            return file.path, row
        row -= file.rows
    raise IndexError(f"row {row} is beyond the last file")


def summarize_bad_rows(bad: Mapping[int, str], files: tuple[DataFile, ...]) -> tuple[str, ...]:
    """Return what is wrong with rows, with the first ones of each reason.

    Args:
        bad: a reason by row number, as of `formats.read_rows`.
        files: of the source.

    Example:
        >>> files = (DataFile("a.jsonl", 2), DataFile("b.jsonl", 3))
        >>> summarize_bad_rows({1: ": no text", 3: ": no text"}, files)
        ('no text: 2 rows, the first a.jsonl row 1, b.jsonl row 1',)
    """
    rows: dict[str, list[int]] = {}
    for row, reason in sorted(bad.items()):
        # By reason: a file with one mistake in every row gives one line.
        rows.setdefault(reason.removeprefix(":").strip(), []).append(row)
    reasons = []
    # data.json stays readable where every row has a mistake of its own.
    for reason, numbers in list(rows.items())[:_REASONS]:
        places = [locate(files, row) for row in numbers[:_ROWS]]
        named = (f"{file} row {row}" if len(files) > 1 else f"{row}" for file, row in places)
        plural = "s" if len(numbers) > 1 else ""
        reasons.append(f"{reason}: {len(numbers)} row{plural}, the first {', '.join(named)}")
    if len(rows) > _REASONS:
        reasons.append(f"{len(rows) - _REASONS} further reasons")
    return tuple(reasons)
