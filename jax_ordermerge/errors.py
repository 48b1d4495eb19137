"""Errors a user can mend: what was given, what was expected, what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints the message as one line and exits with code 2.

    Example:
        >>> raise UserError("data file x.json not found; give an existing path in data.train")
        Traceback (most recent call last):
            ...
        jax_ordermerge.errors.UserError: data file x.json not found; give an existing path in data.train
    """


class Stopped(Exception):
    """A training was asked to stop and saved a checkpoint; the same command continues. The command line exits with `code`.

    Example:
        >>> Stopped("stopped by SIGTERM after step 7 of 9", 143).code
        143
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class PeerLost(Exception):
    """Another process is not there, or no longer. The command line exits with code 1; starting all of them again continues."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest known name, or `" (known: ...)"` when none is near.

    Example:
        >>> did_you_mean("avrage", ["average", "ties"])
        " (did you mean 'average'?)"
        >>> did_you_mean("zzz", ["average", "ties"])
        ' (known: average, ties)'
    """
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else f" (known: {', '.join(known)})"
