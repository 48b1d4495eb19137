"""Where a run writes: free bytes, one directory seen by all processes, and its speed."""

import contextlib
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

from jax_ordermerge import processes, user_cache
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.checkpoint.orbax import save_timeout
from jax_ordermerge.commands.doctor.finding import Finding
from jax_ordermerge.commands.doctor.inputs import Needs
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError

# enough for the checkpoints of a small model, where no plan says how much a run needs
_MIN_DISK_BYTES = 10 * 2**30
# Bytes that each process writes to measure the speed, at most, and how many files at once: Orbax
# writes many, and one stream does not fill a network share.
_WRITTEN_BYTES: Final = 256 * 2**20
_STREAMS: Final = 4
_BLOCK: Final = 2**20
_SHOW_UP: Final = 30.0  # seconds for files of another machine: network file systems cache listings


def check_storage(config: Config, needs: Needs | None) -> Iterator[Finding]:
    """Check the output of a run in all processes of it. All of them call it.

    Args:
        config: of the run.
        needs: of its plan; None checks without sizes.
    """
    with processes.barrier("check the output"):
        disk_bytes = needs.disk_bytes if needs else None
        findings = check_output(config.location, disk_bytes, config.location)
    yield from findings
    writable = not any(f.verdict == "error" and f.subject in ("output", "copy") for f in findings)
    is_bucket = remote.address(config.location) is not None
    parent = _nearest_parent(str(user_cache.directory()) if is_bucket else config.location)
    # processes that cannot write take part all the same: the others wait for them
    yield from check_shared(parent if writable else None)
    # a process that could not read the base has no sizes, and the others would wait for it
    planned = processes.on_all(needs is not None)
    if needs is None or not planned:
        return
    size = max(min(_WRITTEN_BYTES, needs.save_bytes // _process_count()), _BLOCK)
    speed = measure_speed(parent if writable else None, size)
    if speed is not None:
        yield judge_saves(speed, needs.save_bytes, needs.interval, needs.bandwidth)
    if is_bucket and writable and _is_first():
        yield _check_upload(config.location, size)


def check_output(output: str, needed: int | None = None, run: str | None = None) -> list[Finding]:
    """Write, rename, read and remove a file where the run directory is going to be.

    Args:
        output: a path, or an address such as gs://bucket/runs/one.
        needed: bytes that the run writes; None if they are not known.
        run: run directory, whose files count as free: they are part of what is needed.

    Example:
        >>> [finding.subject for finding in check_output(tempfile.mkdtemp())]
        ['disk', 'output']
    """
    if "://" in output:
        # a run in a bucket works on a local copy, so both places must be writable
        # an address that is refused, below, has no copy
        is_valid = output.startswith(("gs://", "s3://"))
        local = str(remote.Mirror(output).local) if is_valid else None
        disk, copy = check_output(str(user_cache.directory()), needed, local)
        return [disk, copy._replace(subject="copy"), _check_bucket(output)]
    # nothing is created: the run directory is checked at its nearest existing parent
    parent = _nearest_parent(output)
    free = shutil.disk_usage(parent).free + (_written_bytes(Path(run)) if run else 0)
    disk = judge_disk(free, needed, str(parent))
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".doctor-") as scratch:
            # what every writer does: some network file systems allow all of it but the rename
            path = Path(scratch) / "written"
            path.write_bytes(b"complete")
            content = path.rename(path.with_name("renamed")).read_bytes()
    except OSError as error:
        detail = (
            f"{output} cannot be written: {error.strerror};"
            " choose another with --set output=DIRECTORY"
        )
        return [disk, Finding("output", "error", detail)]
    if content != b"complete":
        return [disk, Finding("output", "error", f"a file at {parent} was read back changed")]
    return [disk, Finding("output", "ok", f"{output} can be written")]


def judge_disk(free: int, needed: int | None, place: str) -> Finding:
    """Return the finding about the free bytes of a disk.

    Args:
        free: bytes.
        needed: bytes that the run writes; None if they are not known.
        place: directory.

    Example:
        >>> judge_disk(67 * 2**30, 10**12, "/data").detail
        'only 67 GiB free at /data, the run writes 931: free some space or choose another output'
        >>> judge_disk(67 * 2**30, None, "/data").verdict
        'ok'
    """
    size = f"{free / 2**30:.0f} GiB free at {place}"
    if needed is None:
        if free >= _MIN_DISK_BYTES:
            return Finding("disk", "ok", size)
        return Finding("disk", "error", f"only {size}; free some space")
    amount = f"{needed / 2**30:.{0 if needed > 2**33 else 3}f}"
    if free >= needed:
        return Finding("disk", "ok", f"{size}, the run writes {amount}")
    detail = f"only {size}, the run writes {amount}: free some space or choose another output"
    return Finding("disk", "error", detail)


def _nearest_parent(output: str) -> Path:
    parent = Path(output).absolute()
    while not parent.exists():
        parent = parent.parent
    return parent


def _written_bytes(run: Path) -> int:
    size = 0
    for directory, _, names in os.walk(run):
        for name in names:
            # another process may remove its file meanwhile
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(directory, name)).st_size
    return size


def _check_bucket(output: str) -> Finding:
    try:
        url = remote.address(output)
        assert url is not None
        remote.check_writable(url)
    except UserError as error:
        return Finding("output", "error", str(error))
    return Finding("output", "ok", f"{url} can be written")


# ------------------------------------------------------------------------------ several processes


def _process_count() -> int:
    import jax

    return jax.process_count()


def _is_first() -> bool:
    import jax

    return jax.process_index() == 0


def _gather(value: float) -> np.ndarray:
    """Return the values of all processes. It is a barrier, too."""
    from jax.experimental import multihost_utils

    if _process_count() == 1:
        return np.array([value], np.float32)
    return np.asarray(multihost_utils.process_allgather(np.float32(value)))


def check_shared(directory: Path | None) -> Iterator[Finding]:
    """Let each process write a token to one directory, and all of them read all tokens.

    One process has nobody to share with.

    Args:
        directory: that exists; None on a process that cannot write.
    """
    import jax

    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return
    # below 2^24, which float32 holds exactly
    tokens = [str(int(token)) for token in _gather(secrets.randbelow(2**24))]
    scratch = None if directory is None else directory / f".doctor-{'-'.join(tokens[:2])}"
    if scratch is not None:
        with contextlib.suppress(OSError):  # the token that is absent then tells it
            scratch.mkdir(exist_ok=True)
            (scratch / str(index)).write_text(tokens[index])
    _gather(0)  # all have written
    unseen = list(range(count))
    deadline = time.monotonic() + _SHOW_UP
    while scratch is not None:
        unseen = unread_tokens(scratch, tokens)
        if not unseen or time.monotonic() >= deadline:
            break
        time.sleep(0.5)
    failed = _gather(len(unseen))  # all have read
    if scratch is not None:
        with contextlib.suppress(OSError):
            (scratch / str(index)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the last one removes it
            scratch.rmdir()
    if directory is None:
        return  # that it cannot write is a finding of its own
    if unseen:
        numbers = ", ".join(map(str, unseen))
        detail = (
            f"process {index} does not see what processes {numbers} write to {directory}; all"
            " must mount one file system there (for an output in a bucket: ORDERMERGE_CACHE)"
        )
        yield Finding("shared output", "error", detail)
    elif failed.any():
        detail = f"process {int(failed.argmax())} does not see what others write to {directory}"
        yield Finding("shared output", "error", detail)
    else:
        yield Finding("shared output", "ok", f"all {count} processes see one {directory}")


def unread_tokens(directory: Path, tokens: Sequence[str]) -> list[int]:
    """Return the processes whose token is not in its file in a directory.

    Example:
        >>> directory = Path(tempfile.mkdtemp())
        >>> _ = (directory / "0").write_text("17"), (directory / "1").write_text("5")
        >>> unread_tokens(directory, ["17", "6", "8"])
        [1, 2]
    """
    unread = []
    for process, token in enumerate(tokens):
        try:
            content = (directory / str(process)).read_text()
        except OSError:
            content = None
        if content != token:
            unread.append(process)
    return unread


# ------------------------------------------------------------------------------------------ speed


def measure_speed(directory: Path | None, size: int) -> float | None:
    """Return the bytes/s of all processes together; None where one of them cannot write.

    All processes call it and write at the same time, as for a checkpoint.

    Args:
        directory: that exists; None on a process that cannot write.
        size: bytes that this process writes.

    Example:
        >>> measure_speed(Path(tempfile.mkdtemp()), 2**20) > 0
        True
    """
    _gather(0)
    seconds = math.nan
    if directory is not None:
        # a disk that fills up is found by its free bytes
        with contextlib.suppress(OSError):
            seconds = _write(directory, size)
    # the slowest counts: a checkpoint is complete when all parts of it are
    seconds = float(_gather(seconds).max())
    return None if math.isnan(seconds) else size * _process_count() / seconds


def _write(directory: Path, size: int) -> float:
    """Return the seconds to write `size` bytes to the storage itself, past the page cache."""
    block = os.urandom(_BLOCK)  # file systems that compress would make nothing of zeros
    blocks = -(-size // _BLOCK)

    def write(path: Path, count: int) -> None:
        with path.open("wb") as file:
            for _ in range(count):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    with tempfile.TemporaryDirectory(dir=directory, prefix=".doctor-") as scratch:
        paths = [Path(scratch) / str(number) for number in range(_STREAMS)]
        counts = [len(range(number, blocks, _STREAMS)) for number in range(_STREAMS)]
        start = time.monotonic()
        with ThreadPoolExecutor(_STREAMS) as pool:
            list(pool.map(write, paths, counts))
        return time.monotonic() - start


def _check_upload(output: str, size: int) -> Finding:
    """Return the speed to a bucket. A run copies to it from process 0 only."""
    url = remote.address(output)
    assert url is not None
    try:
        seconds = remote.measure_upload(url, size)
    except UserError as error:
        return Finding("upload", "error", str(error))
    return Finding("upload", "ok", f"{size / seconds / 1e6:,.0f} MB/s to {url}")


def judge_saves(speed: float, size: int, interval: float | None, bandwidth: float) -> Finding:
    """Return the finding about the time that a checkpoint takes.

    Args:
        speed: bytes/s measured, of all processes together.
        size: bytes of a checkpoint.
        interval: seconds of training between two; None if they are not known.
        bandwidth: bytes/s that `training.checkpoint_bandwidth` states.

    Example:
        >>> judge_saves(185e6, 324 * 10**9, 600.0, 200e6)
        Finding(subject='saves', verdict='note', detail='a checkpoint of 324.0 GB takes 1,751 s at
        the 185 MB/s measured, but 600 s lie between two, so that training waits; save less often
        (training.checkpoint_every, training.checkpoint_minutes) or on faster storage')
        >>> judge_saves(10e6, 324 * 10**9, None, 200e6).verdict
        'error'
    """
    seconds, timeout = size / speed, save_timeout(size, bandwidth)
    detail = (
        f"a checkpoint of {size / 1e9:,.{1 if size > 10**9 else 3}f} GB takes {seconds:,.0f} s at"
        f" the {speed / 1e6:,.0f} MB/s measured"
    )
    if seconds > timeout:
        detail += (
            f", longer than the {timeout:,} s after which a save has failed; state the speed with"
            f" --set training.checkpoint_bandwidth={max(int(speed / 1e6), 1)}, or take faster"
            " storage"
        )
        return Finding("saves", "error", detail)
    if interval is not None and seconds > interval:
        detail += (
            f", but {interval:,.0f} s lie between two, so that training waits; save less often"
            " (training.checkpoint_every, training.checkpoint_minutes) or on faster storage"
        )
        return Finding("saves", "note", detail)
    return Finding("saves", "ok", detail)
