"""Safetensors: a lazy reader that verifies headers, and a streaming writer of HF directories.

`shards` describes the format. The library is not used: its numpy writer takes all tensors at once
and silently corrupts arrays that are not contiguous, and its reader accepts contradictory headers.
"""

import dataclasses
import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from jax_ordermerge import arch
from jax_ordermerge.checkpoint import atomic, json_files, shards, sidecar_files
from jax_ordermerge.checkpoint.shards import DTYPES, SHARD_BYTES
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonValue

_MAX_HEADER = 100_000_000  # bytes, a rule of the format


class TensorInfo(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class Tensors(Protocol):
    """A model whose tensors can be read in parts: a `Reader`, or anything with its methods."""

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors."""

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of a tensor."""

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill an array of the tensor's dtype with its elements from row-major index `start` on."""

    def file(self, name: str) -> Path:
        """Return where a tensor lies."""


class StoredTensors(Tensors, Protocol):
    """A model in files: a `Reader`, or a `torch_files.BinReader`.

    Attributes:
        directory: of the files.
    """

    directory: Path

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a whole; it may be a read-only view of a file."""


class Reader:
    """The tensors of a safetensors file, or of a Hugging Face directory, sharded or not.

    Opening reads and verifies all headers, but no tensor. `read` returns views of the memory-mapped
    file: pages are loaded when they are used, and the system may drop them again.

    Args:
        path: the file or the directory.
        read_ahead: whether the system may read on behind what `read_into` asks for.

    Attributes:
        directory: directory of the files.
        names: names of all tensors, in file order.

    Raises:
        UserError: one line that names the file if anything is missing, truncated or contradictory.

    Example:
        >>> import tempfile
        >>> config = arch.ModelConfig(
        ...     vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1
        ... )
        >>> target = Path(tempfile.mkdtemp()) / "model"
        >>> ones = ((name, np.ones(spec.hf_shape)) for name, spec, _ in arch.hf_tensors(config))
        >>> write(target, ones, config=config, dtype="bfloat16")
        >>> reader = Reader(target)
        >>> reader.names[0], reader.info(reader.names[0]).shape
        ('model.embed_tokens.weight', (2, 2))
        >>> reader.read("model.norm.weight").tolist()
        [1.0, 1.0]
    """

    def __init__(self, path: str | Path, *, read_ahead: bool = True) -> None:
        source = Path(path)
        self._read_ahead = read_ahead
        self.directory = source if source.is_dir() else source.parent
        if not source.exists():
            raise UserError(
                f"model {path} not found; give an existing directory or safetensors file"
            )
        # all headers now, so that a damaged shard is an error before hours of work
        self._entries: dict[str, _Entry] = (
            _open_directory(source) if source.is_dir() else _read_header(source)
        )
        self._maps: dict[Path, mmap.mmap] = {}
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in file order."""
        return tuple(self._entries)

    @property
    def config(self) -> Json:
        """The parsed `config.json` beside the tensors."""
        return json_files.read_json(self.directory / "config.json")

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of a tensor without reading it."""
        entry = self._entry(name)
        return TensorInfo(entry.dtype, entry.shape)

    def file(self, name: str) -> Path:
        """Return the file that a tensor lies in."""
        return self._entry(name).file

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of the mapped file."""
        entry = self._entry(name)
        if entry.file not in self._maps:
            with entry.file.open("rb") as file:
                self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(entry.shape, entry.dtype, self._maps[entry.file], entry.start)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return `read(name)[index]`: only the pages of that part are read from disk."""
        return self.read(name)[index]

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Read consecutive elements of a tensor into an array, from any thread.

        The file is not mapped: pages of mapped files count as memory of the process.

        Args:
            name: name of the tensor.
            start: row-major number of the first element.
            out: contiguous, of the tensor's dtype, any shape.

        Raises:
            UserError: the file ends early, so it was changed since it was opened.
        """
        entry = self._entry(name)
        # many threads read, each file is opened once
        with self._lock:
            if entry.file not in self._handles:
                handle = self._handles[entry.file] = os.open(entry.file, os.O_RDONLY)
                if not self._read_ahead and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        view = out.reshape(-1).view(np.uint8).data
        # a byte view, since preadv knows no bfloat16
        position = entry.start + start * entry.dtype.itemsize
        while len(view):
            # positional reads: threads share the handle without a common file position
            count = os.preadv(self._handles[entry.file], [view], position)
            if not count:
                raise UserError(
                    f"{entry.file} ends within {name}; it was changed while it was read"
                )
            view, position = view[count:], position + count

    # a default argument, because at the end of the interpreter `os` may be gone
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for handle in getattr(self, "_handles", {}).values():
            close(handle)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UserError(
                f"{self.directory} has no tensor {name}; it is not a complete model of this"
                " architecture"
            )
        return self._entries[name]


def _open_directory(directory: Path) -> dict[str, _Entry]:
    single = directory / f"{shards.find_stem(directory)}.safetensors"
    index = directory / f"{single.name}.index.json"
    if not index.is_file():
        if single.is_file():
            return _read_header(single)
        raise _printable_error(
            f"{directory} has neither {single.name} nor {index.name}:"
            f" {_describe_weights(directory)}"
        )
    entries: dict[str, _Entry] = {}
    # Sorted by shard, so that a reader of all tensors goes through each file once.
    for file, names in read_index(single, index).items():
        shard = _read_header(directory / file)
        check_shard(index, file, names, shard)
        entries |= shard
    return entries


def read_index(single: Path, index: Path) -> dict[str, set[str]]:
    """Return the names of tensors that an index places in each file, sorted by file.

    Args:
        single: the file of a model that has no shards, which must be absent.
        index: JSON file beside the shards.

    Raises:
        UserError: the index is not valid, contradicts `single`, or names a file that is absent.
    """
    weight_map = json_files.read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise UserError(f"{index}: weight_map must name the file of each tensor")
    indexed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        indexed.setdefault(file, set()).add(name)
    # A directory that was written twice, say. Either choice could be the wrong model.
    if single.is_file() and list(indexed) != [single.name]:
        raise UserError(
            f"{index.parent} has both {single.name} and an index with shards; engines read it"
            " differently, remove one of them"
        )
    # an index from elsewhere must not make this process read outside of the directory
    for file in sorted(indexed):
        if Path(file).name != file:
            raise _printable_error(
                f"{index}: '{file}' is not the plain name of a file beside the index"
            )
        # unlike Path.is_file, this is False, not an error, for names that no file can have
        if not os.path.isfile(index.parent / file):
            raise _printable_error(
                f"{index} names the shard {file}, which is absent; download or copy it again"
            )
    return dict(sorted(indexed.items()))


def check_shard(index: Path, file: str, indexed: set[str], stored: Collection[str]) -> None:
    """Refuse a shard whose tensors are not those that the index places there.

    Raises:
        UserError: they differ; the message names the first that does.
    """
    for name in sorted(indexed.symmetric_difference(stored)):
        where = "is not in it" if name in indexed else "is not placed there by the index"
        raise _printable_error(f"{index} and {file} disagree: {name} {where}")


def _describe_weights(directory: Path) -> str:
    """Return what weights a directory has under names that are not expected."""
    suffixes = (".safetensors", ".bin", ".pth", ".gguf")
    names = sorted(path.name for path in directory.iterdir() if path.suffix in suffixes)
    if not names:
        # a model on the hub is downloaded without its .bin files
        return "it has no safetensors; if its weights are .bin files, see --allow-bin"
    if all(name.endswith(".bin") for name in names):
        return (
            f"it has {', '.join(names[:3])}; ordermerge convert MODEL OUT --allow-bin makes"
            " safetensors of them"
        )
    is_one = len(names) == 1 and names[0].endswith(suffixes[0])
    remedy = "rename it" if is_one else "convert to safetensors, or restore the index"
    return f"it has {', '.join(names[:3])}; {remedy}"


def _read_header(path: Path) -> dict[str, _Entry]:
    """Read and verify the header of a file."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise _printable_error(
                    f"{path} is truncated or not a safetensors file (header of {length} bytes in a"
                    f" file of {size})"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    try:
        # decoded here: json takes bytes for UTF-16 if they look like it
        header = json.loads(text.decode(), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _printable_error(f"{path} has a header that is not valid JSON: {reason}") from error
    if not isinstance(header, dict):
        raise _printable_error(f"{path} has a header that is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _printable_error(f"{path}: __metadata__ must map strings to strings")
    entries = [(name, *_check_entry(path, name, raw)) for name, raw in header.items()]
    # Sorted by offsets, adjacent tensors must touch: no byte may belong to two tensors, or to none.
    # The format demands it, so that no data can hide in a file.
    entries.sort(key=lambda entry: entry[3:])
    end, available = 0, size - 8 - length
    for name, _, _, begin, stop in entries:
        if begin != end:
            raise _printable_error(
                f"{path}: {name} begins at byte {begin} of the data, expected {end}; the tensors"
                " overlap or leave a gap"
            )
        end = stop
    if end != available:
        problem = "is truncated" if end > available else "has bytes after the last tensor"
        raise _printable_error(
            f"{path} {problem}: {end} bytes of tensors expected, {available} present; copy it again"
        )
    return {
        name: _Entry(path, dtype, shape, 8 + length + begin)
        for name, dtype, shape, begin, _ in entries
    }


def _refuse_duplicates(pairs: Sequence[tuple[str, JsonValue]]) -> Json:
    entries: Json = {}
    for key, value in pairs:
        key.encode()  # a ValueError for half a surrogate pair, which cannot be printed
        if key in entries:
            raise ValueError(f"{key} occurs twice")
        entries[key] = value
    return entries


def _check_entry(
    path: Path, name: str, raw: object
) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Return dtype, shape, begin and end of a tensor from its entry in a header."""
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise _printable_error(
            f"{path}: the entry of {name} must have exactly dtype, shape and data_offsets"
        )
    code, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise _printable_error(
            f"{path}: {name} has dtype {code!r}, which is not supported"
            f" (supported: {', '.join(DTYPES)})"
        )
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _printable_error(
            f"{path}: {name} has shape {shape!r} and data_offsets {offsets!r}; both must be lists"
            " of numbers from 0"
        )
    dtype = DTYPES[code]
    # Numpy takes 32 axes (64 since 2.0) and sizes of int64. A zero counts as one here: numpy checks
    # the product of the other extents even if the array is empty.
    if len(shape) > 32 or math.prod(max(extent, 1) for extent in shape) * dtype.itemsize >= 2**63:
        raise _printable_error(f"{path}: {name} has shape {shape}, which no array can have")
    size = math.prod(shape) * dtype.itemsize
    begin, end = offsets
    if end - begin != size:
        raise _printable_error(
            f"{path}: {name} {code}{shape} needs {size} bytes, its data_offsets {offsets} are wrong"
        )
    return dtype, tuple(shape), begin, end


def _printable_error(message: str) -> UserError:
    """Return an error of one printable line: names come from the file and may hold anything."""
    # cut first: a header may hold names of many megabytes
    line = " ".join(message[:4000].split())
    return UserError("".join(c if c.isprintable() else "?" for c in line)[:500])


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def write(
    directory: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    config: arch.ModelConfig,
    dtype: DTypeLike,
    tokenizer_from: str | Path | None = None,
    chat_template: str | None = None,
    card: str | None = None,
    recipe: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory that appears under its name only when it is complete.

    Files and offsets are planned from the tensor table, so tensors may come in any order and only
    one is in memory at a time. A tensor of another dtype is cast, rounding to nearest even.

    Args:
        directory: target; it must not exist or be empty.
        tensors: `(hf_name, array)`, every tensor of the model exactly once.
        config: written as `config.json` and `generation_config.json`.
        dtype: dtype of all tensors in the files.
        tokenizer_from: directory whose tokenizer files are copied, if it has any.
        chat_template: text of a chat template that replaces that of the tokenizer.
        card: text of `README.md`, by default `sidecar_files.model_card()`.
        recipe: text of `merge_config.yaml`, if any.
        shard_bytes: largest size of the tensors of a file. A single file is named
            `model.safetensors` and has no index.

    Raises:
        UserError: the target is not empty, or a value overflows float16.
        ValueError: a tensor is missing, unknown, a duplicate, or has another shape.
    """
    target_dtype = np.dtype(dtype)
    table = {name: spec.hf_shape for name, spec, _ in arch.hf_tensors(config)}
    with atomic.new_directory(directory) as partial:
        sidecar_files.write(
            partial,
            config,
            target_dtype.name,
            tokenizer_from=tokenizer_from,
            chat_template=chat_template,
            card=card,
            recipe=recipe,
        )
        with shards.ShardFiles(partial, table, target_dtype, shard_bytes) as files:
            files.create()
            # a dict keeps the order, so that the error names the first missing tensor
            missing = dict.fromkeys(table)
            for name, array in tensors:
                if name not in missing:
                    problem = "given twice" if name in table else "not part of the model"
                    raise ValueError(f"tensor {name} is {problem}")
                if array.shape != table[name]:
                    raise ValueError(
                        f"tensor {name} has shape {array.shape}, expected {table[name]}"
                    )
                del missing[name]
                files.write(name, 0, cast(array, target_dtype, name))
                del array  # the iterator makes the next one: never two in memory
            if missing:
                raise ValueError(
                    f"tensor {next(iter(missing))} was not given ({len(missing)} of {len(table)}"
                    " are missing)"
                )


def is_finite(array: np.ndarray) -> bool:
    """Return whether an array has neither NaN nor infinities.

    Args:
        array: contiguous, float32, float16 or bfloat16.

    Example:
        >>> is_finite(np.ones(3, "float16")), is_finite(np.array([1, -np.inf], np.float32))
        (True, False)
    """
    # As integers, NaN and infinities are above all finite numbers of their sign, and the negative
    # numbers above the positive ones if unsigned, below if signed. Two maxima tell both apart,
    # which is several times as fast as `np.isfinite` of bfloat16.
    if not array.size:
        return True
    width = array.dtype.itemsize * 8
    limit = np.array([np.inf, -np.inf], array.dtype).view(f"uint{width}")
    positive = array.reshape(-1).view(f"int{width}").max()
    negative = array.reshape(-1).view(f"uint{width}").max()
    return bool(positive < int(limit[0]) and negative < int(limit[1]))


def cast(array: np.ndarray, dtype: DTypeLike, name: str = "an array") -> np.ndarray:
    """Return an array in a dtype, rounded to nearest even, and in C order.

    Raises:
        UserError: a finite value is too large for float16.

    Example:
        >>> cast(np.array([1.00390625, 1.01171875], np.float32), "bfloat16").tolist()
        [1.0, 1.015625]
    """
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array, np.dtype(dtype))
    # only float16 has a smaller range than float32
    if result.dtype == np.float16 and array.dtype != np.float16:
        infinite = np.isinf(result)
        if infinite.any() and np.isfinite(array[infinite]).any():
            raise UserError(
                f"{name} has values that overflow float16; choose dtype bfloat16 or float32"
            )
    return result
