"""What was measured, line by line: a search that continues takes it from here instead of measuring it again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_ordermerge import processes
from jax_ordermerge.errors import UserError


class Journal:
    """Losses of candidates on subsets, appended as they are measured. A last line that was cut off is measured again.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "journal.jsonl"
        >>> with Journal(file, {"seed": 0}) as journal:
        ...     journal.recall("a", 0, lambda: np.array([1.5, 2.0])).tolist()
        [1.5, 2.0]
        >>> with Journal(file, {"seed": 0}) as journal:
        ...     journal.recall("a", 0, lambda: 1 / 0).tolist()
        [1.5, 2.0]
    """

    def __init__(self, file: Path, of: Mapping[str, Any]) -> None:
        """Open the journal of a search.

        Args:
            file: jsonl.
            of: everything that decides what is measured, plain data: the first line.

        Raises:
            UserError: the file is of another search.
        """
        self._file, self._known, self.taken = file, dict[tuple[str, int], np.ndarray](), 0
        kept = self._read(dict(of))
        processes.check_alike({"search journal": len(self._known)})
        if jax.process_index() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as out:
                out.truncate(kept)
        self._out = file.open("a") if jax.process_index() == 0 else None
        if not kept:
            self._append(dict(of))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._out is not None:
            self._out.close()

    def recall(self, key: str, subset: int, measure: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the losses of a candidate on a subset, float64[items], measured now if they are not here yet."""
        known = self._known.get((key, subset))
        if known is not None:
            self.taken += 1
            return known
        found = self._known[key, subset] = np.asarray(measure(), np.float64)
        # repr of a float64 is read back to the same bits
        self._append(
            {
                "candidate": json.loads(key) if key.startswith("{") else key,
                "subset": subset,
                "sums": found.tolist(),
            }
        )
        return found

    def _read(self, of: dict[str, Any]) -> int:
        """Take in the whole lines, and return the number of bytes that they have."""
        if not self._file.is_file():
            return 0
        lines = self._file.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        rows = [json.loads(line) for line in lines]
        if rows and rows[0] != json.loads(json.dumps(of)):
            changed = sorted(
                key
                for key in rows[0].keys() | of.keys()
                if rows[0].get(key) != json.loads(json.dumps(of)).get(key)
            )
            raise UserError(
                f"{self._file} is of another search ({', '.join(changed)} differ); give it back its settings, or another directory with --out"
            )
        for row in rows[1:]:
            key = row["candidate"]
            text = key if isinstance(key, str) else json.dumps(key, sort_keys=True)
            self._known[text, row["subset"]] = np.asarray(row["sums"], np.float64)
        return sum(map(len, lines))

    def _append(self, row: dict[str, Any]) -> None:
        if self._out is not None:
            self._out.write(json.dumps(row, allow_nan=True) + "\n")
            self._out.flush()
