"""Several processes that act as one.

They start with the same inputs and stop at the same step, and none waits long for a lost one.
"""

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
# Seconds by which the timeout of jax exceeds ours. At its own timeout jax aborts the process, so
# ours must come first to end with a message.
_GRACE = 60


def check_alike(inputs: Mapping[str, object]) -> None:
    """Refuse inputs that differ between processes. All processes call it at the same point.

    Args:
        inputs: JSON data by name, with the same names on every process. Only digests are
            exchanged.

    Raises:
        UserError: on every process: which processes differ, and in which inputs.

    Example:
        >>> check_alike({"config": {"seed": 0}})
    """
    if jax.process_count() == 1:
        return
    # sort_keys: dicts that were built in another order are alike
    texts = [json.dumps(value, sort_keys=True, default=str) for value in inputs.values()]
    digests = np.stack(
        [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in texts]
    )
    message = differences(list(inputs), multihost_utils.process_allgather(digests))
    # On every process, since all of them have all digests: none is left waiting.
    if message:
        raise UserError(
            f"{message}; start every process with the same config, files and directories"
        )


def differences(names: list[str], digests: np.ndarray) -> str:
    """Return which processes differ from process 0 in which inputs; empty if none does.

    Args:
        names: names of the inputs.
        digests: uint8[processes, names, bytes].

    Example:
        >>> differences(["config", "data"], np.array([[[1], [2]], [[1], [3]]], np.uint8))
        'process 1 differs from process 0 in data'
    """
    differs = (digests != digests[0]).any(-1)
    messages = []
    for process, row in enumerate(differs):
        if row.any():
            differing = [name for name, flag in zip(names, row, strict=True) if flag]
            messages.append(f"process {process} differs from process 0 in {', '.join(differing)}")
    return "; ".join(messages)


class StopSignal:
    """A context manager in which SIGTERM, or the first SIGINT, asks a loop to stop.

    A second SIGINT interrupts at once. Several processes stop at the same step, whichever of them
    got the signal: they use the preemption service of jax, which handles SIGTERM from the start.

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
        """The exit code that shells and launchers expect: 128 + the number of the signal."""
        return 128 + self._number

    def reached(self, step: int) -> bool:
        """Return whether to stop after `step`. Every process calls it after every step."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # from here on a second Ctrl-C interrupts at once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() == 1:
            self._number, self._asked = number, True
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # jax forwards it to all processes

    def __enter__(self) -> "StopSignal":
        # Python delivers signals to the main thread only
        if threading.current_thread() is threading.main_thread():
            # with several processes SIGTERM stays with jax's preemption service
            caught = _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
            self._before = {number: signal.signal(number, self._handle) for number in caught}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # handlers of a caller, e.g. a notebook, come back
        for number, handler in self._before.items():
            signal.signal(number, handler)


def let_sigterm_end() -> None:
    """Let SIGTERM end one of several processes at once.

    Outside of training nothing polls the preemption service of jax, which would swallow the signal.
    This cannot be undone, because jax does not give access to its handler.
    """
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end(code: int, patience: float) -> None:
    """End this process. One of several waits at most `patience` seconds for the others."""
    if "jax" in sys.modules and jax.distributed.is_initialized():
        if patience:
            within(jax.distributed.shutdown, patience)
        # `sys.exit` would wait for a lost process until its heartbeat is missed, and then abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def within(work: Callable[[], object], seconds: float) -> bool:
    """Run `work` in a thread, and return whether it ended in time. Its exceptions are raised.

    A thread that did not end is a daemon: it does not keep the process alive.

    Example:
        >>> within(lambda: None, 5.0), within(lambda: threading.Event().wait(0.5), 0.01)
        (True, False)
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # re-raised in the thread that waits
            errors.append(error)

    # A thread and not SIGALRM: the work blocks inside C++ code, which Python signals do not leave.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return not thread.is_alive()


@contextlib.contextmanager
def barrier(action: str) -> Iterator[None]:
    """Wait for all processes at the end of the block, and fail on all of them if one failed.

    Args:
        action: what the block does, for the error message, e.g. "create the output".

    Raises:
        UserError: another process failed. Its own message says why.

    Example:
        >>> with barrier("create the output"):
        ...     pass
    """
    if jax.process_count() == 1:
        yield
        return
    # the error is held back until all processes know of it: they would wait forever otherwise
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    # It is the barrier, too: it returns when all processes have come to it.
    failed = multihost_utils.process_allgather(np.int32(error is not None))
    if error is not None:
        raise error
    if failed.any():
        raise UserError(f"process {int(failed.argmax())} could not {action}; see its message")


def on_all(flag: bool) -> bool:
    """Return whether a flag is true on all processes.

    Example:
        >>> on_all(True), on_all(False)
        (True, False)
    """
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).all())


def broadcast(value: int) -> int:
    """Return the value of process 0: a flag, or a number below 2^31.

    Example:
        >>> broadcast(True), broadcast(7)
        (True, 7)
    """
    if jax.process_count() == 1:
        return value
    # int32: jax has no 64-bit integers by default
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def start_distributed(
    coordinator: str | None,
    processes: int | None,
    index: int | None,
    timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Join the other processes. A process that has joined already does nothing.

    Call it before any other use of jax.

    Args:
        coordinator: `"host:port"` of process 0, or `"auto"` where the cluster tells jax (TPU pods,
            SLURM).
        processes, index: number of processes, and the index of this one; not used with `"auto"`.
        timeout: seconds to wait for the peers.
        heartbeat_timeout: seconds after which a silent process counts as lost and ends the others.

    Raises:
        PeerLost: the peers could not be reached in time.
        UserError: jax refuses the address or the numbers.
    """
    if coordinator is None or jax.distributed.is_initialized():
        return
    # None lets jax ask the cluster; naming one value turns its detection off
    auto = coordinator == "auto"

    def join() -> None:
        jax.distributed.initialize(
            coordinator_address=None if auto else coordinator,
            num_processes=None if auto else processes,
            process_id=None if auto else index,
            initialization_timeout=timeout + _GRACE,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )

    process = "this process" if index is None else f"process {index} of {processes}"
    hint = "check that every process runs and that the port is reachable"
    try:
        # Our thread and not the timeout of jax, see `_GRACE`.
        joined = within(join, timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{process} could not start with coordinator {coordinator}:"
            f" {str(error).splitlines()[0]}; {hint}"
        ) from error
    if not joined:
        raise PeerLost(
            f"{process} did not find all its peers within {timeout} s (coordinator"
            f" {coordinator}); {hint}"
        )
