"""Weights in `.bin` files of PyTorch, read on request as those of safetensors are.

A `.bin` file is a pickle, which may run any code when it is loaded. PyTorch reads it with
`weights_only`, which builds tensors and nothing else. PyTorch is no dependency of this package: it
is imported when such a file is read.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_ordermerge.checkpoint import safetensors
from jax_ordermerge.checkpoint.safetensors import StoredTensors, TensorInfo
from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Earlier releases can be made to run code in spite of `weights_only` (CVE-2025-32434).
_MIN_TORCH = (2, 6)


def open_tensors(path: Path, *, allow_bin: bool = False) -> StoredTensors:
    """Open the weights of a model or adapter: a directory or one file.

    Args:
        path: a directory; or a safetensors or `.bin` file.
        allow_bin: read `.bin` files, of a directory where it has no safetensors.

    Raises:
        UserError: there are no such weights, or they cannot be read.
    """
    has_bin = path.suffix == ".bin" and path.is_file()
    # a directory with both is read as safetensors, which hold no code
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        has_bin = any((path / name).is_file() for name in (SINGLE, INDEX))
    if not has_bin:
        return safetensors.Reader(path)
    if not allow_bin:
        name = path if path.is_file() else next(iter(sorted(path.glob(f"{SINGLE}*"))))
        raise UserError(
            f"{name} is a pickle of PyTorch, which can hold code; --allow-bin reads its tensors and"
            " nothing else, and ordermerge convert MODEL OUT --allow-bin makes safetensors of them"
        )
    return BinReader(path)


class BinReader:
    """The tensors of `.bin` files; see `safetensors.StoredTensors`.

    Files that PyTorch 1.6 or later wrote are memory-mapped, earlier ones are loaded.

    Args:
        path: a file, or a directory with `pytorch_model.bin` or shards and their index.

    Raises:
        UserError: PyTorch is absent or too old, a file holds anything but tensors, or it is absent,
            damaged or contradicts the index.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path if path.is_dir() else path.parent
        self._files: dict[str, Path] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for file, names in _files_of(path).items():
            tensors = _load(file)
            if names is not None:
                # a shard that lacks what the index places in it would leave a hole in the model
                safetensors.check_shard(self.directory / INDEX, file.name, names, tensors)
            self._tensors |= tensors
            self._files |= dict.fromkeys(tensors, file)
        self._infos = {name: _info(self.file(name), name, x) for name, x in self._tensors.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """See `Tensors.names`."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """See `Tensors.info`."""
        if name not in self._infos:
            raise UserError(
                f"{self.directory} has no tensor {name}; it is not a complete model of this"
                " architecture"
            )
        return self._infos[name]

    def file(self, name: str) -> Path:
        """See `Tensors.file`."""
        return self._files[name]

    def read(self, name: str) -> np.ndarray:
        """Return a tensor; a view of the mapped file where its elements lie in C order there."""
        dtype, shape = self.info(name)
        import torch

        # numpy takes no parameter of a module, and a file may hold views in another order
        tensor = self._tensors[name].detach().contiguous()
        # as integers: numpy has no bfloat16, and reads the bits of any dtype
        bits = tensor.reshape(-1).view(torch.uint8).numpy()
        return bits.view(dtype).reshape(shape)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Tensors.read_into`."""
        out.reshape(-1)[:] = self.read(name).reshape(-1)[start : start + out.size]


def _files_of(path: Path) -> Mapping[Path, set[str] | None]:
    """Return the files of a model, and the names that an index places in each."""
    if path.is_file():
        return {path: None}
    single, index = path / SINGLE, path / INDEX
    if not index.is_file():
        return {single: None}
    return {path / file: names for file, names in safetensors.read_index(single, index).items()}


def _load(path: Path) -> dict[str, "torch.Tensor"]:
    """Return the tensors of one file by name, in the order of the file."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} takes PyTorch to read, which is not installed: pip install"
            " 'jax_ordermerge[bin]', or torch"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _MIN_TORCH:
        raise UserError(
            f"{path} is not read with PyTorch {torch.__version__}, whose weights_only can be made"
            f" to run code; install {'.'.join(map(str, _MIN_TORCH))} or later"
        )
    try:
        # files before PyTorch 1.6 are no zip archives, and cannot be mapped
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        # PyTorch advises to load without the protection; this message says what is wrong
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        content = foreign[1] if foreign else "what is no tensor, or is damaged"
        raise UserError(
            f"{path} is not read: it holds {content}, and only tensors are loaded from a pickle"
        ) from error
    # PyTorch raises errors of nearly any type for a file of other content
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"{path} is damaged or no file of PyTorch: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()
    ):
        raise UserError(
            f"{path} is no mapping of names to tensors, as {SINGLE} is; it may be a file of a"
            " trainer"
        )
    return dict(tensors)


def _info(path: Path, name: str, tensor: Any) -> TensorInfo:
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise UserError(f"{path}: {name} is not a plain tensor, but {tensor.type()}")
    try:
        return TensorInfo(np.dtype(dtype), tuple(tensor.shape))
    except TypeError as error:
        raise UserError(f"{path}: {name} has dtype {dtype}, which is not supported") from error
