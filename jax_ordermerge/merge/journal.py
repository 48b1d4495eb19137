"""The journal of a merge: one line per finished tensor, so that an interrupted merge continues.

Each process appends to a file of its own beside the unfinished output, and reads those of all.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_ordermerge.merge.diagnostics import Moments

_PREFIX = "journal-"


class TensorRecord(NamedTuple):
    """What is recorded of a finished tensor.

    Attributes:
        name: Hugging Face name.
        crc32: of its bytes, hexadecimal.
        checksums: of members and base in the dtype that was merged, see `diagnostics.scan`;
            None for a base that was not read as a whole.
        moments: of the task vectors; None without a base.
        elements: number of elements in the moments.
        not_finite: numbers of elements of members and base that are NaN or infinite.
    """

    name: str
    crc32: str
    checksums: list[int | None]
    moments: Moments | None
    elements: int
    not_finite: list[int]


def path_of(directory: Path, process: int) -> Path:
    """Return the journal of a process."""
    return directory / f"{_PREFIX}{process}"


def append(path: Path, record: TensorRecord) -> None:
    """Append a record.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> append(path_of(directory, 0), TensorRecord("a", "0badcafe", [1], None, 0, [0]))
        >>> read(directory, ["a"])["a"].crc32
        '0badcafe'
    """
    moments = None if record.moments is None else [np.asarray(x).tolist() for x in record.moments]
    # Opened for every record: closing hands the line to the system, so that a killed process loses
    # none.
    with path.open("a") as file:
        # The newline comes first: an interrupted write leaves half a line, and what follows must
        # not be joined to it.
        file.write("\n" + json.dumps(record._asdict() | {"moments": moments}))


def read(directory: Path, names: Collection[str]) -> dict[str, TensorRecord]:
    """Return the records of these tensors from the journals of all processes, by name.

    Lines that were cut off are skipped: their tensors are merged again.
    """
    records = {}
    for path in sorted(directory.glob(f"{_PREFIX}*")):
        for line in path.read_text().splitlines():
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            if fields["name"] in names:
                if fields["moments"] is not None:
                    fields["moments"] = Moments(*map(np.array, fields["moments"]))
                # A tensor that was merged again has two records. The later one of a file replaces
                # the earlier.
                records[fields["name"]] = TensorRecord(**fields)
    return records


def remove(directory: Path) -> None:
    """Remove the journals of all processes."""
    for path in directory.glob(f"{_PREFIX}*"):
        path.unlink()
