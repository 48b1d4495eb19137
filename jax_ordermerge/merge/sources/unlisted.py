"""Checkpoints of any architecture, and adapters: what is in them is read from their own headers."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jax_ordermerge.arch import UnlistedConfig, unlisted
from jax_ordermerge.checkpoint import json_files, other_files, shards, torch_files
from jax_ordermerge.checkpoint.safetensors import TensorInfo
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.merge.sources import storage
from jax_ordermerge.merge.sources.storage import AnySource

_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
# Parts of a quantized weight, as GPTQ, AWQ, bitsandbytes, compressed-tensors and FP8 name them.
_QUANTIZED_PARTS = (
    "qweight",
    "qzeros",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "absmax",
    "quant_map",
    "SCB",
)
_UNQUANTIZED = (
    "merge the models before they were quantized, or dequantize them first (transformers:"
    " model.dequantize().save_pretrained(DIRECTORY))"
)


class Unlisted:
    """Weights of any architecture. Opening them checks all headers.

    Args:
        path: a directory, or a single safetensors file, of which nothing else is known.
        label: what the user called it.
        allow_bin: read `.bin` files of PyTorch where there are no safetensors.

    Attributes:
        names: of all tensors, in file order.
        stacks: the stacks of layers, with their numbers of layers.

    Raises:
        UserError: there are no weights, they are quantized, or a file is damaged.
    """

    export_dtype = None

    def __init__(self, path: Path, label: str, *, allow_bin: bool = False) -> None:
        # names, shapes and dtypes are in the headers: no tensor is read before the plan is checked
        file = _find_pickle(path) or path
        self._tensors = torch_files.open_tensors(file, allow_bin=allow_bin)
        self.label, self.directory = label, path if path.is_dir() else None
        # runs train models of the table alone, so none of these says how it was asked
        self.prompt_format = PromptFormat()
        self.names = tuple(self._tensors.names)
        shapes = {name: self._tensors.info(name).shape for name in self.names}
        self.stacks = unlisted.find_stacks(self.names)
        self.config = _read_config(self.directory, shapes, self.stacks)
        self.info, self.read_into = self._tensors.info, self._tensors.read_into
        _refuse_quantized(self)

    def identity(self) -> str:
        """See `AnySource.identity`."""
        return storage.files_identity(self._tensors)

    def file_notes(self) -> list[str]:
        """Return a note on weight files that are not read: a loader would not read them either."""
        if self.directory is None:
            return [f"{self.label}: metadata in its header, if any, is not carried over"]
        read = {self._tensors.file(name).name for name in self.names}
        unread = sorted(
            path.name
            for path in self.directory.iterdir()
            if path.is_file() and other_files.is_weights(path) and path.name not in read
        )
        # written by trainers, and no weights; an index has none of its own
        unread = [
            name for name in unread if name != "training_args.bin" and not name.endswith(".json")
        ]
        if not unread:
            return []
        rest = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        return [f"{self.label}: not read beside {min(read)}: {', '.join(unread[:3])}{rest}"]


class NamedVocabulary:
    """A model of any architecture of which the user names the tensors with one row per token.

    Args:
        inner: the model.
        names: of the tensors.

    Raises:
        UserError: the model has no such tensor, or they differ in their numbers of rows.
    """

    def __init__(self, inner: AnySource, names: Iterable[str]) -> None:
        names = tuple(names)
        # a scalar has no rows, so 0: one mapping of rows must serve all of the tensors
        rows = {name: (*inner.info(name).shape, 0)[0] for name in names}
        if len(set(rows.values())) > 1 or not all(rows.values()):
            listed = ", ".join(f"{name} has {count}" for name, count in rows.items())
            raise UserError(f"{inner.label}: embedding: expected equal numbers of rows; {listed}")
        assert isinstance(inner.config, UnlistedConfig)
        self.config = dataclasses.replace(inner.config, vocab_size=rows[names[0]], vocabulary=names)
        self.label, self.directory = inner.label, inner.directory
        self.prompt_format, self.export_dtype = inner.prompt_format, inner.export_dtype
        self.info, self.read_into, self.identity = inner.info, inner.read_into, inner.identity


def open_directory(
    directory: Path, label: str, ignore: Iterable[str], *, allow_bin: bool
) -> AnySource:
    """Open a directory as what it is: of the table, or of any other architecture.

    Raises:
        UserError: see `storage.Directory` and `Unlisted`.
    """
    # its parts have files of the same name, which one directory cannot hold
    if (directory / "model_index.json").is_file():
        parts = sorted(path.parent.name for path in directory.glob("*/config.json"))
        raise UserError(
            f"{label} is a pipeline of several models; merge each by itself, e.g."
            f" {label}/{parts[0] if parts else 'unet'}"
        )
    path = directory / _CONFIG
    if path.is_file() and unlisted.is_listed(json_files.read_json(path)):
        return storage.Directory(directory, label, ignore, allow_bin=allow_bin)
    # What has neither a config nor weights is no model at all; `Directory` says what is missing.
    stem = shards.find_stem(directory)
    has_weights = any(directory.glob(f"{stem}*.safetensors*")) or _find_pickle(directory)
    if not path.is_file() and not has_weights:
        return storage.Directory(directory, label, ignore, allow_bin=allow_bin)
    if ignored := ", ".join(ignore):
        raise UserError(
            f"ignored keys {ignored}: {label} is of an architecture whose config.json is taken as"
            " it is, unknown keys too; leave the option out"
        )
    return Unlisted(directory, label, allow_bin=allow_bin)


def _find_pickle(directory: Path) -> Path | None:
    """Return the `.bin` file of an adapter or a part of a diffusion model; None if it has another.

    `torch_files` finds that of a model itself.
    """
    if not directory.is_dir() or any(directory.glob("*.safetensors*")):
        return None
    stem = shards.find_stem(directory)
    file = directory / f"{stem}.bin"
    # `model.bin` is of CTranslate2, and no pickle
    return file if stem != shards.STEMS[0] and file.is_file() else None


def _read_config(
    directory: Path | None, shapes: Mapping[str, tuple[int, ...]], stacks: Mapping[str, int]
) -> UnlistedConfig:
    stem = shards.STEMS[0] if directory is None else shards.find_stem(directory)
    file = _ADAPTER_CONFIG if stem == "adapter_model" else _CONFIG
    content: Json = {}
    # without a config too: weights alone can be averaged, and a loader may know what they are
    if directory is not None and (directory / file).is_file():
        content = json_files.read_json(directory / file)
    vocabulary = unlisted.find_vocabulary(shapes, content, stacks)
    # several sections may have a vocabulary: the rows of the first tensor, which is the embedding
    size = shapes[vocabulary[0]][0] if vocabulary else 0
    vocabulary = tuple(name for name in vocabulary if shapes[name][0] == size)
    return UnlistedConfig(file, content, stem, size, vocabulary)


def _refuse_quantized(model: Unlisted) -> None:
    """Refuse weights that are codes and not numbers: arithmetic on codes has no meaning."""
    # first by the config, which says more than names and dtypes: 4 bits may be packed in int32
    settings = model.config.content.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        raise UserError(
            f"{model.label} is quantized ({model.config.file}: quantization_config"
            f"{f', {method}' if method else ''}); {_UNQUANTIZED}"
        )
    for name in model.names:
        dtype, shape = model.info(name)
        is_float8 = dtype.name.startswith("float8")
        # int8 and uint8 hold codes; buffers such as position_ids are int64, masks are bool
        are_codes = dtype.name in ("int8", "uint8") and len(shape) > 1
        if is_float8 or are_codes or name.split(".")[-1] in _QUANTIZED_PARTS:
            raise UserError(
                f"{model.label}: {name} is quantized (stored in {dtype.name}); {_UNQUANTIZED}"
            )


def is_float(info: TensorInfo) -> bool:
    """Return whether a tensor is merged; others, of integers and truth values, are copied.

    Example:
        >>> is_float(TensorInfo(np.dtype(np.int64), (2,)))
        False
    """
    # float8 is refused where a model is opened; complex numbers have no sign to elect
    return info.dtype.name in ("float64", "float32", "float16", "bfloat16")


def bytes_differ(first: AnySource, second: AnySource, name: str, partner_name: str) -> bool:
    """Return whether two tensors of one dtype and shape differ in their bytes.

    Args:
        first, second: the models.
        name, partner_name: of the tensors, in the first and in the second.
    """
    dtype, shape = first.info(name)
    size = math.prod(shape)
    step = 1 << 20  # elements: a tensor may be larger than the memory
    for start in range(0, size, step):
        count = min(step, size - start)
        a, b = np.empty(count, dtype), np.empty(count, dtype)
        first.read_into(name, start, a)
        second.read_into(partner_name, start, b)
        if a.tobytes() != b.tobytes():
            return True
    return False
