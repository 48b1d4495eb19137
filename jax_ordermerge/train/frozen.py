"""The frozen base of adapters: how its tensors are stored, and how they come onto a mesh.

A quantized base is made from the files of the base at each start, one layer of a tensor at a time.
The same files give the same bits on every mesh, so a checkpoint does not hold it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jax_ordermerge import mesh as meshes
from jax_ordermerge import tree
from jax_ordermerge.arch import TensorSpec, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.errors import UserError
from jax_ordermerge.model import quantization
from jax_ordermerge.model.quantization import FORMATS, SCALE
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.spec import TrainingSpec

Stored = dict[str, jax.Array]  # the entries of a quantized weight


@dataclasses.dataclass(frozen=True)
class Storage:
    """How the tensors of a frozen base are stored.

    Attributes:
        dtype: of those that are not quantized.
        format: of the others, a name of `quantization.FORMATS`; None quantizes nothing.
        block: elements of the input axis that share a scale.
    """

    dtype: str
    format: str | None = None
    block: int = 0

    @classmethod
    def of(cls, spec: TrainingSpec) -> "Storage":
        """Return how a training stores its base.

        Example:
            >>> from jax_ordermerge import config
            >>> Storage.of(TrainingSpec(base_dtype="int8", lora=config.Lora(base_dtype="int8")))
            Storage(dtype='bfloat16', format='int8', block=64)
        """
        if spec.lora is None or not spec.lora.quantizes:
            return cls(spec.base_dtype)
        return cls(spec.model.compute_dtype, spec.base_dtype, spec.lora.block)

    def quantizes(self, spec: TensorSpec) -> bool:
        """Whether a tensor is quantized: a matrix of the layers.

        Embedding and head are not: their rows are looked up and summed over, and of large models
        they are a few hundredths. Norms and biases are small.
        """
        return self.format is not None and spec.is_hidden_matrix

    def entries(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors that hold one of the tensor table: itself, or codes and scales."""
        if not self.quantizes(spec):
            return (spec,)
        assert self.format is not None
        *outer, columns = spec.shape
        path = spec.path.removesuffix("weight")
        codes = (*outer, columns // FORMATS[self.format].per_byte)
        scales = (*outer, columns // self.block)
        return (
            dataclasses.replace(spec, path=path + self.format, shape=codes),
            dataclasses.replace(spec, path=path + SCALE, shape=scales),
        )


def abstract(table: Iterable[TensorSpec], storage: Storage, mesh: Mesh | AbstractMesh) -> tree.Tree:
    """Return a frozen base as `jax.ShapeDtypeStruct`s with their shardings.

    Args:
        table: its entries of the tensor table.
        storage: how they are stored.
        mesh: divides codes and scales as the weight.

    Raises:
        UserError: a block would be on two devices.

    Example:
        >>> spec = TensorSpec("a/weight", (4, 8), ("mlp", "embed"), "zeros", "a.weight", "mlp")
        >>> mesh = meshes.make_mesh()
        >>> leaves = abstract([spec], Storage("bfloat16", "nf4", 4), mesh)["a"]
        >>> leaves["nf4"].shape, leaves["scale"].shape
        ((4, 4), (4, 2))
    """
    table = tuple(table)
    _check_block([spec for spec in table if storage.quantizes(spec)], storage, mesh)
    by_dtype: dict[str, list[TensorSpec]] = {}
    for spec in table:
        for entry in storage.entries(spec):
            by_dtype.setdefault(_dtype(entry, storage), []).append(entry)
    flat: dict[str, jax.ShapeDtypeStruct] = {}
    for dtype, entries in by_dtype.items():
        flat |= tree.flatten(convert.abstract_tensors(entries, mesh, dtype=dtype))
    return tree.unflatten(flat)


def stored_bytes(table: Iterable[TensorSpec], storage: Storage) -> int:
    """Return the bytes of a frozen base, of all devices together.

    Example:
        >>> spec = TensorSpec("a/weight", (4, 8), ("mlp", "embed"), "zeros", "a.weight", "mlp")
        >>> [stored_bytes([spec], Storage("bfloat16", *how)) for how in ((), ("nf4", 4))]
        [64, 48]
    """
    return sum(
        math.prod(entry.shape) * np.dtype(_dtype(entry, storage)).itemsize
        for spec in table
        for entry in storage.entries(spec)
    )


def _dtype(entry: TensorSpec, storage: Storage) -> str:
    name = entry.path.split("/")[-1]
    if name == SCALE:
        return "float32"
    return FORMATS[name].dtype if name in FORMATS else storage.dtype


def _check_block(table: Sequence[TensorSpec], storage: Storage, mesh: Mesh | AbstractMesh) -> None:
    # Why not a smaller block where the mesh asks for it? The values of the base would depend on the
    # mesh, and a training may continue on another one.
    columns = {}
    for spec in table:
        axes = meshes.partition(spec.axes, spec.shape, mesh)[-1] or ()
        names = (axes,) if isinstance(axes, str) else axes
        columns[spec.path] = spec.shape[-1] // math.prod(mesh.shape[name] for name in names)
    for path, count in columns.items():
        if count % storage.block:
            fitting = math.gcd(storage.block, *columns.values())
            remedy = (
                f"set it to {fitting}" if fitting % 2 == 0 else "choose another mesh or base_dtype"
            )
            raise UserError(
                f"lora.base_block = {storage.block} does not divide the {count} inputs of"
                f" {path.removesuffix('/weight')} that are on a device; {remedy}"
            )


# ---------------------------------------------------------------------------------- arrays


def load(
    directory: str | Path, storage: Storage, mesh: Mesh, ignore: Iterable[str] = ()
) -> tree.Tree:
    """Load a base as it is stored, from its files onto the mesh.

    A layer of a quantized tensor is dense at a time, in float32 and divided over the devices.

    Args:
        directory, mesh, ignore: see `convert.load_params`.
        storage: how it is stored.

    Raises:
        UserError: see `convert.load_params` and `abstract`; or qwix is not installed.
    """
    config, read = convert.open_tensors(directory, mesh, ignore)
    table = tensor_table(config)
    arrays = tree.flatten(abstract(table, storage, mesh))
    flat: Stored = {}
    for spec in table:
        if storage.quantizes(spec):
            stored = {entry.path: arrays[entry.path] for entry in storage.entries(spec)}
            flat |= _load_quantized(read, spec, stored, storage, mesh)
        else:
            flat[spec.path] = read(spec, arrays[spec.path])
    return tree.unflatten(flat)


def _load_quantized(
    read: Callable[[TensorSpec, jax.ShapeDtypeStruct], jax.Array],
    spec: TensorSpec,
    stored: dict[str, jax.ShapeDtypeStruct],
    storage: Storage,
    mesh: Mesh,
) -> Stored:
    """Return codes and scales of all layers of a tensor, which are inserted one by one."""
    layer_specs = [
        dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:], hf_name=name)
        for name in spec.hf_names()
    ]
    places = steps.shardings(stored)
    arrays: Stored = jax.jit(
        lambda: {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in stored.items()},
        out_shardings=places,
    )()

    # donated: the arrays are filled in place
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=places)
    def insert(arrays: Stored, weight: jax.Array, layer: jax.Array) -> Stored:
        parts = _quantize(weight, layer_specs[0], storage, mesh)
        return {
            path: jax.lax.dynamic_update_index_in_dim(arrays[path], part, layer, 0)
            for path, part in parts.items()
        }

    # float32: the values do not depend on the dtype that the rest of the base is stored in
    (weight,) = jax.tree.leaves(convert.abstract_tensors(layer_specs[:1], mesh))
    for layer, layer_spec in enumerate(layer_specs):
        arrays = insert(arrays, read(layer_spec, weight), jnp.int32(layer))
    return arrays


def _quantize(weight: jax.Array, spec: TensorSpec, storage: Storage, mesh: Mesh) -> Stored:
    """Return the entries that hold a weight. Call it under `jax.jit`."""
    assert storage.format is not None
    # Each device its part, which holds whole blocks: qwix handles nf4 over one flat axis, for which
    # the compiler would gather the weight.
    place = meshes.partition(spec.axes, spec.shape, mesh)
    parts = jax.shard_map(
        functools.partial(quantization.quantize, name=storage.format, block=storage.block),
        mesh=mesh,
        in_specs=place,
        out_specs=(place, place),
        check_vma=False,
    )(weight)
    return {entry.path: part for entry, part in zip(storage.entries(spec), parts, strict=True)}


def place(
    params: tree.Tree, table: Iterable[TensorSpec], storage: Storage, mesh: Mesh
) -> tree.Tree:
    """Return a base as it is stored, from a dense one, or from one that is stored so already.

    Args:
        params: on any devices.
        table, storage, mesh: see `abstract`.
    """
    flat, stored = tree.flatten(params), abstract(table, storage, mesh)
    places = tree.flatten(steps.shardings(stored))
    dtypes = {path: leaf.dtype for path, leaf in tree.flatten(stored).items()}
    # as it is: a copy would be in memory beside it
    if all(
        path in flat
        and flat[path].dtype == dtype
        # a base in numpy has no sharding
        and getattr(flat[path], "sharding", None) == places[path]
        for path, dtype in dtypes.items()
    ):
        return params

    @functools.partial(jax.jit, out_shardings=places)
    def store(flat: Stored) -> Stored:
        arrays = dict(flat)
        for spec in table:
            if storage.quantizes(spec) and spec.path in arrays:
                arrays |= _quantize(arrays.pop(spec.path), spec, storage, mesh)
        return {path: arrays[path].astype(dtype) for path, dtype in dtypes.items()}

    return tree.unflatten(store(flat))
