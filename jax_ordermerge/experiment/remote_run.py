"""Runs whose directory is in a bucket: they work on a local copy that is copied back."""

import contextlib
from collections.abc import Iterator

import jax

from jax_ordermerge import processes
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config import Config
from jax_ordermerge.errors import Stopped, UserError
from jax_ordermerge.experiment.context import Log, start_devices


class BucketCopy:
    """Copies a run directory to its bucket; does nothing for a run on a disk.

    Args:
        mirror: of this process; None on a disk, and on all processes but the first.
        log: receives one-line messages.
        several: whether there are several processes.
    """

    def __init__(self, mirror: remote.Mirror | None, log: Log, *, several: bool = False) -> None:
        self._mirror, self._log, self._several = mirror, log, several

    def save(self) -> None:
        """Copy the complete files. All processes call it."""
        with contextlib.ExitStack() as stack:
            if self._several:
                stack.enter_context(processes.barrier("copy the run directory to its bucket"))
            self._copy()

    def try_save(self) -> None:
        """Copy the complete files while a stage goes on; log a failure instead of raising it."""
        # Only one process calls this, so there must be no barrier. A bucket out of reach for a
        # minute must not end a training of days: the next copy includes what this one missed.
        try:
            self._copy()
        except UserError as error:
            self._log(f"{error}; the run goes on and copies again with the next complete files")

    def _copy(self) -> None:
        if self._mirror is not None:
            self._mirror.save()


@contextlib.contextmanager
def local_run(config: Config, log: Log) -> Iterator[tuple[Config, BucketCopy]]:
    """Yield the config with a run directory on a disk that all processes see, and its copier.

    Raises:
        UserError: the bucket cannot be read or written, or the processes do not see the same copy.
    """
    url, several = remote.address(config.location), config.distributed.coordinator is not None
    if url is None:
        yield config, BucketCopy(None, log)
        return
    mirror = remote.Mirror(url)
    # One process copies: several writers of one listing would undo each other.
    first = True
    if several:
        first = _open_on_first_process(config, mirror)
    elif mirror.open():
        log(f"{url} is copied to {mirror.local}")
    copy = BucketCopy(mirror if first else None, log, several=several)
    try:
        yield config.model_copy(update={"output": str(mirror.local)}), copy
    except Stopped:
        # a preempted machine has some seconds left, and its disk is lost after them
        copy.save()
        raise


def _open_on_first_process(config: Config, mirror: remote.Mirror) -> bool:
    """Open a copy by process 0, check that the others see it, and return whether this is it."""
    start_devices(config)  # the barrier needs the processes to be connected
    with processes.barrier(f"read {mirror.url}"):
        if jax.process_index() == 0:
            mirror.open()
    try:
        # the record names the version that the copy holds: on another disk it is absent or older
        processes.check_alike({"the copy of the run": mirror.record})
    except UserError as error:
        raise UserError(
            f"{mirror.url}: its copy {mirror.local} is not seen by all processes"
            f" ({str(error).split(';')[0]}); set ORDERMERGE_CACHE to a directory on a file system"
            " that they share"
        ) from error
    return jax.process_index() == 0
