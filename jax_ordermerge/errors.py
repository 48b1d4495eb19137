"""Errors that a user can correct: what was given, what was expected, what to do."""

import difflib
from collections.abc import Iterable


# A ValueError, so that pydantic catches it in a validator and adds the key of the config.
class UserError(ValueError):
    """Bad input. The command line prints the message as one line and exits with code 2.

    Example:
        >>> raise UserError("data file x.json not found; give an existing path in data.train")
        Traceback (most recent call last):
            ...
        jax_ordermerge.errors.UserError: data file x.json not found; give an existing path in
        data.train
    """


class Stopped(Exception):
    """A training was asked to stop, and saved a checkpoint. The same command continues it.

    The command line exits with `code`.

    Example:
        >>> Stopped("stopped by SIGTERM after step 7 of 9", 143).code
        143
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


# No UserError: the input is right, and starting again is the remedy.
class PeerLost(Exception):
    """Another process could not be reached, or was lost. The command line exits with code 1.

    Starting all processes again continues at the last checkpoint.
    """


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest of `names`, else `" (known: ...)"`.

    Example:
        >>> did_you_mean("avrage", ["average", "ties"])
        " (did you mean 'average'?)"
        >>> did_you_mean("zzz", ["average", "ties"])
        ' (known: average, ties)'
        >>> did_you_mean("lr", ["epochs", "learning_rate"])
        " (did you mean 'learning_rate'?)"
    """
    names = list(names)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    # abbreviations that other trainers use: lr, wd, bs
    initials = [x for x in names if "".join(part[:1] for part in x.split("_")) == name]
    nearest = initials if len(initials) == 1 else nearest
    return f" (did you mean '{nearest[0]}'?)" if nearest else f" (known: {', '.join(names)})"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most 160 characters, or the name of its class.

    Example:
        >>> first_line(ValueError("no such table: x\\nhint: ..."))
        'no such table: x'
    """
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
