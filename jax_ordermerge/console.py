"""What a person at a terminal sees: progress bars, and whether anything but results is wanted."""

import sys
from collections.abc import Iterable, Iterator
from typing import IO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


class _Settings:
    # of the process, as its stdout is: messages come from every layer
    quiet = False


def set_quiet(quiet: bool) -> None:
    """Print results and errors alone from now on: no messages, no progress."""
    _Settings.quiet = quiet


def is_quiet() -> bool:
    """Return whether results and errors alone are printed."""
    return _Settings.quiet


def progress_console(file: IO[str] | None = None, *, is_first: bool = True) -> Console:
    """Return the console of progress: stderr, so that the output of a command can be piped.

    Args:
        file: in place of stderr.
        is_first: whether this process is the one that prints.
    """
    quiet = is_quiet() or not is_first
    return Console(file=file or sys.stderr, soft_wrap=True, highlight=False, quiet=quiet)


def make_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """Return a bar for a terminal; messages that are printed beside it go above it.

    What goes to stdout stays there where stdout is a file or a pipe.
    """
    return Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())


def track(
    items: Iterable[T], total: int, stage: str, noun: str, *, file: IO[str] | None = None
) -> Iterator[T]:
    """Yield items, and show on a terminal how many are done and the time left.

    Elsewhere nothing is shown: a stage logs a line for each item by itself.

    Args:
        items: what is worked on.
        total: how many they are.
        stage: of the run, e.g. `"evaluate"`.
        noun: what an item is, in the plural, e.g. `"models"`.
        file: in place of stderr.

    Example:
        >>> import io
        >>> list(track("ab", 2, "evaluate", "models", file=io.StringIO()))
        ['a', 'b']
    """
    console = progress_console(file)
    if not console.is_terminal or console.quiet or total < 2:
        yield from items
        return
    columns = (
        TextColumn(stage),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(noun),
        TimeRemainingColumn(),
    )
    with make_bar(console, *columns) as bar:
        task = bar.add_task(stage, total=total)
        for item in items:
            yield item
            bar.advance(task)
