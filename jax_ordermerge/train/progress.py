"""Progress on a terminal as a bar, elsewhere as a plain line now and then. Process 0 only."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Protocol

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

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
        >>> clock = iter([0.0, 1.0, 60.0]).__next__
        >>> row = {"loss": [2.0, 2.5], "tokens_per_second": 1234.0, "mfu": 0.41}
        >>> with Display(100, file=sys.stdout, clock=clock) as display:
        ...     for step in (10, 20):
        ...         display.metrics(row | {"step": step, "seconds": float(step)})
        step 10/100  loss 2.0000 2.5000  1,234 tok/s  MFU 41.0 %  0:01:30 left
        step 20/100  loss 2.0000 2.5000  1,234 tok/s  MFU 41.0 %  0:01:20 left
    """

    def __init__(
        self,
        steps: int,
        *,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._clock = steps, clock
        # stderr, so that the output of a command can be piped
        self._console = Console(
            file=file or sys.stderr, soft_wrap=True, highlight=False, quiet=jax.process_index() != 0
        )
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = clock() - _PAUSE
        self._first: tuple[int, float] | None = None  # step and seconds of the first row

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
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
            self.log(f"step {row['step']}/{self._steps}  {text}  {self._time_left(row)} left")

    def _time_left(self, row: Json) -> str:
        # a resumed training counts from its first row: the pace of another machine says nothing
        first_step, first_seconds = self._first or (0, 0.0)
        pace = (row["seconds"] - first_seconds) / max(row["step"] - first_step, 1)
        self._first = self._first or (row["step"], row["seconds"])
        seconds = round(pace * (self._steps - row["step"]))
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
