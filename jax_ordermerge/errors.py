"""Errors that a user can correct: what was given, what was expected, what to do."""

import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final


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


def similar_path(path: Path) -> str:
    """Return `" (did you mean 'x'?)"` for the file or directory beside a missing one, else `""`.

    Example:
        >>> similar_path(Path("nowhere/train.csv"))
        ''
    """
    try:
        siblings = [item.name for item in path.parent.iterdir()]
    except OSError:  # no directory, or one that may not be read
        siblings = []
    nearest = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.7)
    return f" (did you mean '{path.parent / nearest[0]}'?)" if nearest else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 160 characters, or the name of its class.

    Example:
        >>> first_line(ValueError("no such table: x\\nhint: ..."))
        'no such table: x'
    """
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def is_utf8(text: str) -> bool:
    """Return whether a text can be written: names of files may hold bytes that are no text.

    Example:
        >>> is_utf8("é"), is_utf8(os.fsdecode(b"\\xe9"))
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Failures of files and disks that a user can mend -> what to do.
_CONTINUE: Final = "then give the same command again"
_REMEDIES: Final = {
    errno.ENOSPC: f"free some space, {_CONTINUE}",
    errno.EDQUOT: f"free some space, {_CONTINUE}",
    errno.EFBIG: f"raise the limit of the size of files, {_CONTINUE}",
    errno.EROFS: "give a place that can be written",
    errno.EACCES: "give a place that you may read and write",
    errno.EPERM: "give a place that you may read and write",
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "a part of the path may have 255 bytes; give a shorter one",
    errno.ELOOP: "remove the link",
    errno.EIO: f"check the disk, {_CONTINUE}",
    errno.ESTALE: f"mount the file system again, {_CONTINUE}",
}
_DISK_FULL: Final = re.compile(
    "|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
)


def file_error(error: BaseException) -> str | None:
    """Return one line about a failure of files that a user can mend, None where it is another one.

    Args:
        error: or one of its causes is the failure. Libraries that write files have errors of their
            own, whose text names a full disk.

    Example:
        >>> file_error(OSError(errno.ENOSPC, "No space left on device", "/runs/a/train.jsonl"))
        '/runs/a/train.jsonl: No space left on device; free some space, then give the same command
        again'
        >>> file_error(ValueError("unexpected")) is None
        True
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if number is None and (match := _DISK_FULL.search(str(seen))):
            return f"{match[0]} ({first_line(seen)}); free some space, {_CONTINUE}"
        if number in _REMEDIES:
            assert isinstance(seen, OSError)
            names = [str(name) for name in (seen.filename, seen.filename2) if name is not None]
            place = f"{' -> '.join(names)}: " if names else ""
            return f"{place}{os.strerror(number)}; {_REMEDIES[number]}"
        seen = seen.__cause__ or seen.__context__
    return None
