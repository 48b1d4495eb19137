"""A file of measured losses: a search that continues reads them instead of measuring again."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jax_ordermerge import processes
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json


class LossCache:
    """Losses of candidates on subsets, one line of JSON per measurement.

    A line that was cut off at the end of the file is dropped, and its losses are measured again.

    Args:
        file: path of the file.
        settings: everything that decides the losses, as JSON. It is the first line of the file.

    Raises:
        UserError: the file belongs to a search with other settings.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "losses.jsonl"
        >>> with LossCache(file, {"seed": 0}) as cache:
        ...     cache.get_or_measure("a", 0, lambda: np.array([1.5, 2.0])).tolist()
        [1.5, 2.0]
        >>> with LossCache(file, {"seed": 0}) as cache:
        ...     cache.get_or_measure("a", 0, lambda: 1 / 0).tolist(), cache.hits
        ([1.5, 2.0], 1)
    """

    def __init__(self, file: Path, settings: Json) -> None:
        self._file, self._losses, self.hits = file, dict[tuple[str, int], np.ndarray](), 0
        # A round trip through JSON: tuples become lists, as in the file.
        header = json.loads(json.dumps(settings))
        complete = self._read(header)
        # All processes have to skip the same measurements, else their collectives do not match.
        processes.check_alike({"search cache": len(self._losses)})
        if jax.process_index() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Cut off half a line, else the next one would be appended to it.
            with file.open("a") as out:
                out.truncate(complete)
        self._out = file.open("a") if jax.process_index() == 0 else None
        if not complete:
            self._append(header)

    def __enter__(self) -> "LossCache":
        return self

    def __exit__(self, *_: object) -> None:
        if self._out is not None:
            self._out.close()

    def get_or_measure(
        self, key: str, subset: int, measure: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """Return the losses of a candidate on a subset, float64[..., items]; measure new ones."""
        losses = self._losses.get((key, subset))
        if losses is not None:
            self.hits += 1
            return losses
        losses = self._losses[key, subset] = np.asarray(measure(), np.float64)
        candidate = json.loads(key) if key.startswith("{") else key
        # JSON holds the repr of a float64, which is read back to the same bits.
        self._append({"candidate": candidate, "subset": subset, "sums": losses.tolist()})
        return losses

    def _read(self, header: Json) -> int:
        """Read the complete lines and return the number of their bytes."""
        if not self._file.is_file():
            return 0
        lines = self._file.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        rows = [json.loads(line) for line in lines]
        if rows and rows[0] != header:
            keys = rows[0].keys() | header.keys()
            changed = sorted(key for key in keys if rows[0].get(key) != header.get(key))
            raise UserError(
                f"{self._file} is of another search ({', '.join(changed)} differ); "
                "give it back its settings, or another directory with --out"
            )
        for row in rows[1:]:
            key = row["candidate"]
            text = key if isinstance(key, str) else json.dumps(key, sort_keys=True)
            self._losses[text, row["subset"]] = np.asarray(row["sums"], np.float64)
        return sum(map(len, lines))

    def _append(self, row: Json) -> None:
        if self._out is not None:
            self._out.write(json.dumps(row, allow_nan=True) + "\n")
            # At once: a measurement may take minutes, and the process may be killed.
            self._out.flush()
