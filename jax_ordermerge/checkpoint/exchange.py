"""Arrays that several processes read together: each row of a file once, the rest between devices.

A device may need some rows and some columns of a tensor. In a file the columns of a row lie beside
each other, so a process that reads its columns only touches every page of the tensor: of 128 hosts
each would read all of it. Here each device reads whole rows, and the devices exchange parts of
them. For a tensor [R, C] on mesh axes `a` over R, `b` over C, and `r` over neither (replicas):

    read         [R / (a r b), C]    rows divided over (a, r, b), the last axis the innermost
    all-to-all   [R / (a r), C / b]  over b
    all-gather   [R / a, C / b]      over r

Beside the array itself the shares of a few tensors are in memory.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_WAIT_EVERY = 4  # tensors that are in flight: reading goes on while earlier ones are exchanged


class Staging(NamedTuple):
    """How the rows of a tensor are divided over the mesh while they are read.

    Attributes:
        shape: of the tensor, [R, ...].
        axes: mesh axes over R, the replicas, and each further dimension, in this order.
        groups: number of parts of R in the array that is made.
        pieces: number of devices that divide such a part among themselves.
    """

    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    groups: int
    pieces: int

    @property
    def padded(self) -> int:
        """Rows per device. The last devices of a group read fewer where they do not divide it."""
        return -(-self.shape[0] // (self.groups * self.pieces))

    def rows(self, device: int) -> tuple[int, int]:
        """Return the first row that a device reads, and the one after its last.

        Args:
            device: its number along the axes of the staging.

        Example:
            >>> staging = Staging((10, 4), (("tensor",), (), ("fsdp",)), groups=2, pieces=2)
            >>> [staging.rows(device) for device in range(4)]
            [(0, 3), (3, 5), (5, 8), (8, 10)]
        """
        group, piece = divmod(device, self.pieces)
        extent = self.shape[0] // self.groups
        first, last = (min(extent, edge * self.padded) for edge in (piece, piece + 1))
        return group * extent + first, group * extent + last


def stage(shape: tuple[int, ...], spec: P, mesh: Mesh | AbstractMesh) -> Staging:
    """Return how a tensor is read that is to be divided as `spec` says.

    Args:
        shape: of the tensor.
        spec: one entry per dimension of the tensor.
        mesh: of the devices.
    """
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    divided = [
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    ]
    used = {name for names in divided for name in names}
    replicas = tuple(name for name in mesh.axis_names if name not in used)
    groups = math.prod(mesh.shape[name] for name in divided[0])
    return Staging(shape, (divided[0], replicas, *divided[1:]), groups, mesh.size // groups)


def load(
    abstract: jax.ShapeDtypeStruct,
    shape: tuple[int, ...],
    read: Callable[[int, int, int], np.ndarray],
    layers: int | None = None,
) -> jax.Array:
    """Return an array of this shape, dtype and sharding. All processes of its mesh call it.

    Each row of each tensor is read by one device. Bits are moved and not computed with: the array
    is that of `placement.place`.

    Args:
        abstract: [(M), (L), *shape] with a `NamedSharding` that does not divide L. Along M the
            same tensors are repeated.
        shape: of a tensor.
        read: takes the number of a tensor, a first row and the row after the last one, and returns
            these rows, in any dtype.
        layers: number of tensors, L; None where the array has no such axis.

    Example:
        >>> from jax_ordermerge.mesh import make_mesh, sharding
        >>> table = np.arange(32).reshape(2, 4, 4)
        >>> mesh = make_mesh(fsdp=2, tensor=2)
        >>> placed = sharding(("layer", "mlp", "embed"), table.shape, mesh)
        >>> array = load(
        ...     jax.ShapeDtypeStruct(table.shape, "float32", sharding=placed),
        ...     (4, 4),
        ...     lambda layer, first, last: table[layer, first:last],
        ...     layers=2,
        ... )
        >>> bool((np.asarray(array) == table).all())
        True
    """
    sharding = abstract.sharding
    assert isinstance(sharding, NamedSharding)
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    leading = len(abstract.shape) - len(shape)
    staging = stage(shape, P(*sharding.spec[leading:]), mesh)
    rows = NamedSharding(mesh, P(tuple(name for names in staging.axes for name in names)))
    dtype = np.dtype(abstract.dtype)
    # Unsigned integers: no backend rounds, flushes or quiets what it takes for a number.
    bits = np.dtype(f"uint{dtype.itemsize * 8}")

    def read_rows(layer: int, index: tuple[slice, ...] | None) -> np.ndarray:
        start = (index or (slice(None),))[0].start or 0
        first, last = staging.rows(start // staging.padded)
        part = np.zeros((staging.padded, *shape[1:]), dtype)
        # rounded here, as where a process reads its own part: the same bits on every mesh
        part[: last - first] = read(layer, first, last)
        return part.view(bits)

    total = (staging.padded * mesh.size, *shape[1:])
    insert = _insert_program(abstract, staging, layers is not None)
    local = sharding.shard_shape(abstract.shape)
    # zeros of the host, because a program for them would be compiled for every shape
    array: jax.Array = jax.make_array_from_callback(
        abstract.shape, sharding, lambda index: np.zeros(local, dtype), dtype=dtype
    )
    for layer in range(layers or 1):
        part = jax.make_array_from_callback(
            total, rows, functools.partial(read_rows, layer), dtype=bits
        )
        array = insert(array, part, layer)
        if layer % _WAIT_EVERY == _WAIT_EVERY - 1:
            array.block_until_ready()  # the parts that were read wait in memory until then
    return array


# One program for all tensors of a shape and sharding.
@functools.cache
def _insert_program(
    abstract: jax.ShapeDtypeStruct, staging: Staging, stacked: bool
) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Return the program that inserts a tensor, which was read by rows, into its array."""
    sharding = abstract.sharding
    assert isinstance(sharding, NamedSharding)
    shape, (_, replicas, *columns) = staging.shape, staging.axes
    layer_axis = len(abstract.shape) - len(shape) - 1

    def exchange(array: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
        # the innermost axis first: what it divides lies beside each other
        for dimension, names in reversed(list(enumerate(columns, start=1))):
            if names:
                part = jax.lax.all_to_all(part, names, dimension, 0, tiled=True)
        if replicas:
            part = jax.lax.all_gather(part, replicas, axis=0, tiled=True)
        # behind the rows is what the last devices were padded with
        part = part[: shape[0] // staging.groups]
        part = jax.lax.bitcast_convert_type(part, array.dtype)
        start = [jnp.int32(0)] * array.ndim
        target = list(array.shape)
        if stacked:
            start[layer_axis], target[layer_axis] = layer, 1
        # the members of a device are copies
        return jax.lax.dynamic_update_slice(array, jnp.broadcast_to(part, target), start)

    rows = P(tuple(name for names in staging.axes for name in names))
    insert = jax.shard_map(
        exchange,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, rows, P()),
        out_specs=sharding.spec,
        check_vma=False,
    )
    # donated: the array is filled in place
    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)
