"""Progress on a terminal: members side by side; elsewhere a plain line now and then. Process 0 only."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PAUSE = 10.0  # seconds between plain lines


class Watcher(Protocol):
    """What the loop tells the world."""

    def log(self, text: str) -> None:
        """Take a message of one line."""

    def line(self, line: Mapping[str, Any]) -> None:
        """Take a line of `metrics/train.jsonl`."""


class Display:
    """Shows the lines of a training. Use it as a context manager.

    Example:
        >>> clock = iter([0.0, 1.0, 60.0]).__next__
        >>> with Display(100, (0, 1), file=sys.stdout, clock=clock) as display:
        ...     for step in (10, 20):
        ...         line = {
        ...             "step": step,
        ...             "loss": [2.0, 2.5],
        ...             "tokens_per_second": 1234.0,
        ...             "mfu": 0.41,
        ...             "seconds": float(step),
        ...         }
        ...         display.line(line)
        step 10/100  loss 2.0000 2.5000  1,234 tok/s  MFU 41.0 %  0:01:30 left
        step 20/100  loss 2.0000 2.5000  1,234 tok/s  MFU 41.0 %  0:01:20 left
    """

    def __init__(
        self,
        steps: int,
        members: tuple[int, ...],
        *,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._members, self._clock = steps, members, clock
        self._console = Console(
            file=file or sys.stderr, soft_wrap=True, highlight=False, quiet=jax.process_index() != 0
        )
        self._bar: Progress | None = None
        self._task: Any = None
        self._shown = clock() - _PAUSE
        self._first: tuple[int, float] | None = None

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

    def line(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics."""
        shown = {
            "loss": ("loss", 4),
            "rewards/accuracies": ("accuracy", 2),
            "rewards/margins": ("margin", 2),
        }
        parts = [
            f"{name} {_members(line[key], digits)}"
            for key, (name, digits) in shown.items()
            if key in line
        ]
        mfu = f"  MFU {100 * line['mfu']:.1f} %" if line.get("mfu") is not None else ""
        text = f"{'  '.join(parts)}  {line['tokens_per_second']:,.0f} tok/s{mfu}"
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], text=text)
            return
        now = self._clock()
        if now - self._shown < _PAUSE and line["step"] < self._steps:
            return
        self._shown = now
        self.log(f"step {line['step']}/{self._steps}  {text}  {self._left(line)} left")

    def _left(self, line: Mapping[str, Any]) -> str:
        # a resumed training counts from its first line, so that the pace is that of this machine
        start = self._first or (0, 0.0)
        pace = (line["seconds"] - start[1]) / max(line["step"] - start[0], 1)
        self._first = self._first or (line["step"], line["seconds"])
        seconds = round(pace * (self._steps - line["step"]))
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def _members(values: Sequence[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
