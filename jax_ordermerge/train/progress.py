"""Progress on a terminal as a bar, elsewhere as a plain line now and then. Process 0 only."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Protocol

import jax
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from jax_ordermerge import console
from jax_ordermerge.json_types import Json

_PAUSE = 10.0  # seconds between plain lines
# Metrics that are shown: label and number of digits. All others are in the log; a terminal has one
# line for all members.
_SHOWN = {
    "loss": ("loss", 4),
    "rewards/accuracies": ("accuracy", 2),
    "rewards/margins": ("margin", 2),
}


class Watcher(Protocol):
    """Receives what a training reports."""

    def log(self, text: str) -> None:
        """Take a message of one line."""

    def metrics(self, row: Json) -> None:
        """Take a row of the training log."""


class Display:
    """Shows the metrics of a training. Use it as a context manager.

    Example:
        >>> import sys
        >>> clock = iter([0.0, 1.0, 60.0]).__next__
        >>> row = {"loss": [2.0, 2.5], "tokens_per_second": 1234.0, "mfu": 0.41}
        >>> with Display(100, members=2, file=sys.stdout, clock=clock) as display:
        ...     for step in (10, 20):
        ...         display.metrics(row | {"step": step, "seconds": float(step)})
        step 10/100  loss 2.0000 2.5000  1,234 tok/s  MFU 41.0 %
        step 20/100  loss 2.0000 2.5000  1,234 tok/s  MFU 41.0 %  0:01:20 left
    """

    def __init__(
        self,
        steps: int,
        *,
        members: int,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._members, self._clock = steps, members, clock
        self._console = console.progress_console(file, is_first=jax.process_index() == 0)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = clock() - _PAUSE
        self._first: tuple[int, float] | None = None  # step and seconds of the first row

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            several = f"{self._members} members" if self._members > 1 else "1 member"
            columns = (
                TextColumn(f"train {several}, step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = console.make_bar(self._console, *columns)
            self._task = self._bar.add_task("train", total=self._steps, text="compiling")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def log(self, text: str) -> None:
        """Print a message."""
        self._console.print(text, markup=False)

    def metrics(self, row: Json) -> None:
        """Show a row of metrics."""
        parts = [
            f"{label} {' '.join(f'{value:.{digits}f}' for value in row[name])}"
            for name, (label, digits) in _SHOWN.items()
            if name in row
        ]
        parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
        if row.get("mfu") is not None:
            parts.append(f"MFU {100 * row['mfu']:.1f} %")
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], text=text)
            return
        # in a file of a batch system every row would be a line; the last one is always shown
        now = self._clock()
        if now - self._last_line >= _PAUSE or row["step"] >= self._steps:
            self._last_line = now
            self.log(f"step {row['step']}/{self._steps}  {text}{self._time_left(row)}")
        self._first = self._first or (row["step"], row["seconds"])

    def _time_left(self, row: Json) -> str:
        # Counted from the first row, which therefore shows none: seconds before it are of the
        # compilation, or of another machine where a training is resumed.
        if self._first is None:
            return ""
        first_step, first_seconds = self._first
        pace = (row["seconds"] - first_seconds) / max(row["step"] - first_step, 1)
        seconds = round(pace * (self._steps - row["step"]))
        return f"  {seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d} left"
