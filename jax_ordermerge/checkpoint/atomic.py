"""Files and directories that appear under their name only when they are complete and on the disk.

A rename within a file system is atomic, so everything is written beside its name and renamed. A
killed process leaves the old content or the new one, never a part.
"""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jax_ordermerge.errors import UserError, file_error, is_utf8

_FINGERPRINT = "fingerprint"  # file that says which work a partial directory holds


def check_vacant(target: str | Path) -> None:
    """Refuse a target whose content would be lost, or that cannot be written.

    Raises:
        UserError: the target is a file, lies below one, ends in `..`, has too long a name, or is a
            directory that is not empty; or the directory above may not be written.
    """
    path = Path(target)
    # it is written beside its name, and `..` is no name to write beside
    if path.name == "..":
        raise UserError(f"{target} ends in ..; give the directory by its name")
    # the longest name beside it
    with _writable(target), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        scratch_path(path).lstat()
    for parent in path.parents:
        if parent.is_file():
            raise UserError(f"{target} lies below {parent}, which is a file; give a new directory")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{target} is not empty; give a new directory, or remove it")
    if path.exists() and not path.is_dir():
        raise UserError(f"{target} is a file; give a new directory")
    check_writable(path.absolute().parent)


def check_writable(target: str | Path, *, is_file: bool = False) -> None:
    """Refuse a path that cannot be written, before the work whose result it is to hold.

    Nothing is created. A disk may still become full.

    Args:
        target: directory, which need not exist or be empty.
        is_file: whether it is a file.

    Raises:
        UserError: it is of the other kind, a part of it is a file or too long, or it or the nearest
            directory that exists may not be written.

    Example:
        >>> check_writable("/proc/version/results")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: /proc/version/results cannot be written: /proc/version is
            a file; give another path
    """
    path = Path(target).absolute()
    if not is_utf8(str(path)):
        raise UserError(f"{str(target)!r} is not UTF-8; give another path")
    # the nearest part of the path that exists decides: what is below it will be created
    for place in (path, *path.parents):
        try:
            is_directory = stat.S_ISDIR(place.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{target} cannot be written: {file_error(error)}") from error
        if is_directory and is_file and place == path:
            raise UserError(f"{target} is a directory; give a file")
        if not is_directory and not (is_file and place == path):
            raise UserError(f"{target} cannot be written: {place} is a file; give another path")
        # of a file that is replaced, its directory must be writable
        directory = place if is_directory else place.parent
        if not os.access(directory, os.W_OK | os.X_OK):
            raise UserError(
                f"{target} cannot be written: {directory} may not be written; give another path"
            )
        return


@contextlib.contextmanager
def new_directory(target: str | Path, number: int | None = None) -> Iterator[Path]:
    """Yield a directory beside the target and rename it when the block ends.

    After an error it is removed. So is what an earlier, killed write of the target left. Modes
    follow the umask.

    Args:
        target: final name; it must not exist or be empty.
        number: below 2^32, of `scratch_path`; by default drawn at random.

    Raises:
        UserError: the target is not empty, or cannot be created.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "out"
        >>> with new_directory(target) as partial:
        ...     write_text(partial / "a.txt", "a")
        >>> [p.name for p in target.parent.iterdir()], (target / "a.txt").read_text()
        (['out'], 'a')
    """
    path = Path(target).absolute()
    check_vacant(path)
    partial = scratch_path(path, number)
    with _writable(target):
        path.parent.mkdir(parents=True, exist_ok=True)
        # a killed process could not remove its directory; the random suffix tells them from others
        for abandoned in path.parent.glob(f"{glob.escape(path.name)}.partial-" + "[0-9a-f]" * 8):
            shutil.rmtree(abandoned)
        partial.mkdir()
    try:
        yield partial
        _rename(partial, path)
    # also on KeyboardInterrupt: a new call starts from nothing anyway
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def resumable_directory(target: str | Path, fingerprint: str) -> Iterator[tuple[Path, bool]]:
    """Yield `(directory, resumed)`: a directory beside the target, renamed when the block ends.

    If the block is cut off, the directory stays, and the next call with the same fingerprint yields
    it again. With another fingerprint it is emptied. After a `UserError` it is removed: the same
    call would fail again.

    Args:
        target: final name; it must not exist or be empty.
        fingerprint: text that is equal exactly if earlier work can be continued.

    Raises:
        UserError: the target is not empty, cannot be created, or is being written by another
            process.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "out"
        >>> for fail in (True, False):
        ...     with (
        ...         contextlib.suppress(KeyboardInterrupt),
        ...         resumable_directory(target, "a") as (partial, resumed),
        ...     ):
        ...         write_text(partial / "a.txt", "a")
        ...         print(resumed)
        ...         if fail:
        ...             raise KeyboardInterrupt
        False
        True
    """
    path = Path(target).absolute()
    check_vacant(path)
    partial = partial_path(target)
    mark = partial / _FINGERPRINT
    with contextlib.ExitStack() as stack:
        with _writable(target):
            partial.mkdir(parents=True, exist_ok=True)
            # the lock comes first: another process may be at work in this directory
            stack.enter_context(_lock(partial))
            resumed = mark.is_file() and mark.read_text() == fingerprint
            # work of another recipe or other inputs must not mix with this one
            if not resumed:
                for old in partial.iterdir():
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
                write_text(mark, fingerprint)
        try:
            yield partial, resumed
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # the fingerprint is bookkeeping and no part of the result
        mark.unlink()
        _rename(partial, path)


def scratch_path(path: Path, number: int | None = None) -> Path:
    """Return where one call of `new_directory` works: a name of its own, never resumed.

    Example:
        >>> scratch_path(Path("out"), 255).name
        'out.partial-000000ff'
    """
    number = secrets.randbits(32) if number is None else number
    return path.parent / f"{path.name}.partial-{number:08x}"


def partial_path(target: str | Path) -> Path:
    """Return where `resumable_directory` keeps unfinished work for a target."""
    path = Path(target).absolute()
    return path.parent / f"{path.name}.partial"


@contextlib.contextmanager
def _writable(target: str | Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        raise UserError(
            f"{target} is being written by another process; wait for it, or give another directory"
        ) from error
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror}); give a directory you may write to"
        ) from error


def _rename(partial: Path, path: Path) -> None:
    # the entries first: a renamed directory must not lack one after a loss of power
    sync_directory(partial)
    partial.rename(path)
    sync_directory(path.parent)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. The system releases it with the process, however that ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        # refused and not waited for: the other process may take hours
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def replace(path: Path, content: bytes) -> None:
    """Write a file beside its name and rename it, so that no reader sees a part of it.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "new" / "a.txt"
        >>> replace(file, b"content")
        >>> file.read_text(), len(list(file.parent.iterdir()))
        ('content', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # hidden, so that no glob takes it for a file of its kind
    partial = path.with_name(f".{path.name}.partial")
    with _named(path):
        # no fsync: this protects from killed processes, not from a loss of power, and is called
        # often
        partial.write_bytes(content)
        os.replace(partial, path)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in errors: those of a full disk come without a name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through to the disk, for use inside `new_directory`: it is not atomic itself."""
    with _named(path), path.open("wb") as file:
        file.write(content)
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Flush an open file through to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory through to the disk."""
    # POSIX: fsync of a file does not write its entry in the directory
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
