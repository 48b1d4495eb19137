"""The lock of a run directory: one run at a time writes it, of one process or of several.

The holder writes a file with its name and counts heartbeats in it. On the same machine a lock is
stale when the process has ended. From another machine nothing but the heartbeats tells a dead
process from a silent one, so there a run waits for the next one before it takes a lock over.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import jax

from jax_ordermerge import console, processes
from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.context import Log
from jax_ordermerge.layout import RunLayout

# Not `flock`: over NFS it is local to a machine or absent on some mounts, and on others outlives a
# lost client. A file that is created exclusively and compared works on all of them.
BEAT = 10.0  # seconds from one heartbeat to the next
# Seconds without a heartbeat after which a process of another machine counts as dead.
PATIENCE = 60.0
_SETTLE = 1.0  # seconds in which two processes that take over the same lock see each other


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that writes a run.

    Attributes:
        host: name of its machine.
        pid: its number there.
        since: when it took the lock.
        machine: start of the machine and namespace of process numbers: where both are equal, `pid`
            means the same. A container that was started again has another one.
        started: clock ticks at which the process started, since numbers are used again.
        token: tells apart locks of one process.
        beats: how often it has shown that it works.
    """

    host: str = "an unknown host"
    pid: int = 0
    since: str = "an unknown time"
    machine: str = ""
    started: str = ""
    token: str = ""
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def check_free(run: RunLayout, log: Log) -> None:
    """Refuse a run directory that cannot be written, or that another process is writing.

    Nothing is written; see `hold`.
    """
    atomic.check_writable(run.root)
    if (holder := _read(run.lock)) is not None:
        _refuse_living(run, holder, log)


@contextlib.contextmanager
def hold(run: RunLayout, log: Log) -> Iterator[None]:
    """Hold the lock of a run directory in the block. All processes of a run call it; one writes.

    Raises:
        UserError: another process writes the run, or its directory cannot be created.
    """
    holder = None
    with processes.barrier("lock the run directory"):
        if jax.process_index() == 0:
            holder = _acquire(run, log)
    if holder is None:
        yield
        return
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(run.lock, holder, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        # after a takeover the file is that of another process
        if _is_held_by(run.lock, holder):
            run.lock.unlink()


def _acquire(run: RunLayout, log: Log) -> Holder:
    claim = Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        machine=_machine(),
        started=_start_time(os.getpid()) or "",
        token=secrets.token_hex(8),
    )
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        # exclusive creation is atomic over NFS as well
        with run.lock.open("x") as file:
            file.write(json.dumps(dataclasses.asdict(claim)))
        return claim
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(
            f"{run.root} cannot be written ({error.strerror}); choose another directory with"
            " --set output=DIRECTORY"
        ) from error
    if (holder := _read(run.lock)) is None:
        return _acquire(run, log)  # it was released just now
    _refuse_living(run, holder, log)
    log(f"{run.root}: {holder} has ended without releasing the run; going on in its place")
    _write(run.lock, claim)
    # of several processes that found the same stale lock, the last writer has it
    time.sleep(_SETTLE)
    if not _is_held_by(run.lock, claim):
        raise _refusal(run, _read(run.lock) or Holder())
    return claim


def _refuse_living(run: RunLayout, holder: Holder, log: Log) -> None:
    """Refuse a run whose holder is at work; return where it has ended."""
    if holder.machine == _machine():
        if holder.started == (_start_time(holder.pid) or "") and _exists(holder.pid):
            raise _refusal(run, holder)
        return
    log(f"{run.root}: waiting up to {PATIENCE:.0f} s for a sign of life of {holder}")
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        now = _read(run.lock)
        if now is None:
            return
        if (now.token, now.beats) != (holder.token, holder.beats):
            raise _refusal(run, now)


def _refusal(run: RunLayout, holder: Holder) -> UserError:
    return UserError(
        f"{run.root} is being written by {holder}; wait until it ends, or choose another directory"
        " with --set output=DIRECTORY"
    )


def _beat(path: Path, holder: Holder, ended: threading.Event) -> None:
    """Count beats in the file until the event; stop the process where another one took over."""
    while not ended.wait(BEAT):
        current = _read(path)
        if current is not None and current.token != holder.token:
            # A machine that slept, or a file system that hung. Two writers would mix their results.
            console.print_error(f"error: {path.parent} was taken over by {current}; stopping")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        holder = dataclasses.replace(holder, beats=holder.beats + 1)
        # a full disk or an unreachable server: the next beat may succeed
        with contextlib.suppress(OSError):
            _write(path, holder)


def _read(path: Path) -> Holder | None:
    """Return who holds a lock, None where it is free."""
    try:
        return Holder(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UserError(
            f"{path.parent} is no directory; choose another one with --set output=DIRECTORY"
        ) from error
    except (ValueError, TypeError):
        # it was created this moment, or a machine lost power while it was written
        return Holder()


def _write(path: Path, holder: Holder) -> None:
    atomic.replace(path, json.dumps(dataclasses.asdict(holder)).encode())


def _is_held_by(path: Path, holder: Holder) -> bool:
    current = _read(path)
    return current is not None and current.token == holder.token


def _machine() -> str:
    """Return what identifies the running system and its numbers of processes."""
    parts = [socket.gethostname()]
    # only Linux has these; elsewhere the name of the machine has to do
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_time(pid: int) -> str | None:
    """Return when a process started, None where it has ended or the system does not say."""
    try:
        # the name of the program may hold spaces and parentheses; the fields after it do not
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # a zombie has ended; its parent has not noticed
    return None if state in "ZX" else fields[18]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True
