"""Several processes as one: they start from the same things, stop at the same step, and none waits long for one that is gone."""

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_ordermerge.errors import PeerLost, UserError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE = 60  # seconds


def check_alike(what: Mapping[str, Any]) -> None:
    """Refuse to go on where a process was given something else than process 0. All processes call it at the same point.

    Args:
        what: JSON data by name, the same names on every process; only digests are exchanged.

    Raises:
        UserError: on every process: which processes differ, and in what.

    Example:
        >>> check_alike({"config": {"seed": 0}})
    """
    if jax.process_count() == 1:
        return
    texts = [json.dumps(value, sort_keys=True, default=str) for value in what.values()]
    digests = np.stack(
        [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in texts]
    )
    message = differences(list(what), multihost_utils.process_allgather(digests))
    if message:
        raise UserError(
            f"{message}; start every process with the same config, files and directories"
        )


def differences(names: list[str], digests: np.ndarray) -> str:
    """Say which processes differ from process 0 and in what; empty where none does.

    Args:
        names: of what was digested.
        digests: uint8[processes, names, bytes].

    Example:
        >>> differences(["config", "data"], np.array([[[1], [2]], [[1], [3]]], np.uint8))
        'process 1 differs from process 0 in data'
    """
    differs = (digests != digests[0]).any(-1)
    return "; ".join(
        f"process {index} differs from process 0 in {', '.join(name for name, one in zip(names, row, strict=True) if one)}"
        for index, row in enumerate(differs)
        if row.any()
    )


class StopSignal:
    """SIGTERM, or SIGINT once, asks a loop to stop; a second SIGINT interrupts at once. Use it as a context manager.

    Several processes stop at the same step, whichever of them got the signal: that is the preemption service of jax, which holds
    SIGTERM from the start of the processes on.

    Example:
        >>> with StopSignal() as stop:
        ...     before = stop.reached(1)
        ...     signal.raise_signal(signal.SIGTERM)
        ...     after = stop.reached(2)
        >>> before, after, stop.name, stop.code
        (False, True, 'SIGTERM', 143)
    """

    def __init__(self) -> None:
        self._number: int = signal.SIGTERM
        self._asked = False
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """The name of the signal."""
        return signal.Signals(self._number).name

    @property
    def code(self) -> int:
        """The exit code by which shells and launchers know the signal: 128 + its number."""
        return 128 + self._number

    def reached(self, step: int) -> bool:
        """Say whether to stop after `step`. Call it after every step, with the same steps on every process."""
        return (
            self._asked
            if jax.process_count() == 1
            else multihost_utils.reached_preemption_sync_point(step)
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() == 1:
            self._number, self._asked = number, True
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # which jax tells to all processes

    def __enter__(self) -> "StopSignal":
        # Python hands signals to the main thread alone
        if threading.current_thread() is threading.main_thread():
            caught = _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
            self._before = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def let_sigterm_end() -> None:
    """Let SIGTERM end a process of several at once. Outside of training the preemption service of jax would only swallow it.

    There is no way back: jax does not hand out its own handler.
    """
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end(code: int, patience: float) -> None:
    """End this process. One of several waits `patience` seconds for the others and no longer: they may be waiting for it.

    Leaving by `sys.exit` would wait for a lost process until its heartbeat is missed, and then abort.
    """
    if "jax" in sys.modules and jax.distributed.is_initialized():
        if patience:
            within(jax.distributed.shutdown, patience)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def within(work: Callable[[], Any], seconds: float) -> bool:
    """Run `work` in a thread and say whether it ended in time; what it raises is raised. Left behind, it does not keep the process.

    Example:
        >>> within(lambda: None, 5.0), within(lambda: threading.Event().wait(0.5), 0.01)
        (True, False)
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    return not thread.is_alive()


@contextlib.contextmanager
def barrier(what: str) -> Iterator[None]:
    """Wait for all processes at the end of the block, and fail on all of them where one failed, lest the others wait forever.

    Args:
        what: is done in the block, for the message.

    Raises:
        UserError: another process failed; its own message says why.

    Example:
        >>> with barrier("create the output"):
        ...     pass
    """
    if jax.process_count() == 1:
        yield
        return
    failed: BaseException | None = None
    try:
        yield
    except Exception as error:
        failed = error
    found = multihost_utils.process_allgather(np.int32(failed is not None))
    if failed is not None:
        raise failed
    if found.any():
        raise UserError(f"process {int(found.argmax())} could not {what}; see its message")


def broadcast(flag: bool) -> bool:
    """Return what process 0 says.

    Example:
        >>> broadcast(True)
        True
    """
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def start_distributed(
    coordinator: str | None,
    processes: int | None,
    index: int | None,
    timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Join the other processes, or fail with one line; joined already, do nothing. Call before any other use of jax.

    Args:
        coordinator: `"host:port"` of process 0, or `"auto"` where the cluster environment knows (TPU pods, SLURM).
        processes, index: number of processes and the number of this one; not needed with `"auto"`.
        timeout: seconds to wait for the peers.
        heartbeat_timeout: seconds after which a silent process is taken for lost, and ends the others.

    Raises:
        PeerLost: the peers could not be reached in time.
        UserError: the addresses or numbers make no sense.
    """
    if coordinator is None or jax.distributed.is_initialized():
        return
    place: dict[str, Any] = (
        {}
        if coordinator == "auto"
        else {"coordinator_address": coordinator, "num_processes": processes, "process_id": index}
    )

    def join() -> None:
        # jax aborts the process at its own timeout, which therefore is the later one
        jax.distributed.initialize(
            **place,
            initialization_timeout=timeout + _GRACE,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )

    who = "this process" if index is None else f"process {index} of {processes}"
    hint = "check that every process runs and that the port is reachable"
    try:
        joined = within(join, timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{who} could not start with coordinator {coordinator}: {str(error).splitlines()[0]}; {hint}"
        ) from error
    if not joined:
        raise PeerLost(
            f"{who} did not find all its peers within {timeout} s (coordinator {coordinator}); {hint}"
        )
