"""Conversion between Hugging Face directories and parameters: rename, stack layers, cast.

There is no arithmetic and no transpose. Of several processes each reads a share of the rows of a
directory, and the devices exchange what they need. Exporting gathers one Hugging Face tensor at a
time. All processes take part in the gathering, and each writes its share of the tensors.
"""

import contextlib
import dataclasses
import functools
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_ordermerge import arch, processes, tree
from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig, TensorSpec
from jax_ordermerge.checkpoint import (
    atomic,
    exchange,
    json_files,
    placement,
    safetensors,
    shards,
    sidecar_files,
)
from jax_ordermerge.checkpoint.resolve import resolve as resolve
from jax_ordermerge.errors import UserError

WRITABLE = ("float32", "bfloat16", "float16")
_READABLE = ("float64", *WRITABLE)
_ROTARY_BUFFER = "rotary_emb.inv_freq"  # old libraries write it, every library recomputes it


def load_config(directory: str | Path, ignore: Iterable[str] = ()) -> ModelConfig:
    """Read the `config.json` of a model directory.

    The end-of-sequence tokens are the union of those in `config.json` and in
    `generation_config.json`: instruction models often name their end of turn in the latter only.

    Args:
        directory: a Hugging Face directory.
        ignore: unknown keys to ignore.

    Raises:
        UserError: the file is absent, malformed or not supported; the message names the key.
    """
    path = Path(directory) / "config.json"
    # a repository of such files is named by the habit of other tools
    if not path.is_file() and (files := sorted(path.parent.glob("*.gguf"))):
        raise UserError(f"{directory} has no config.json, but GGUF files; give one, as {files[0]}")
    raw = json_files.read_json(path)
    try:
        config = ModelConfig.from_hf(raw, ignore, str(path))
    # from_hf checks keys and ranges; a value of another JSON type fails wherever it is first used
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} has a value of the wrong type: {error}") from error
    ids = dict.fromkeys((*sidecar_files.generation_stops(directory), *config.eos_token_ids))
    return dataclasses.replace(config, eos_token_ids=tuple(ids))


def load_params(
    directory: str | Path,
    mesh: Mesh | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    members: int | None = None,
    ignore: Iterable[str] = (),
) -> tuple[ModelConfig, tree.Tree]:
    """Load a Hugging Face directory straight into (sharded) arrays.

    Args:
        directory: a directory with `config.json` and safetensors.
        mesh: where the arrays go, by the logical axes of the tensor table; None is the default
            device.
        dtype: dtype of the arrays.
        members: size of a leading axis `M` along which the model is repeated, if any.
        ignore: unknown keys of `config.json` to ignore.

    Returns:
        The config and the parameter dict.

    Raises:
        UserError: a tensor is missing, unknown or has another shape (see `check_tensors`).

    Example:
        >>> from jax_ordermerge.checkpoint.resolve import resolve
        >>> config, params = load_params(resolve("embedded:quickstart"))
        >>> params["embed"]["weight"].shape == (config.vocab_size, config.hidden_size)
        True
    """
    config, read = open_tensors(directory, mesh, ignore)
    # shardings decide which slices each process reads
    abstract = tree.flatten(abstract_params(config, mesh, members=members, dtype=dtype))
    flat = {spec.path: read(spec, abstract[spec.path]) for spec in arch.tensor_table(config)}
    return config, tree.unflatten(flat)


def open_tensors(
    directory: str | Path, mesh: Mesh | None = None, ignore: Iterable[str] = ()
) -> tuple[ModelConfig, Callable[[TensorSpec, jax.ShapeDtypeStruct], jax.Array]]:
    """Open a Hugging Face directory.

    Args:
        directory, mesh, ignore: see `load_params`.

    Returns:
        The config, and a function that reads an entry of the tensor table (or one layer of it, as
        an entry of its own) into an array of this dtype and sharding, with or without a leading
        member axis. All processes call it for the same entries.

    Raises:
        UserError: see `load_params`.
    """
    config = load_config(directory, ignore)
    # One process reads what is in front of it and maps the files; of several each reads its rows.
    together = mesh is not None and jax.process_count() > 1
    reader = safetensors.Reader(directory, read_ahead=not together)
    check_tensors(reader, config)

    def read(spec: TensorSpec, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        if together:
            return read_by_rows(reader, spec, abstract)
        members = abstract.shape[0] if len(abstract.shape) > len(spec.shape) else None
        dtype = np.dtype(abstract.dtype)
        read_part = functools.partial(_read_part, reader, spec, dtype, members)
        return placement.place(abstract, read_part)

    return config, read


def read_by_rows(
    reader: safetensors.Tensors, spec: TensorSpec, abstract: jax.ShapeDtypeStruct
) -> jax.Array:
    """Return an entry of the tensor table, each row of which one process reads; see `exchange`.

    Args:
        reader: of the model.
        spec: the entry.
        abstract: its array, on a mesh, with or without a leading member axis.
    """
    names = spec.hf_names()
    row = math.prod(spec.hf_shape[1:])

    def read(number: int, first: int, last: int) -> np.ndarray:
        # in the dtype of the file; it is rounded once, to that of the array
        out = np.empty((last - first, *spec.hf_shape[1:]), reader.info(names[number]).dtype)
        reader.read_into(names[number], first * row, out)
        return out

    return exchange.load(abstract, spec.hf_shape, read, len(names) if spec.stacked else None)


def named_dtype(directory: str | Path) -> str:
    """Return the dtype that config.json of a model names; float32 where it names none.

    Example:
        >>> from jax_ordermerge.checkpoint.resolve import resolve
        >>> named_dtype(resolve("embedded:quickstart"))
        'bfloat16'
    """
    raw = json_files.read_json(Path(directory) / "config.json")
    # transformers 5 writes `dtype`, earlier versions `torch_dtype`
    named = raw.get("dtype") or raw.get("torch_dtype")
    return named if named in WRITABLE else "float32"


def check_tensors(reader: safetensors.StoredTensors, config: ModelConfig) -> None:
    """Require exactly the tensors of a model, in the right shapes and floating point.

    Rotary buffers are ignored, and so is an output head that equals the tied embedding.

    Raises:
        UserError: a tensor is missing, unknown, misshaped, or of another dtype; the first is named.
    """
    directory, unknown = reader.directory, set(reader.names)
    for name, spec, _ in arch.hf_tensors(config):
        if name not in unknown:
            raise UserError(
                f"{directory} lacks the tensor {name}; config.json and weights must belong together"
            )
        info = reader.info(name)
        if info.shape != spec.hf_shape:
            raise UserError(
                f"{directory}: {name} has shape {info.shape}, config.json asks for {spec.hf_shape}"
            )
        # Integers are quantized weights, whose scales are other tensors.
        if info.dtype.name not in _READABLE:
            raise UserError(
                f"{directory}: {name} has dtype {info.dtype.name}; supported are"
                f" {', '.join(_READABLE)}"
            )
        unknown.remove(name)
    # a tensor that no one reads would be dropped in silence
    for name in sorted(unknown):
        if not name.endswith(_ROTARY_BUFFER) and not _is_tied_copy(reader, config, name):
            raise UserError(
                f"{directory} has the tensor {name}, which this architecture does not have; check"
                " model_type in config.json"
            )


def export(
    params: Mapping[str, object],
    config: ModelConfig,
    directory: str | Path,
    *,
    dtype: DTypeLike,
    source: str | Path | None = None,
    chat_template: str | None = None,
    card: str | None = None,
    recipe: str | None = None,
    member: int | None = None,
    shard_bytes: int = safetensors.SHARD_BYTES,
) -> None:
    """Write parameters as a Hugging Face directory, one tensor in host memory at a time.

    Args:
        params: the parameter dict, on any mesh.
        config: config of the model.
        directory: target; it must not exist or be empty.
        dtype: dtype of the files, rounded to nearest even.
        source: directory whose tokenizer files are copied.
        chat_template: text of a chat template that replaces that of the tokenizer.
        card: text of `README.md`.
        recipe: text of `merge_config.yaml`.
        member: member to write if `params` is a population (leading axis `M`).
        shard_bytes: largest size of the tensors of a file.

    Raises:
        UserError: the target is not empty; a value overflows float16; the member does not exist.
        ValueError: the parameters do not fit the config.

    Example:
        >>> import tempfile
        >>> from jax_ordermerge.checkpoint.resolve import resolve
        >>> config, params = load_params(resolve("embedded:quickstart"))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     export(params, config, f"{directory}/model", dtype="float32")
        ...     sorted(path.name for path in Path(directory, "model").iterdir())
        ['README.md', 'config.json', 'generation_config.json', 'model.safetensors']
    """
    flat = tree.flatten(params)
    _check_params(flat, config, member)
    is_first = jax.process_index() == 0
    number = processes.broadcast(secrets.randbits(31))
    partial = atomic.scratch_path(Path(directory).absolute(), number)
    shapes = {name: spec.hf_shape for name, spec, _ in arch.hf_tensors(config)}
    is_shared = jax.process_count() > 1
    files = shards.ShardFiles(partial, shapes, np.dtype(dtype), shard_bytes, shared=is_shared)
    with contextlib.ExitStack() as stack:
        # All processes must fail together, or the others would wait in the gathering.
        with processes.barrier(f"export to {directory}"):
            if is_first:
                stack.enter_context(atomic.new_directory(directory, number))
                sidecar_files.write(
                    partial,
                    config,
                    np.dtype(dtype).name,
                    tokenizer_from=source,
                    chat_template=chat_template,
                    card=card,
                    recipe=recipe,
                )
                files.create()
        # where another host does not see the directory, process 0 writes all
        writers = jax.process_count() if processes.on_all(files.exist()) else 1
        with processes.barrier(f"write {directory}"), files:
            _write_tensors(files, flat, config, np.dtype(dtype), member, writers)
        # no process may read the directory before process 0 has renamed it
        with processes.barrier(f"complete {directory}"):
            stack.close()


def abstract_params(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    members: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tree.Tree:
    """Return the parameter dict as `jax.ShapeDtypeStruct`s with their shardings.

    Args:
        config: config of the model.
        mesh: mesh of the shardings; None leaves them out.
        members: size of a leading axis `M`, if any.
        dtype: dtype of the arrays.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=4, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1
        ... )
        >>> abstract_params(config, members=3)["embed"]["weight"]
        ShapeDtypeStruct(shape=(3, 4, 2), dtype=float32)
    """
    return abstract_tensors(arch.tensor_table(config), mesh, members=members, dtype=dtype)


def abstract_tensors(
    table: Iterable[TensorSpec],
    mesh: Mesh | AbstractMesh | None = None,
    *,
    members: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tree.Tree:
    """Return the abstract arrays of a table of tensors; see `abstract_params`.

    Example:
        >>> spec = TensorSpec("a/weight", (4, 2), ("mlp", "embed"), "zeros", "a.weight", "mlp")
        >>> abstract_tensors([spec], dtype="bfloat16")
        {'a': {'weight': ShapeDtypeStruct(shape=(4, 2), dtype=bfloat16)}}
    """
    flat = {}
    for spec in table:
        shape, axes = spec.shape, spec.axes
        if members is not None:
            shape, axes = (members, *shape), ("member", *axes)
        # the only place where parameters get their shardings
        sharding = None if mesh is None else meshes.sharding(axes, shape, mesh)
        flat[spec.path] = jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)
    return tree.unflatten(flat)


def _read_part(
    reader: safetensors.Reader,
    spec: TensorSpec,
    dtype: np.dtype[Any],
    members: int | None,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Return `array[index]` of one entry of the table, reading only that part of the files."""
    lead, inner = ((), index) if members is None else (index[:1], index[1:])
    if spec.stacked:
        names = spec.hf_names()[inner[0]]
        extents = zip(inner, spec.shape, strict=True)
        shape = tuple(len(range(*part.indices(extent))) for part, extent in extents)
        # one array for all layers, filled slice by slice: no list of layers is stacked
        array = np.empty(shape, dtype)
        for layer, name in enumerate(names):
            array[layer] = reader.read_slice(name, inner[1:])
    else:
        array = np.array(reader.read_slice(spec.hf_name, inner), dtype)
    if members is not None:
        copies = len(range(*lead[0].indices(members)))
        # a view: the members of a device share one host array
        array = np.broadcast_to(array, (copies, *array.shape))
    return array


def _is_tied_copy(reader: safetensors.StoredTensors, config: ModelConfig, name: str) -> bool:
    if not config.tie_embeddings:
        return False
    # the head is not in the table of a tied model, so its name comes from the untied one
    untied = arch.tensor_table(dataclasses.replace(config, tie_embeddings=False))
    # the embedding has the same name either way
    head = next(spec for spec in untied if spec.kind == "head")
    embedding = next(spec for spec in untied if spec.kind == "embedding")
    if name != head.hf_name:
        return False
    if reader.info(name) != reader.info(embedding.hf_name) or not _same_bytes(
        reader.read(name), reader.read(embedding.hf_name)
    ):
        raise UserError(
            f"{reader.directory}: config.json ties the embeddings, but {name} differs from"
            f" {embedding.hf_name}"
        )
    return True


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    # row by row: two copies of an embedding may be gigabytes
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def _check_params(flat: Mapping[str, jax.Array], config: ModelConfig, member: int | None) -> None:
    expected = {spec.path: spec.shape for spec in arch.tensor_table(config)}
    # sorted, so that the error is the same every time
    for path in sorted(expected.keys() ^ flat.keys()):
        problem = "missing" if path in expected else "not part of it"
        raise ValueError(f"parameters do not fit the config: {path} is {problem}")
    leading = 0 if member is None else 1
    for path, shape in expected.items():
        actual = tuple(flat[path].shape)
        if actual[leading:] != shape:
            axis = " after the member axis" if leading else ""
            raise ValueError(f"parameter {path} has shape {actual}, expected {shape}{axis}")
        if member is not None and not 0 <= member < actual[0]:
            raise UserError(
                f"member {member} does not exist; the population has members 0 to {actual[0] - 1}"
            )


def _write_tensors(
    files: shards.ShardFiles,
    flat: Mapping[str, jax.Array],
    config: ModelConfig,
    dtype: np.dtype[Any],
    member: int | None,
    writers: int,
) -> None:
    """Gather all tensors, and write those of this process: tensor i by process i mod `writers`.

    All processes gather all tensors. One tensor at a time is in host memory; it is written while
    the next ones are gathered for the other processes.
    """
    tensors = list(arch.hf_tensors(config))
    if writers > 1:
        # By size, so that all have as much to write and neighbours take as long. In the order of
        # the file one of two processes would get all matrices where each has a bias.
        tensors.sort(key=lambda tensor: -math.prod(tensor[1].hf_shape))

    def write(name: str, values: np.ndarray) -> None:
        files.write(name, 0, safetensors.cast(values, dtype, name))

    with futures.ThreadPoolExecutor(1) as thread:
        pending: futures.Future[None] = thread.submit(lambda: None)
        for i, (name, spec, layer) in enumerate(tensors):
            # alone it need not wait: the rest of a large model may take minutes
            if jax.process_count() == 1 and pending.done():
                pending.result()
            array = _gather(_select(flat[spec.path], layer, member))
            # An error of several waits for the last tensor: the others gather until then.
            if i % writers == jax.process_index() and pending.exception() is None:
                pending = thread.submit(write, name, np.asarray(array))
            else:
                # gathered one after another: no queue of tensors in device memory
                array.block_until_ready()
        pending.result()


def _gather(array: jax.Array) -> jax.Array:
    """Return an array whose values this process can read."""
    if array.is_fully_addressable:
        return array
    assert isinstance(array.sharding, NamedSharding)
    replicated = array.sharding.update(spec=PartitionSpec())
    return _replicate(replicated)(array)


@functools.cache
def _replicate(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=sharding)


# one program per shape, whatever the layer and the member: both are traced
@jax.jit
def _select(array: jax.Array, layer: int | None, member: int | None) -> jax.Array:
    # the layer first: its axis is never sharded, so only the members of one layer cross devices
    if layer is not None:
        axis = 0 if member is None else 1
        array = jax.lax.dynamic_index_in_dim(array, layer, axis, keepdims=False)
    if member is not None:
        array = jax.lax.dynamic_index_in_dim(array, member, axis=0, keepdims=False)
    return array
