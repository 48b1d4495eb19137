"""Paths for libraries that read `#`, `?`, `%` or brackets as parts of a URL or pattern."""

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import jax

from jax_ordermerge.errors import UserError

# Orbax writes a checkpoint in `run#1` to `run`, and does not find one in `run?` or `run[1]`.
# Tensorstore reads `run\\1` as `run/1`.
RESERVED: Final = "#?%[]\\|*"


def plain_path(directory: str | Path) -> Path:
    """Return a path of a directory without reserved characters: itself, or a link to it.

    Args:
        directory: need not exist. The link is valid until this process ends.

    Raises:
        UserError: there is no such path.

    Example:
        >>> directory = Path(tempfile.mkdtemp()) / "run #1"
        >>> directory.mkdir()
        >>> plain_path(directory).samefile(directory), "#" in str(plain_path(directory))
        (True, False)
    """
    path = Path(directory).absolute()
    if not reserved_character(path):
        return path
    # Orbax names its barriers by paths, and each process would have a link of its own
    if jax.process_count() > 1 or reserved_character(tempfile.gettempdir()):
        check_path(path)
    link = _links() / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    if not link.is_symlink():
        link.symlink_to(path, target_is_directory=True)
    return link


@functools.cache
def _links() -> Path:
    """Make a directory of links, which goes with this process."""
    directory = tempfile.mkdtemp(prefix="ordermerge-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def reserved_character(path: str | Path) -> str | None:
    """Return the first reserved character of a path, None where it has none."""
    return next((character for character in str(path) if character in RESERVED), None)


def check_path(directory: str | Path) -> None:
    """Refuse a path with a reserved character, for several processes.

    Raises:
        UserError: the path has one.

    Example:
        >>> check_path("run 1"), check_path("run+1")
        (None, None)
        >>> check_path("run#1")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: the path ...run#1 has the character #, ...
    """
    path = Path(directory).absolute()
    if character := reserved_character(path):
        raise UserError(
            f"the path {path} has the character {character}, which checkpoints of several"
            " processes cannot have; give another directory, or rename it"
        )
