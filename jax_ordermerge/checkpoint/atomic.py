"""Files and directories that appear under their name only when they are whole and on the disk."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jax_ordermerge.errors import UserError


def check_vacant(target: str | Path) -> None:
    """Refuse a target that something would be lost in.

    Raises:
        UserError: the target is a file or a directory that is not empty.
    """
    path = Path(target)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{target} is not empty; give a new directory, or remove it")
    if path.exists() and not path.is_dir():
        raise UserError(f"{target} is a file; give a new directory")


@contextlib.contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """Yield a directory beside the target and rename it when the block ends; after an error nothing is left.

    What an earlier, killed write of the same target left beside it is removed. Modes follow the umask.

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
    partial = path.parent / f"{path.name}.partial-{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{path.name}.partial-" + "[0-9a-f]" * 8):
            shutil.rmtree(left)
        partial.mkdir()
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror}); give a directory you may write to"
        ) from error
    try:
        yield partial
        sync_directory(partial)
        partial.rename(path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def resumable_directory(target: str | Path, fingerprint: str) -> Iterator[tuple[Path, bool]]:
    """Yield `(directory, resumed)`: a directory beside the target, renamed when the block ends, and kept when it is cut off.

    What an earlier call with the same fingerprint left is handed back; of another fingerprint it is removed, as it is after a
    `UserError`. A directory in use by another process is refused.

    Args:
        target: the final name; it must not exist or be empty.
        fingerprint: text that is equal exactly where the earlier work may be gone on with.

    Raises:
        UserError: the target is not empty, cannot be created, or is being written by another process.

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
    partial, mark = partial_of(target), "fingerprint"
    with contextlib.ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(partial))
            same = (partial / mark).is_file() and (partial / mark).read_text() == fingerprint
            if not same:
                for left in partial.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                write_text(partial / mark, fingerprint)
        except BlockingIOError as error:
            raise UserError(
                f"{target} is being written by another process; wait for it, or give another directory"
            ) from error
        except OSError as error:
            raise UserError(
                f"{target} cannot be written ({error.strerror}); give a directory you may write to"
            ) from error
        try:
            yield partial, same
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / mark).unlink()
        sync_directory(partial)
        partial.rename(path)
        sync_directory(path.parent)


def partial_of(target: str | Path) -> Path:
    """Return where `resumable_directory` keeps what is not whole yet."""
    path = Path(target).absolute()
    return path.parent / f"{path.name}.partial"


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, which ends with the process, however it ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def replace(path: Path, content: bytes) -> None:
    """Write a file beside its name and rename it when whole, so that a reader never meets half of it.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "new" / "a.txt"
        >>> replace(file, b"whole")
        >>> file.read_text(), len(list(file.parent.iterdir()))
        ('whole', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(content)
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file through to the disk. Meant for inside `new_directory`: it is not atomic by itself."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        sync(file)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through to the disk. Meant for inside `new_directory`: it is not atomic by itself."""
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def sync(file: IO[Any]) -> None:
    """Flush an open file through to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
