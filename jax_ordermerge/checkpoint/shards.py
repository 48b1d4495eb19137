"""Safetensors files for writing: planned first, then filled at any place by threads or processes.

A file is 8 bytes of header length (little endian), a JSON header
`name -> {dtype, shape, data_offsets}`, and the tensors in C order without gaps. All headers are
written first, and the space of the tensors is reserved; the tensors then come in any order.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json

# How the names of the files begin: of models, of diffusers, of adapters of PEFT.
STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the default of transformers
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# bytes per read of a digest; bytes written before an early flush
_READ_BYTES = 1 << 22
_FLUSH_BYTES = 1 << 27


#   bytes  0 to 8   8 to 8 + n      8 + n to the end
#         n       JSON header     tensors, in the order of the header
class _Location(NamedTuple):
    """Where the bytes of a tensor lie."""

    file: str
    start: int
    size: int


class ShardFiles:
    """The files of a model, a context manager: leaving it flushes them through to the disk.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> with ShardFiles(directory, {"w": (2,)}, "float32") as files:
        ...     files.create()
        ...     files.write("w", 4, np.ones(1, np.float32))
        ...     files.write("w", 0, np.zeros(1, np.float32))
        >>> np.frombuffer((directory / "model.safetensors").read_bytes()[-8:], np.float32).tolist()
        [0.0, 1.0]
    """

    def __init__(
        self,
        directory: Path,
        table: Mapping[str, tuple[int, ...]],
        dtype: DTypeLike,
        shard_bytes: int = SHARD_BYTES,
        *,
        dtypes: Mapping[str, np.dtype[Any]] | None = None,
        shared: bool = False,
        stem: str = STEMS[0],
    ) -> None:
        """Plan the files; nothing is written yet.

        Args:
            directory: an existing directory.
            table: name -> shape, in the order of the files.
            dtype: dtype of all tensors.
            shard_bytes: largest size of the tensors of a file. A single file is named
                `model.safetensors` and has no index.
            dtypes: of single tensors, in place of `dtype`.
            shared: whether several processes write to the files at the same time.
            stem: what stands in place of `model` in the names of the files.
        """
        # NFS extends a write to whole pages of its cache, and so writes stale bytes of neighbours
        # that another host has written. It does not for files that are opened with O_DSYNC.
        self._flags = os.O_RDWR | (os.O_DSYNC if shared else 0)
        self._directory, self._table, self._stem = directory, dict(table), stem
        self._dtypes = {**dict.fromkeys(table, np.dtype(dtype)), **(dtypes or {})}
        sizes = {
            name: math.prod(shape) * self._dtypes[name].itemsize for name, shape in table.items()
        }
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in sizes.items():
            # a tensor larger than the bound gets a file of its own
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        count = len(shards)
        names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        # Wide numbers first, as safetensors writes them: each tensor begins at a multiple of its
        # item size, which readers of mapped memory rely on.
        aligned = [sorted(shard, key=lambda name: -self._dtypes[name].itemsize) for shard in shards]
        self._shards = dict(
            zip([f"{stem}.safetensors"] if count == 1 else names, aligned, strict=True)
        )
        self._headers: dict[str, bytes] = {}
        self._locations: dict[str, _Location] = {}
        for file, tensors in self._shards.items():
            header = self._headers[file] = self._header(tensors, sizes)
            start = len(header)
            for name in tensors:
                self._locations[name] = _Location(file, start, sizes[name])
                start += sizes[name]
        # absolute positions, so that writers need no header
        self.bytes = sum(sizes.values())
        self._handles: dict[str, int] = {}
        # `_lock` guards handles and counters, `_flushing` is held while a flush is in progress
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._unflushed = 0

    def _header(self, tensors: list[str], sizes: Mapping[str, int]) -> bytes:
        header: Json = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in tensors:
            offsets = [end, end := end + sizes[name]]
            header[name] = {
                "dtype": _NAMES[self._dtypes[name]],
                "shape": list(self._table[name]),
                "data_offsets": offsets,
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligned, so that tensors can be memory-mapped
        return len(text).to_bytes(8, "little") + text

    @property
    def names(self) -> tuple[str, ...]:
        """The files, without the index."""
        return tuple(self._shards)

    def create(self) -> None:
        """Write headers and index, and reserve the space of the tensors.

        Raises:
            UserError: the disk has not enough space.
        """
        # headers first: readers and other processes find a valid layout from the start
        for name, header in self._headers.items():
            size = len(header) + sum(self._locations[tensor].size for tensor in self._shards[name])
            path = self._directory / name
            with path.open("wb") as file:
                file.write(header)
                file.flush()
                _reserve(file.fileno(), size, path)
        # the index is what makes shards one model; a single file needs none
        if len(self._shards) > 1:
            weight_map = {name: self._locations[name].file for name in self._table}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            path = self._directory / f"{self._stem}.safetensors.index.json"
            atomic.write_text(path, json.dumps(index, indent=2) + "\n")

    def exist(self) -> bool:
        """Return whether this process sees all files, which another one may have created."""
        return all((self._directory / name).is_file() for name in self._shards)

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """Write part of a tensor, from any thread.

        Args:
            name: name of the tensor.
            start: first byte within the tensor.
            data: contiguous, in the dtype of the files.
        """
        location = self._locations[name]
        handle, position = self._handle(location.file), location.start + start
        view = data.reshape(-1).view(np.uint8).data
        while len(view):
            with no_space(self._directory / location.file):
                written = os.pwrite(handle, view, position)
            # a write may be partial, in particular beyond 2 GiB
            view, position = view[written:], position + written
        self._flush_early(handle, data.nbytes)

    def _flush_early(self, handle: int, size: int) -> None:
        """Start flushing now and then: a flush of everything at the end would have to wait."""
        with self._lock:
            self._unflushed += size
            if self._unflushed < _FLUSH_BYTES or self._flushing.locked():
                return
            self._unflushed = 0
            self._flushing.acquire()
        threading.Thread(target=self._flush, args=(handle,), daemon=True).start()

    def _flush(self, handle: int) -> None:
        try:
            os.fdatasync(handle)
        finally:
            self._flushing.release()

    def digest(self, name: str) -> str:
        """Return the CRC-32 of the bytes of a tensor as they are in the file, in hex."""
        location = self._locations[name]
        # read from the file and not from memory: the digest vouches for what was stored
        crc, position, end = 0, location.start, location.start + location.size
        while position < end:
            size = min(_READ_BYTES, end - position)
            chunk = os.pread(self._handle(location.file), size, position)
            if not chunk:
                break
            crc = zlib.crc32(chunk, crc)
            position += len(chunk)
        return f"{crc:08x}"

    def _handle(self, file: str) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(self._directory / file, self._flags)
            return self._handles[file]

    def __enter__(self) -> "ShardFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._flushing:  # a flush in progress needs its handle
            for handle in self._handles.values():
                if kind is None:
                    os.fsync(handle)
                os.close(handle)
            self._handles.clear()


def find_stem(directory: Path) -> str:
    """Return how the names of the weight files of a directory begin.

    Example:
        >>> find_stem(Path("nowhere"))
        'model'
    """
    # The first that is there: beside a model an adapter may lie, which its loader does not read.
    for stem in STEMS:
        if any((directory / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json")):
            return stem
    # of PyTorch a model is named otherwise, `pytorch_model.bin`
    is_model = any(directory.glob("pytorch_model*.bin*"))
    pickled = (stem for stem in STEMS[1:] if (directory / f"{stem}.bin").is_file())
    return STEMS[0] if is_model else next(pickled, STEMS[0])


def _reserve(handle: int, size: int, path: Path) -> None:
    # a full disk is an error now, not after hours of writing
    with no_space(path):
        try:
            _allocate(handle, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            # this file system cannot reserve space
            usage = os.fstatvfs(handle)
            if usage.f_bavail * usage.f_frsize < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            os.ftruncate(handle, size)


def _allocate(handle: int, size: int) -> None:
    """Reserve the space of a file, or raise `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):  # macOS
        os.posix_fallocate(handle, 0, size)
    # Not `posix_fallocate`: where a file system cannot reserve (NFS before 4.2), glibc writes a
    # byte to every page, and the system sends all of the model as zeros.
    elif libc.fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def no_space(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path.parent}: the disk is full; free some space or give another directory"
            ) from error
        raise
