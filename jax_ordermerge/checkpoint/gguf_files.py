"""GGUF files, the format of llama.cpp: reading one as a Hugging Face directory, and writing one.

A file that is read becomes a directory in the user's cache, in which its tensors are dequantized.
So every reader of this package takes it, and of several processes one does the work.
"""

import collections
import functools
import glob
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from jax_ordermerge import arch, console, user_cache
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import (
    atomic,
    gguf_metadata,
    gguf_tokenizer,
    remote,
    safetensors,
    sidecar_files,
)
from jax_ordermerge.errors import UserError, first_line
from jax_ordermerge.json_types import Json

SUFFIX: Final = ".gguf"
# Types that can be written, by the names of llama.cpp and of this package.
TYPES: Final = {
    "f32": "F32",
    "float32": "F32",
    "f16": "F16",
    "float16": "F16",
    "bf16": "BF16",
    "bfloat16": "BF16",
    "q8_0": "Q8_0",
}
# `general.file_type` of the types in which matrices are written.
_FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
_FLOATS: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_RECORD: Final = "gguf.json"  # in a directory of the cache: what it was made of
# Counted up when a file is read in another way, so that directories of before are not used.
_VERSION: Final = 1

# ---------------------------------------------------------------------------------------- reading


def read_directory(path: Path) -> Path:
    """Return a Hugging Face directory of the model in a GGUF file, made once in the user's cache.

    Matrices of F16 or BF16 keep their bits. Others are dequantized to float32, which holds every
    value. Once per process a note on the standard error says which types the file has.

    Raises:
        UserError: the file is damaged, or holds something that is not supported; or the package
            `gguf` is not installed.
    """
    state = path.stat()
    return _read_directory(path.resolve(), state.st_size, state.st_mtime_ns)


@functools.cache
def _read_directory(path: Path, size: int, modified: int) -> Path:
    # a file that is replaced under its name is another model
    key = hashlib.sha256(f"{_VERSION} {path} {size} {modified}".encode()).hexdigest()[:16]
    directory = user_cache.directory().absolute() / "gguf" / f"{path.stem[:100]}-{key}"
    # one process of this machine converts, the others wait and find the directory
    with remote.exclusive(directory):
        if not directory.is_dir():
            _write_directory(path, directory)
    record = json.loads((directory / _RECORD).read_text())
    types = ", ".join(f"{count} in {name}" for name, count in record["types"].items())
    console.print_note(f"note: {path.name} has {types}; read as {record['dtype']}")
    return directory


def _write_directory(path: Path, directory: Path) -> None:
    metadata, tensors = _open(path)
    # no tensor of the model: it says which rope the config has
    factors = tensors.pop(gguf_metadata.ROPE_FACTORS, None)
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    config = gguf_metadata.read_config(
        metadata, shapes, None if factors is None else np.asarray(factors.data), str(path)
    )
    names = gguf_metadata.tensor_names(config)
    _check_tensors(shapes, config, names, path)
    dtype = _dtype_of(tensors)
    counts = collections.Counter(tensor.tensor_type.name for tensor in tensors.values())
    record = {"file": str(path), "types": dict(counts.most_common()), "dtype": dtype}

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for hf_name, name in names.items():
            weight = _values(tensors[name], f"{path}: {name}")
            heads = gguf_metadata.rotary_heads(hf_name, config)
            yield hf_name, gguf_metadata.unpermute(weight, heads) if heads else weight

    # the tokenizer apart: `safetensors.write` copies it from a directory
    with atomic.new_directory(directory) as partial, tempfile.TemporaryDirectory() as tokenizer:
        count = len(metadata.get("tokenizer.ggml.tokens", ()))
        if count > config.vocab_size:
            raise UserError(f"{path} has {count} tokens and {config.vocab_size} rows for them")
        if count:
            gguf_tokenizer.read_tokenizer(
                metadata, Path(tokenizer), config.max_position_embeddings, str(path)
            )
        else:
            console.print_note(f"note: {path.name} has no tokenizer")
        card = sidecar_files.model_card(path.stem, f"Read from `{path.name}`.", relation=None)
        safetensors.write(
            partial, read(), config=config, dtype=dtype, tokenizer_from=tokenizer, card=card
        )
        atomic.write_text(partial / _RECORD, json.dumps(record, indent=1))


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata by key, and the tensors of the library by name."""
    gguf = gguf_metadata.library()
    try:
        reader = gguf.GGUFReader(path)
        # the header's own fields are of no type
        metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
    # Of a damaged file the library reads numbers anywhere, and fails with what they lead to.
    except Exception as error:
        raise UserError(f"{path} is not a complete GGUF file: {first_line(error)}") from error
    # the library swaps the bytes of numbers, but not of blocks and of BF16
    if reader.byte_order == "S":
        raise UserError(f"{path} is big-endian, which is not supported; give a little-endian file")
    # one behind the other, as llama.cpp demands: a damaged offset would lead to another tensor
    expected = 0
    for tensor in reader.tensors:
        offset = int(tensor.data_offset - reader.data_offset)
        if offset != expected:
            raise UserError(
                f"{path} is damaged: {tensor.name} lies at byte {offset} of the data, expected"
                f" {expected}"
            )
        expected += math.ceil(tensor.n_bytes / int(reader.alignment)) * int(reader.alignment)
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _shape(tensor: Any) -> tuple[int, ...]:
    # GGUF counts the dimensions from the last
    return tuple(int(size) for size in reversed(tensor.shape))


def _check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    names: Mapping[str, str],
    path: Path,
) -> None:
    # both ways: a tensor that nothing reads would change the model in llama.cpp
    expected = {names[name]: spec.hf_shape for name, spec, _ in arch.hf_tensors(config)}
    for name in expected:
        if name not in shapes:
            raise UserError(f"{path} has no tensor {name}; it is not a complete {config.family}")
    for name, shape in shapes.items():
        if name not in expected:
            raise UserError(f"{path}: the tensor {name} is not known in a {config.family}")
        if shape != expected[name]:
            raise UserError(f"{path}: {name} has shape {shape}, expected {expected[name]}")


def _dtype_of(tensors: Mapping[str, Any]) -> str:
    """Return the dtype that holds all values of a file, the smallest of those of this package."""
    matrices = {x.tensor_type.name for x in tensors.values() if len(x.shape) > 1}
    vectors = [np.asarray(x.data) for x in tensors.values() if len(x.shape) == 1]
    dtype = _FLOATS.get(*matrices) if len(matrices) == 1 else None
    # norms are float32 in every file; those of a model in 16 bits mostly fit there, too
    with np.errstate(over="ignore"):
        if dtype is not None and all((x.astype(dtype) == x).all() for x in vectors):
            return dtype
    return "float32"


def _values(tensor: Any, label: str) -> np.ndarray:
    """Return the values of a tensor: those of 16 bits as they are, all others in float32."""
    gguf, name = gguf_metadata.library(), tensor.tensor_type.name
    if name in ("F32", "F16"):
        return np.asarray(tensor.data).reshape(_shape(tensor))
    if name == "BF16":
        data = np.ascontiguousarray(tensor.data).view(ml_dtypes.bfloat16)
        return np.asarray(data).reshape(_shape(tensor))
    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"{label} is of type {name}, which the package gguf cannot read") from error
    return np.asarray(values, np.float32).reshape(_shape(tensor))


# ---------------------------------------------------------------------------------------- writing


def check_target(path: Path) -> None:
    """Refuse a path that cannot be written as GGUF, before a model is opened.

    Raises:
        UserError: it is in a bucket, has another suffix, exists, or may not be written; or the
            package `gguf` is not installed.
    """
    if remote.address(path) is not None:
        raise UserError(f"{remote.address(path)}: a GGUF file is written to a disk; copy it there")
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: expected a file that ends in {SUFFIX}, by which it is read again")
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; give a new file")
    atomic.check_writable(path, is_file=True)
    gguf_metadata.library()


def write(
    path: Path,
    read: Callable[[str], np.ndarray],
    *,
    config: ModelConfig,
    dtype: str,
    tokenizer_from: Path | None,
    chat_template: str | None = None,
    name: str,
) -> list[str]:
    """Write a model as a GGUF file and return notes on what it could not hold.

    Matrices are written in one type, norms and biases in F32, as llama.cpp's own converter does.

    Args:
        path: file to write; it appears under its name when it is complete.
        read: returns a tensor by its Hugging Face name.
        config: the architecture.
        dtype: one of `TYPES`.
        tokenizer_from: directory with the files of a tokenizer, if there are any.
        chat_template: text that replaces that of the tokenizer.
        name: of the model, for readers.

    Raises:
        UserError: llama.cpp does not compute this architecture or has no such tokenizer (see
            `gguf_metadata.metadata_of` and `gguf_tokenizer.tokenizer_metadata`), or a value
            overflows float16.
    """
    gguf, kind = gguf_metadata.library(), TYPES[dtype]
    architecture = gguf_metadata.architecture(config.family)
    keys, notes = _keys(config, tokenizer_from, chat_template)
    stored = gguf_metadata.tensor_names(config)
    types = {hf: _type_of(kind, spec.hf_shape) for hf, spec, _ in arch.hf_tensors(config)}
    fallback = [hf for hf, type_ in types.items() if kind == "Q8_0" and type_ == "F16"]
    if fallback:
        notes.append(f"{len(fallback)} tensors in F16: their rows are no multiple of 32 long")
    # llama.cpp has no keys for this rope: it reads the factors as a tensor
    factors = None
    if config.rope.kind == "llama3":
        factors = gguf_metadata.rope_factors(config.rope, config.head_dim)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a killed process could not remove its file, which is as large as the model
    for abandoned in path.parent.glob(f"{glob.escape(path.name)}.partial-" + "[0-9a-f]" * 8):
        abandoned.unlink()
    partial = atomic.scratch_path(path)
    writer = gguf.GGUFWriter(partial, architecture.name)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in keys.items():
            _add(writer, key, value)
        # sizes first, bytes later: the header lists all tensors, and one at a time is in memory
        if factors is not None:
            _announce(writer, gguf_metadata.ROPE_FACTORS, factors.shape, "F32")
        for hf, spec, _ in arch.hf_tensors(config):
            _announce(writer, stored[hf], spec.hf_shape, types[hf])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        # in the order in which they were announced: the writer has no other way to tell them apart
        for hf, type_ in types.items():
            heads = gguf_metadata.rotary_heads(hf, config)
            weight = gguf_metadata.permute(read(hf), heads) if heads else read(hf)
            writer.write_tensor_data(_encode(weight, type_, hf))
        # on the disk before the rename, as a loss of power would leave an empty file
        atomic.sync(writer.fout[0])
        writer.close()
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return notes


def _keys(
    config: ModelConfig, tokenizer_from: Path | None, chat_template: str | None
) -> tuple[Json, list[str]]:
    keys = gguf_metadata.metadata_of(config)
    if tokenizer_from is None or not sidecar_files.has_tokenizer(tokenizer_from):
        return keys | gguf_tokenizer.no_tokenizer(config), ["the file has no tokenizer"]
    # as a directory would have it: with the chat template of the training, without its marks
    with tempfile.TemporaryDirectory() as directory:
        sidecar_files.copy_tokenizer(tokenizer_from, Path(directory), chat_template)
        try:
            tokenizer, notes = gguf_tokenizer.tokenizer_metadata(Path(directory), config)
        except UserError as error:
            # the user knows the file that was copied, not the copy
            raise UserError(str(error).replace(directory, str(tokenizer_from))) from error
    return keys | tokenizer, notes


def _type_of(kind: str, shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return "F32"
    # a block is 32 elements of a row
    return "F16" if kind == "Q8_0" and shape[-1] % 32 else kind


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key in the type in which llama.cpp reads it."""
    # first, since a bool is an int in Python
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _announce(writer: Any, name: str, shape: tuple[int, ...], type_: str) -> None:
    gguf = gguf_metadata.library()
    kind = gguf.GGMLQuantizationType[type_]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # bytes in the file, where a block of a quantized type is shorter than its elements
    count = int(np.prod(shape)) // block * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=kind)


def _encode(weight: np.ndarray, type_: str, name: str) -> np.ndarray:
    """Return the bytes of a tensor in a type of GGUF."""
    if type_ in _FLOATS:
        return safetensors.cast(weight, _FLOATS[type_], name)
    gguf = gguf_metadata.library()
    encoded = gguf.quantize(weight.astype(np.float32), gguf.GGMLQuantizationType[type_])
    return np.asarray(encoded)
