"""What a command prints: its result, messages beside it, and progress bars on a terminal.

A result goes to stdout and is always printed. Messages and notes say what happens on the way:
`--quiet` leaves them out, as it does progress. With `--json` stdout is JSON alone.
"""

import json
import os
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


# Bars of other libraries, read when they are imported.
_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


class _Settings:
    # of the process, as its stdout is: messages come from every layer
    quiet = False
    as_json = False
    has_bar = False  # before version 14.1 rich refuses a second bar below another one


def set_quiet(quiet: bool) -> None:
    """Print results and errors alone from now on: no messages, no progress."""
    _Settings.quiet = quiet
    # the bar of a download is progress, too, and in a log it is one line per refresh
    if quiet or not sys.stderr.isatty():
        for variable in _BARS:
            os.environ.setdefault(variable, "1")


def set_json(as_json: bool) -> None:
    """Keep stdout for JSON from now on: messages go to stderr."""
    _Settings.as_json = as_json


def is_quiet() -> bool:
    """Return whether results and errors alone are printed."""
    return _Settings.quiet


def to_json(value: object) -> str:
    """Return a result as the JSON that `--json` prints.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has not.

    Example:
        >>> to_json({"loss": 0.5})
        '{\\n "loss": 0.5\\n}\\n'
    """
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def print_result(text: str, end: str = "\n") -> None:
    """Print what a command was asked for."""
    # at once: results of a run of hours lie in a pipe or a log
    print(text, end=end, flush=True)


def print_json(value: object) -> None:
    """Print what a command was asked for as JSON."""
    print_result(to_json(value), end="")


def print_message(text: str) -> None:
    """Print what a command does, unless quiet: on stdout, beside JSON on stderr."""
    if not is_quiet():
        print(text, file=sys.stderr if _Settings.as_json else sys.stdout, flush=True)


def print_note(text: str) -> None:
    """Print a message on stderr, unless quiet: where stdout is a result that is read alone."""
    if not is_quiet():
        print(text, file=sys.stderr, flush=True)


def print_error(text: str) -> None:
    """Print on stderr why a command fails; also where it is quiet."""
    print(text, file=sys.stderr, flush=True)


def progress_console(file: IO[str] | None = None, *, is_first: bool = True) -> Console:
    """Return the console of progress: stderr, so that the output of a command can be piped.

    Args:
        file: in place of stderr.
        is_first: whether this process is the one that prints.
    """
    quiet = is_quiet() or not is_first
    return Console(file=file or sys.stderr, soft_wrap=True, highlight=False, quiet=quiet)


def make_bar(console: Console, *columns: ProgressColumn, transient: bool = False) -> Progress:
    """Return a bar for a terminal; messages that are printed beside it go above it.

    What goes to stdout stays there where stdout is a file or a pipe.

    Args:
        console: see `progress_console`.
        columns: of the bar.
        transient: remove the bar when it is done.
    """
    return Progress(
        *columns, console=console, redirect_stdout=sys.stdout.isatty(), transient=transient
    )


def track(
    items: Iterable[T],
    total: int,
    stage: str,
    noun: str,
    *,
    transient: bool = False,
    file: IO[str] | None = None,
) -> Iterator[T]:
    """Yield items, and show on a terminal how many are done and the time left.

    Elsewhere nothing is shown: a stage logs a line for each item by itself. Nor inside of another
    bar, as of a search that is one of the merges of a run.

    Args:
        items: what is worked on.
        total: how many they are.
        stage: of the run, e.g. `"evaluate"`.
        noun: what an item is, in the plural, e.g. `"models"`.
        transient: remove the bar when it is done.
        file: in place of stderr.

    Example:
        >>> import io
        >>> list(track("ab", 2, "evaluate", "models", file=io.StringIO()))
        ['a', 'b']
    """
    console = progress_console(file)
    if not console.is_terminal or console.quiet or _Settings.has_bar or total < 2:
        yield from items
        return
    columns = (
        TextColumn(stage),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(noun),
        TimeRemainingColumn(),
    )
    with make_bar(console, *columns, transient=transient) as bar:
        task = bar.add_task(stage, total=total)
        _Settings.has_bar = True
        try:
            for item in items:
                yield item
                bar.advance(task)
        finally:
            _Settings.has_bar = False
