"""Orbax checkpoints of pytrees: saved asynchronously, restored onto any mesh, also in part.

A checkpoint is the directory `STEP/` below a directory of checkpoints. Orbax writes it beside its
name and renames it, so one that was cut off is never taken for the latest.
"""

import contextlib
import errno
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np

from jax_ordermerge.checkpoint import alias, placement
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow, JsonValue
from jax_ordermerge.tree import PyTree, unflatten

T = TypeVar("T")
# checkpoints/
#   4/                          step 4
#     _CHECKPOINT_METADATA      written last: without it the checkpoint is partial
#     state/                    the arrays, an OCDBT database
#   6.orbax-checkpoint-tmp.../  a save in progress, or one that was cut off
_STATE, _COMPLETE = "state", "_CHECKPOINT_METADATA"
_PARTIAL = ".orbax-checkpoint-tmp"
# Failures of a file system in the errors of tensorstore. Its number of an absent file is 2.
_OUT_OF_REACH = re.compile(
    r"PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|OS error (?!2:)"
)
# Seconds after which Orbax gives up a save, at least: its own default.
_TIMEOUT = 1200
# A save may take this multiple of what the stated bandwidth allows: storage is shared.
_PATIENCE = 3
# bytes of decompressed chunks per open array
_CACHE_BYTES = 100_000_000


class Checkpoints:
    """The checkpoints of one run, a context manager: leaving it waits for the save in progress.

    With several processes all of them make the same calls in the same order.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with Checkpoints(tempfile.mkdtemp(), keep=1) as checkpoints:
        ...     _ = checkpoints.save(1, {"w": jnp.zeros(3)}, {"members": 2})
        ...     _ = checkpoints.save(2, {"w": jnp.ones(3)}, {"members": 2})
        ...     checkpoints.wait()
        ...     restored = checkpoints.restore(2, {"w": jax.ShapeDtypeStruct((3,), "float32")})
        >>> checkpoints.latest(), checkpoints.metadata(2), restored["w"].tolist()
        (2, {'members': 2}, [1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int | None = None,
        *,
        steps: Sequence[int] = (),
        on_saved: Callable[[], None] | None = None,
        timeout: int = _TIMEOUT,
    ) -> None:
        """Open or create a directory of checkpoints and remove what an interrupted save left.

        Args:
            directory: created if absent.
            keep: number of latest checkpoints to keep; None keeps all.
            steps: of checkpoints that are kept besides the latest.
            on_saved: called in a thread of its own when a save is complete on the disk. `wait`
                raises what it raises.
            timeout: seconds after which a save counts as failed; see `save_timeout`.
        """
        _silence_orbax()
        # resolved: TensorStore takes no path with `..` in it
        self.directory = Path(directory).resolve()
        # before Orbax lists the directory
        if jax.process_index() == 0:
            _remove_partial(self.directory)
        ocp = _import_orbax()
        policies = ocp.training.preservation_policies
        # Orbax cannot make a directory through a link to it
        self.directory.mkdir(parents=True, exist_ok=True)
        context = ocp.Context()
        context.asynchronous.timeout_secs = timeout
        self._checkpointer = ocp.training.Checkpointer(
            alias.plain_path(self.directory),
            context=context,
            preservation_policy=policies.PreserveAll()
            if keep is None
            else policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.CustomSteps(list(steps))]
            ),
        )
        # one thread: notifications keep the order of the saves
        self._on_saved, self._thread = on_saved, ThreadPoolExecutor(1)
        self._notification: Future[None] | None = None

    def save(self, step: int, tree: PyTree, metadata: JsonRow | None = None) -> float:
        """Wait for the save in progress, start this one, and return when arrays may change again.

        Args:
            step: number of the checkpoint; one of the same number is replaced.
            tree: pytree of jax arrays, such as `{"params": ..., "optimizer": ...}`.
            metadata: JSON data stored with it.

        Returns:
            The seconds that it waited for the save in progress.
        """
        start = time.monotonic()
        self.wait()
        waited = time.monotonic() - start
        # without `force` Orbax skips saves that follow each other too fast, and does not say so
        self._checkpointer.save_async(
            step,
            tree,
            checkpointable_name=_STATE,
            force=True,
            overwrite=True,
            custom_metadata=metadata,
        )
        if self._on_saved is not None:
            self._notification = self._thread.submit(self._notify, self._on_saved)
        return waited

    def _notify(self, on_saved: Callable[[], None]) -> None:
        self._checkpointer.wait()
        on_saved()

    def wait(self) -> None:
        """Wait until the save in progress is complete and `on_saved` has returned."""
        if self._notification is not None:
            # cleared first, so that an error is raised once
            notification, self._notification = self._notification, None
            notification.result()
        self._checkpointer.wait()

    def latest(self) -> int | None:
        """Return the last complete step, None if there is none."""
        return latest(self.directory)

    def restore(self, step: int, abstract_tree: T) -> T:
        """See `restore`."""
        self.wait()
        return restore(self.directory, step, abstract_tree)

    def metadata(self, step: int) -> Json:
        """See `metadata`."""
        self.wait()
        return metadata(self.directory, step)

    def close(self) -> None:
        """Wait for the save in progress and release the threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            self._thread.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # after the loss of a process the save in progress would wait for it forever
        if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
            self.close()


def save_timeout(size: int, bandwidth: float) -> int:
    """Return the seconds to allow for a save of `size` bytes to storage of `bandwidth` bytes/s.

    Example:
        >>> save_timeout(10**6, 200e6), save_timeout(324 * 10**9, 200e6)
        (1200, 4860)
    """
    return max(_TIMEOUT, math.ceil(_PATIENCE * size / bandwidth))


def save(directory: str | Path, step: int, tree: PyTree, metadata: JsonRow | None = None) -> None:
    """Save one checkpoint and wait for it; see `Checkpoints.save`."""
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(step, tree, metadata)


def steps(directory: str | Path) -> list[int]:
    """Return the complete steps in a directory, ascending.

    Example:
        >>> steps("nowhere")
        []
    """
    root = Path(directory)
    if not root.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in root.iterdir()
        # Orbax writes this file last
        if path.name.isdecimal() and (path / _COMPLETE).is_file()
    )


def latest(directory: str | Path) -> int | None:
    """Return the last complete step in a directory, None if there is none.

    Example:
        >>> latest("nowhere") is None
        True
    """
    return max(steps(directory), default=None)


def metadata(directory: str | Path, step: int) -> Json:
    """Return the JSON data saved with a step.

    Raises:
        UserError: there is no such checkpoint.
    """
    return dict(_read_metadata(directory, step).custom_metadata or {})


def restore(directory: str | Path, step: int, abstract_tree: T) -> T:
    """Restore arrays with given shardings and dtypes.

    Args:
        directory: directory of checkpoints.
        step: number of the checkpoint.
        abstract_tree: pytree of `jax.ShapeDtypeStruct`; without a sharding an array goes to the
            first local device. Branches may be left out: `{"params": ...}` restores the parameters
            without reading the optimizer state.

    Returns:
        The pytree of `jax.Array`.

    Raises:
        UserError: there is no such checkpoint, or an array in it is absent or has another shape.
    """
    _check_arrays(directory, step, abstract_tree)
    # Orbax would restore onto the devices that the checkpoint was saved from, which may be absent
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device),
        abstract_tree,
    )
    ocp = _import_orbax()
    context = ocp.Context()
    # branches that are not in the abstract tree, such as the optimizer state, are not read
    context.pytree.loading.partial_load = True
    path = _checkpoint_path(directory, step)
    with context, _failure_as_user_error(path):
        return ocp.load(alias.plain_path(path), placed, checkpointable_name=_STATE)


def restore_member(directory: str | Path, step: int, member: int, abstract_tree: T) -> T:
    """Restore one member of a population without reading the bytes of the others.

    Args:
        directory: directory of checkpoints.
        step: number of the checkpoint.
        member: index along the leading axis `M` of every array.
        abstract_tree: as in `restore`, of one member: without the axis `M`.

    Raises:
        UserError: as in `restore`, and if the member does not exist.
    """
    _check_arrays(directory, step, abstract_tree, member)
    # Orbax restores whole arrays only. tensorstore, which it writes with, reads any part.
    checkpoint = _checkpoint_path(directory, step)

    def load(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        store = _open_store(checkpoint, ".".join(_leaf_name(path)))
        return placement.place(leaf, lambda index: store[member][index].read().result())

    with _failure_as_user_error(checkpoint):
        return jax.tree_util.tree_map_with_path(load, abstract_tree)


class MemberArray:
    """One array of a checkpoint, or one member of it, to be read in parts."""

    def __init__(self, store: Any, member: int | None, checkpoint: Path) -> None:
        self._store, self._checkpoint = store, checkpoint
        self._member = () if member is None else (member,)
        self.dtype = np.dtype(store.dtype.numpy_dtype)

    def read(self, *index: int | slice) -> np.ndarray:
        """Return the part of the (member's) array at an index."""
        with _failure_as_user_error(self._checkpoint):
            return np.asarray(self._store[(*self._member, *index)].read().result())


def open_member(
    directory: str | Path, step: int, member: int | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, MemberArray]:
    """Open arrays of one member of a population without reading them.

    Args:
        directory: directory of checkpoints.
        step: number of the checkpoint.
        member: index along the leading axis `M`; None if the arrays have no such axis.
        shapes: `{"branch/leaf": shape of one member}`.

    Raises:
        UserError: as in `restore_member`.
    """
    abstract = unflatten(
        {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    )
    # now, and not at the first read in the middle of a merge
    _check_arrays(directory, step, abstract, member)
    checkpoint = _checkpoint_path(directory, step)
    with _failure_as_user_error(checkpoint):
        return {
            name: MemberArray(_open_store(checkpoint, name.replace("/", ".")), member, checkpoint)
            for name in shapes
        }


def _open_store(path: Path, name: str) -> Any:
    import tensorstore

    # the layout of Orbax: one zarr3 array per leaf, all in one OCDBT database
    base = {"driver": "file", "path": f"{alias.plain_path(path) / _STATE}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    # consecutive rows are read one by one, and many lie in one chunk
    context = {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}}
    return tensorstore.open(
        {"driver": "zarr3", "kvstore": kvstore, "context": context}, open=True, read=True
    ).result()


def _checkpoint_path(directory: str | Path, step: int) -> Path:
    path = Path(directory).resolve() / str(step)
    if not (path / _COMPLETE).is_file():
        present = ", ".join(map(str, steps(directory)))
        raise UserError(
            f"no checkpoint of step {step} in {directory} (present: {present or 'none'})"
        )
    return path


def _read_metadata(directory: str | Path, step: int) -> JsonValue:
    """Return Orbax's metadata of a checkpoint: names and shapes of the arrays, custom metadata."""
    _silence_orbax()
    path = _checkpoint_path(directory, step)
    with _failure_as_user_error(path):
        # Orbax only logs what it cannot read, and continues without it
        json.loads((path / _COMPLETE).read_text())
        stored = _import_orbax().metadata(alias.plain_path(path), checkpointable_name=_STATE)
        if stored.metadata is None:
            raise ValueError("its list of arrays cannot be read")
    return stored


@contextlib.contextmanager
def _failure_as_user_error(path: Path) -> Iterator[None]:
    """Report errors as damage: names and shapes were checked, so the files are what is wrong.

    A file system that fails is no damage: the same files may be read in a minute.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # messages name the path that Orbax was given
        reason = reason.replace(str(alias.plain_path(path)), str(path))[:300]
        number = error.errno if isinstance(error, OSError) else None
        if number not in (None, errno.ENOENT) or _OUT_OF_REACH.search(str(error)):
            raise UserError(
                f"checkpoint {path} cannot be read ({reason}); its files are not damaged, mend the"
                " cause and give the same command again"
            ) from error
        before = max((step for step in steps(path.parent) if step < int(path.name)), default=None)
        remedy = (
            "restore its files, no checkpoint is before it"
            if before is None
            else f"remove it to go back to step {before}"
        )
        raise UserError(f"checkpoint {path} is damaged ({reason}); {remedy}") from error


def _check_arrays(
    directory: str | Path, step: int, abstract_tree: PyTree, member: int | None = None
) -> None:
    """Compare names and shapes. Orbax itself returns a placeholder for an absent array."""
    stored = {
        _leaf_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            _read_metadata(directory, step).metadata
        )
    }
    checkpoint = f"checkpoint {Path(directory) / str(step)}"
    # the member axis of the checkpoint is not in the abstract tree of one member
    leading = 0 if member is None else 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_tree):
        name = _leaf_name(path)
        if name not in stored:
            raise UserError(
                f"{checkpoint} has no array {'/'.join(name)}; it was saved by another kind of run"
                " or model"
            )
        shape = stored[name]
        expected = (*shape[:leading], *leaf.shape)
        if shape != expected:
            raise UserError(
                f"{checkpoint}: {'/'.join(name)} has shape {shape}, expected {expected}; it is of"
                " another model or another number of members"
            )
        if member is not None and not 0 <= member < shape[0]:
            raise UserError(f"{checkpoint} has members 0 to {shape[0] - 1}, not {member}")


def _leaf_name(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
    """Return the name of a leaf as Orbax stores it: dict keys, field names, or positions."""
    return tuple(
        str(next(getattr(part, a) for a in ("key", "idx", "name") if hasattr(part, a)))
        for part in path
    )


def _remove_partial(directory: Path) -> None:
    """Remove what a killed save or deletion left.

    Orbax would count a directory without its metadata as a checkpoint.
    """
    for path in directory.iterdir() if directory.is_dir() else ():
        step, _, _ = path.name.partition(_PARTIAL)
        complete = path.name == step and (path / _COMPLETE).is_file()
        if step.isdecimal() and path.is_dir() and not complete:
            shutil.rmtree(path)


def _import_orbax() -> Any:
    """Import the library when it is first needed: it takes a third of a second."""
    from orbax.checkpoint import v1

    return v1


def _silence_orbax() -> None:
    # Orbax logs every save and restore, and with a traceback the errors that it raises as well
    logging.getLogger("absl").setLevel(logging.CRITICAL)
