"""Where examples come from: sources, their files, and what was dropped of them."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple


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
