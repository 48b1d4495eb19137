"""Hugging Face directories <-> parameters: rename, stack layers, cast. No arithmetic and no transposes.

Loading reads on each process only the slices of its own devices. Exporting gathers one Hugging Face tensor at a time; with
several processes all of them take part in the gathering, and process 0 writes.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from jax_ordermerge import arch, processes, tree
from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig, TensorSpec
from jax_ordermerge.checkpoint import atomic, placement, remote, safetensors
from jax_ordermerge.errors import UserError

_READABLE = ("float64", "float32", "float16", "bfloat16")
_BUFFER = "rotary_emb.inv_freq"  # written by old libraries, recomputed by everyone
_HUB_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "README.md",
)


def resolve(base: str, *, weights: bool = True) -> Path:
    """Return the local directory of a base model.

    Args:
        base: an existing directory, `embedded:NAME` (shipped with the package), an address (gs://, s3://) of a directory, which is
            copied here, or a hub name such as `meta-llama/Llama-2-7b-hf`, which is downloaded once (safetensors, configs and tokenizer only).
        weights: False downloads configs and tokenizer alone.

    Raises:
        UserError: nothing of that name exists, or it may not or cannot be downloaded.

    Example:
        >>> resolve("embedded:nothing")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: embedded:nothing is not shipped with this package...
    """
    if base.startswith("embedded:"):
        return _embedded(base.removeprefix("embedded:"))
    if remote.address(base) is not None:
        return remote.fetch(base, without=None if weights else "*.safetensors")
    if Path(base).expanduser().is_dir():
        return Path(base).expanduser()
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError(
            f"base model directory {base} not found; give an existing directory, a hub name or embedded:NAME"
        )
    return _download(base, _HUB_FILES if weights else _HUB_FILES[1:])


def load_config(directory: str | Path, ignore: Iterable[str] = ()) -> ModelConfig:
    """Read the `config.json` of a model directory, and the end-of-sequence tokens of its `generation_config.json`.

    Instruction models often name their end of turn only in the latter; the union of both is kept.

    Args:
        directory: a Hugging Face directory.
        ignore: unknown keys to pass over.

    Raises:
        UserError: absent, malformed or unsupported; the key is named.
    """
    path = Path(directory) / "config.json"
    raw = safetensors.read_json(path)
    try:
        config = ModelConfig.from_hf(raw, ignore)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} has a value of the wrong type: {error}") from error
    beside = Path(directory) / "generation_config.json"
    eos = safetensors.read_json(beside).get("eos_token_id") if beside.is_file() else None
    generation = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return dataclasses.replace(
        config, eos_token_ids=tuple(dict.fromkeys((*generation, *config.eos_token_ids)))
    )


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
        directory: with `config.json` and safetensors.
        mesh: where the arrays go, by the logical axes of the tensor table; None is the default device.
        dtype: of the arrays.
        members: if given, all arrays get a leading axis `M` of this size along which the model is repeated.
        ignore: unknown keys of `config.json` to pass over.

    Returns:
        The config and the parameter dict.

    Raises:
        UserError: a tensor is missing, unknown or has another shape (see `check_tensors`).
    """
    config = load_config(directory, ignore)
    reader = safetensors.Reader(directory)
    check_tensors(reader, config)
    target = np.dtype(dtype)
    abstract = tree.flatten(abstract_params(config, mesh, members=members, dtype=target))
    flat = {}
    for spec in arch.tensor_table(config):
        flat[spec.path] = placement.place(
            abstract[spec.path], functools.partial(_read_part, reader, spec, target, members)
        )
    return config, tree.unflatten(flat)


def check_tensors(reader: safetensors.Reader, config: ModelConfig) -> None:
    """Require exactly the tensors of the model, in the right shapes and floating point.

    Rotary buffers are passed over, and so is an output head equal to the tied embedding.

    Raises:
        UserError: the first tensor that is missing, unknown, misshaped, or of another dtype.
    """
    where, names = reader.directory, set(reader.names)
    for name, spec, _ in arch.hf_tensors(config):
        if name not in names:
            raise UserError(
                f"{where} lacks the tensor {name}; config.json and weights must belong together"
            )
        info = reader.info(name)
        if info.shape != spec.hf_shape:
            raise UserError(
                f"{where}: {name} has shape {info.shape}, config.json asks for {spec.hf_shape}"
            )
        if info.dtype.name not in _READABLE:
            raise UserError(
                f"{where}: {name} has dtype {info.dtype.name}; supported are {', '.join(_READABLE)}"
            )
        names.remove(name)
    for name in sorted(names):
        if not name.endswith(_BUFFER) and not _is_tied_copy(reader, config, name):
            raise UserError(
                f"{where} has the tensor {name}, which this architecture does not have; check model_type in config.json"
            )


def export(
    params: Mapping[str, Any],
    config: ModelConfig,
    directory: str | Path,
    *,
    dtype: DTypeLike,
    source: str | Path | None = None,
    card: str | None = None,
    recipe: str | None = None,
    member: int | None = None,
    shard_bytes: int = safetensors.SHARD_BYTES,
) -> None:
    """Write parameters as a Hugging Face directory, one tensor in host memory at a time.

    Args:
        params: the parameter dict, on any mesh.
        config: the model.
        directory: the target; it must not exist or be empty.
        dtype: of the tensors written, rounded to nearest even.
        source: directory whose tokenizer files are copied.
        card: text of `README.md`.
        recipe: text of `merge_config.yaml`.
        member: which member to write if `params` is a population (leading axis `M`).
        shard_bytes: largest size of a file.

    Raises:
        UserError: the target is not empty; a value overflows float16; the member does not exist.
        ValueError: the parameters do not fit the config.
    """
    flat = tree.flatten(params)
    _check_params(flat, config, member)
    with processes.barrier(f"export to {directory}"):
        if jax.process_index() == 0:
            atomic.check_vacant(directory)
    tensors = _hf_tensors(flat, config, member)
    if jax.process_index() == 0:
        safetensors.write(
            directory,
            tensors,
            config=config,
            dtype=np.dtype(dtype),
            tokenizer_from=source,
            card=card,
            recipe=recipe,
            shard_bytes=shard_bytes,
        )
    else:
        for _ in tensors:  # take part in the gathering
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"export {directory}")


def abstract_params(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    members: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tree.Tree:
    """Return the parameter dict as `jax.ShapeDtypeStruct`s with their shardings.

    Args:
        config: the model.
        mesh: None leaves the shardings out.
        members: size of a leading axis `M`, if any.
        dtype: of the arrays.

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
    """Return the dict of any table of tensors as `abstract_params` does that of a model.

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
    """Return `array[index]` of one entry of the table, reading only those parts of the files."""
    lead, inner = (index[:1], index[1:]) if members is not None else ((), index)
    if spec.stacked:
        names = spec.hf_names()[inner[0]]
        shape = tuple(
            len(range(*part.indices(extent)))
            for part, extent in zip(inner, spec.shape, strict=True)
        )
        out = np.empty(shape, dtype)
        for row, name in enumerate(names):
            out[row] = reader.read_slice(name, inner[1:])
    else:
        out = np.array(reader.read_slice(spec.hf_name, inner), dtype)
    if lead:
        out = np.broadcast_to(out, (len(range(*lead[0].indices(members or 0))), *out.shape))
    return out


def _is_tied_copy(reader: safetensors.Reader, config: ModelConfig, name: str) -> bool:
    if not config.tie_embeddings:
        return False
    untied = arch.tensor_table(dataclasses.replace(config, tie_embeddings=False))
    head = next(spec for spec in untied if spec.kind == "head")
    embedding = next(spec for spec in untied if spec.kind == "embedding")
    if name != head.hf_name:
        return False
    if reader.info(name) != reader.info(embedding.hf_name) or not _same_bytes(
        reader.read(name), reader.read(embedding.hf_name)
    ):
        raise UserError(
            f"{reader.directory}: config.json ties the embeddings, but {name} differs from {embedding.hf_name}"
        )
    return True


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    # row by row, so that two embeddings of gigabytes are never in memory at once
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def _check_params(flat: Mapping[str, Any], config: ModelConfig, member: int | None) -> None:
    expected = {spec.path: spec.shape for spec in arch.tensor_table(config)}
    wrong = sorted(expected.keys() ^ flat.keys())
    if wrong:
        raise ValueError(
            f"parameters do not fit the config: {wrong[0]} is {'missing' if wrong[0] in expected else 'not part of it'}"
        )
    for path, shape in expected.items():
        given = tuple(flat[path].shape)
        if given[0 if member is None else 1 :] != shape:
            what = "" if member is None else " after the member axis"
            raise ValueError(f"parameter {path} has shape {given}, expected {shape}{what}")
        if member is not None and not 0 <= member < given[0]:
            raise UserError(
                f"member {member} does not exist; the population has members 0 to {given[0] - 1}"
            )


def _hf_tensors(
    flat: Mapping[str, Any], config: ModelConfig, member: int | None
) -> Iterator[tuple[str, np.ndarray]]:
    for name, spec, layer in arch.hf_tensors(config):
        # bound to no name here: while the next tensor is gathered, this one is gone
        yield (
            name,
            _gather(
                _pick(
                    flat[spec.path],
                    layer,
                    member,
                    stacked=layer is not None,
                    population=member is not None,
                )
            ),
        )


def _gather(array: jax.Array) -> np.ndarray:
    return np.asarray(
        array if jax.process_count() == 1 else multihost_utils.process_allgather(array, tiled=True)
    )


@functools.partial(jax.jit, static_argnames=("stacked", "population"))
def _pick(
    array: jax.Array, layer: int | None, member: int | None, *, stacked: bool, population: bool
) -> jax.Array:
    # the layer first: it is never sharded, so at most the members of one layer cross devices
    if stacked:
        array = jax.lax.dynamic_index_in_dim(array, layer, axis=int(population), keepdims=False)
    if population:
        array = jax.lax.dynamic_index_in_dim(array, member, axis=0, keepdims=False)
    return array


def _embedded(name: str) -> Path:
    assets = importlib.resources.files("jax_ordermerge") / "assets"
    shipped = (
        sorted(item.name for item in assets.iterdir() if item.is_dir()) if assets.is_dir() else []
    )
    if name not in shipped:
        raise UserError(
            f"embedded:{name} is not shipped with this package (shipped: {', '.join(shipped) or 'none'})"
        )
    return Path(str(assets / name))


def _download(name: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=["consolidated*", "original/*"]
        )
    except errors.HFValidationError as error:
        raise UserError(
            f"base model {name} is neither an existing directory nor a valid hub name"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"base model {name} is gated: accept its licence on the hub, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"base model {name} is not on the hub (or private), and no directory of that name exists"
        ) from error
    except (OSError, errors.HTTPError) as error:  # all network failures of the hub are one of these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"base model {name} is no directory and could not be downloaded: {reason}"
        ) from error
    return Path(found)
