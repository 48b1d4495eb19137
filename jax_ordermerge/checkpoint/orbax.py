"""Orbax checkpoints of trees of arrays: asynchronous saving, restoring onto any mesh, whole, in part, or one member.

A checkpoint is the directory `STEP/` below a run's `checkpoints/`. Orbax writes it beside and renames it, so one that was cut off
is never taken for the latest.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np

from jax_ordermerge.checkpoint import placement
from jax_ordermerge.errors import UserError

T = TypeVar("T")
_STATE, _COMPLETE = "state", "_CHECKPOINT_METADATA"
_PARTIAL = ".orbax-checkpoint-tmp"
_CACHE_BYTES = 100_000_000


class Checkpoints:
    """The checkpoints of one run. Use it as a context manager: leaving it waits for the save under way.

    With several processes all of them make the same calls in the same order.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with Checkpoints(tempfile.mkdtemp(), keep=1) as checkpoints:
        ...     checkpoints.save(1, {"w": jnp.zeros(3)}, {"members": 2})
        ...     checkpoints.save(2, {"w": jnp.ones(3)}, {"members": 2})
        ...     checkpoints.wait()
        ...     restored = checkpoints.restore(2, {"w": jax.ShapeDtypeStruct((3,), "float32")})
        >>> checkpoints.latest(), checkpoints.metadata(2), restored["w"].tolist()
        (2, {'members': 2}, [1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int | None = None,
        saved: Callable[[], None] | None = None,
    ) -> None:
        """Open or create a directory of checkpoints and remove what an interrupted save left there.

        Args:
            directory: created if absent.
            keep: how many of the latest to keep; None keeps all.
            saved: is called in a thread of its own when a save is complete on the disk, and what it raises is raised by `wait`.
        """
        _quiet()
        self.directory = Path(directory).absolute()
        if jax.process_index() == 0:
            _sweep(self.directory)
        ocp = _ocp()
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=policies.PreserveAll() if keep is None else policies.LatestN(keep),
        )
        self._saved, self._thread = saved, ThreadPoolExecutor(1)
        self._told: Future[None] | None = None

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Start saving and return as soon as the arrays may change again; a save still under way is waited for.

        Args:
            step: its number; a checkpoint of the same step is replaced.
            tree: any tree of jax arrays, such as `{"params": ..., "optimizer": ...}`.
            metadata: JSON data kept with it.
        """
        self.wait()
        # without force Orbax skips steps by a policy of its own, in silence
        self._checkpointer.save_async(
            step,
            tree,
            checkpointable_name=_STATE,
            force=True,
            overwrite=True,
            custom_metadata=metadata,
        )
        if self._saved is not None:
            self._told = self._thread.submit(self._tell, self._saved)

    def _tell(self, saved: Callable[[], None]) -> None:
        self._checkpointer.wait()
        saved()

    def wait(self) -> None:
        """Wait until the save under way is complete on the disk, and until `saved` has returned."""
        if self._told is not None:
            told, self._told = self._told, None
            told.result()
        self._checkpointer.wait()

    def latest(self) -> int | None:
        """Return the last complete step, None if there is none."""
        return latest(self.directory)

    def restore(self, step: int, abstract_tree: T) -> T:
        """See `restore`."""
        self.wait()
        return restore(self.directory, step, abstract_tree)

    def metadata(self, step: int) -> dict[str, Any]:
        """See `metadata`."""
        self.wait()
        return metadata(self.directory, step)

    def close(self) -> None:
        """Wait for the save under way and release the threads."""
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
        # the save under way would wait for a lost process
        if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
            self.close()


def save(
    directory: str | Path, step: int, tree: Any, metadata: Mapping[str, Any] | None = None
) -> None:
    """Save one checkpoint and wait for it; see `Checkpoints.save`."""
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(step, tree, metadata)


def latest(directory: str | Path) -> int | None:
    """Return the last complete step in a directory, None if there is none.

    Example:
        >>> latest("nowhere") is None
        True
    """
    return max(_steps(Path(directory)), default=None)


def metadata(directory: str | Path, step: int) -> dict[str, Any]:
    """Return the JSON data saved with a step.

    Raises:
        UserError: there is no such checkpoint.
    """
    return dict(_stored(directory, step).custom_metadata or {})


def restore(directory: str | Path, step: int, abstract_tree: T) -> T:
    """Restore arrays onto the shardings and into the dtypes asked for.

    Args:
        directory: of the checkpoints.
        step: which one.
        abstract_tree: tree of `jax.ShapeDtypeStruct`, with shardings (without one: the first local device). It may leave out
            branches: `{"params": ...}` restores the parameters without reading the optimizer state.

    Returns:
        The tree of `jax.Array`.

    Raises:
        UserError: there is no such checkpoint, or an array in it is absent or has another shape.
    """
    _match(directory, step, abstract_tree)
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(
        lambda leaf: (
            leaf
            if leaf.sharding is not None
            else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=local)
        ),
        abstract_tree,
    )
    ocp = _ocp()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    path = _path(directory, step)
    with context, _damage(path):
        return ocp.load(path, placed, checkpointable_name=_STATE)


def restore_member(directory: str | Path, step: int, member: int, abstract_tree: T) -> T:
    """Restore one member of a population; the bytes of the others are not read.

    Args:
        directory: of the checkpoints.
        step: which one.
        member: index along the leading axis `M` of every array asked for.
        abstract_tree: of one member, without the axis `M`; otherwise as in `restore`.

    Raises:
        UserError: as in `restore`, and if the member does not exist.
    """
    _match(directory, step, abstract_tree, member)
    where = _path(directory, step)

    def load(path: Any, leaf: Any) -> jax.Array:
        store = _open_store(where, ".".join(_key(path)))
        return placement.place(leaf, lambda index: store[member][index].read().result())

    with _damage(where):
        return jax.tree_util.tree_map_with_path(load, abstract_tree)


class MemberArray:
    """One array of a checkpoint, or one member of it, to be read in parts."""

    def __init__(self, store: Any, member: int | None, path: Path) -> None:
        self._store, self._path = store, path
        self._lead = () if member is None else (member,)
        self.dtype = np.dtype(store.dtype.numpy_dtype)

    def read(self, *index: int | slice) -> np.ndarray:
        """Return the part of the (member's) array at this index."""
        with _damage(self._path):
            return np.asarray(self._store[(*self._lead, *index)].read().result())


def open_member(
    directory: str | Path, step: int, member: int | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, MemberArray]:
    """Open arrays of one member of a population without reading them.

    Args:
        directory: of the checkpoints.
        step: which one.
        member: index along the leading axis `M`; None of arrays that have no such axis.
        shapes: `{"branch/leaf": shape of one member}`.

    Raises:
        UserError: as in `restore_member`.
    """
    abstract: dict[str, Any] = {}
    for name, shape in shapes.items():
        *parents, last = name.split("/")
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, "float32")
    _match(directory, step, abstract, member)
    where = _path(directory, step)
    with _damage(where):
        return {
            name: MemberArray(_open_store(where, name.replace("/", ".")), member, where)
            for name in shapes
        }


def _open_store(path: Path, name: str) -> Any:
    import tensorstore

    kvstore = {"driver": "ocdbt", "base": f"file://{path / _STATE}/", "path": f"{name}/"}
    # the cache serves those who come back for the next rows of the same chunk
    context = {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}}
    return tensorstore.open(
        {"driver": "zarr3", "kvstore": kvstore, "context": context}, open=True, read=True
    ).result()


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return [
        int(path.name)
        for path in directory.iterdir()
        if path.name.isdecimal() and (path / _COMPLETE).is_file()
    ]


def _path(directory: str | Path, step: int) -> Path:
    path = Path(directory).absolute() / str(step)
    if not (path / _COMPLETE).is_file():
        found = sorted(_steps(Path(directory)))
        raise UserError(
            f"no checkpoint of step {step} in {directory} (present: {', '.join(map(str, found)) or 'none'})"
        )
    return path


def _stored(directory: str | Path, step: int) -> Any:
    _quiet()
    path = _path(directory, step)
    with _damage(path):
        # Orbax only logs what it cannot read, and goes on without it
        json.loads((path / _COMPLETE).read_text())
        found = _ocp().metadata(path, checkpointable_name=_STATE)
        if found.metadata is None:
            raise ValueError("its list of arrays cannot be read")
    return found


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Names and shapes have been compared before: what still fails inside is a damaged file."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint {path} is damaged ({reason[:300]}); remove it to go back to the one before"
        ) from error


def _match(directory: str | Path, step: int, abstract_tree: Any, member: int | None = None) -> None:
    """Compare names and shapes first: Orbax hands back an absent array as its own placeholder, without a word."""
    stored = {
        _key(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(_stored(directory, step).metadata)
    }
    where = f"checkpoint {Path(directory) / str(step)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_tree):
        name = _key(path)
        if name not in stored:
            raise UserError(
                f"{where} has no array {'/'.join(name)}; it was saved by another kind of run or model"
            )
        shape = tuple(stored[name].shape)
        if shape[0 if member is None else 1 :] != tuple(leaf.shape):
            raise UserError(
                f"{where}: {'/'.join(name)} has shape {shape}, expected {(*shape[: member is not None], *leaf.shape)};"
                " it is of another model or another number of members"
            )
        if member is not None and not 0 <= member < shape[0]:
            raise UserError(f"{where} has members 0 to {shape[0] - 1}, not {member}")


def _key(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of a leaf as Orbax stores them: dict key, field name, or position."""
    return tuple(
        str(next(getattr(part, a) for a in ("key", "idx", "name") if hasattr(part, a)))
        for part in path
    )


def _sweep(directory: Path) -> None:
    """Remove what a killed save or deletion left; Orbax would count a directory without its metadata as a checkpoint."""
    for path in directory.iterdir() if directory.is_dir() else ():
        step, _, _ = path.name.partition(_PARTIAL)
        if (
            step.isdecimal()
            and path.is_dir()
            and not (path.name == step and (path / _COMPLETE).is_file())
        ):
            shutil.rmtree(path)


def _ocp() -> Any:
    """Return the library, imported when it is first needed: a merge of files never needs it, and it costs a third of a second."""
    from orbax.checkpoint import v1

    return v1


def _quiet() -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
