"""The device mesh, and the table from logical axes to mesh axes.

Mesh axes from the outermost to the innermost: `order` holds members, and nothing crosses it in
training; `data` divides batches; `fsdp` divides parameters and batches; `sequence` divides the
positions of long inputs; `tensor` divides heads and the mlp. This module knows names of logical
axes only, never a model.
"""

import collections
import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import jax
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge.errors import UserError
from jax_ordermerge.mesh_shape import AXES, mesh_shape
from jax_ordermerge.tree import PyTree

# The name that jax has for memory of the host that a device reads by itself.
HOST_MEMORY: Final = "pinned_host"

# Logical axis -> mesh axes. Other logical axes are replicated.
RULES: Final[dict[str, tuple[str, ...]]] = {
    "member": ("order",),
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # An embedding table whose rows are gathered. Its vocabulary stays whole, see model/llama.py.
    "looked_up": ("tensor",),
    # rows of a batch that the devices of `fsdp` see together
    "replica": ("data",),
}


def make_mesh(
    order: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    data: int = 1,
    sequence: int = 1,
    dcn: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return a mesh with the axes `AXES`; one size may be -1 for all remaining devices.

    Devices of one TPU slice, or of one node of GPUs, stay together on the inner parts of the axes,
    because the network between them is slower.

    Args:
        order, fsdp, tensor, data, sequence: axis sizes.
        dcn: number of slices that an axis is divided over, e.g. `{"order": 2}`; see `mesh_shape`.
        devices: the devices; by default as many of `jax.devices()` as the sizes need.

    Raises:
        UserError: the sizes do not fit the devices or the slices.

    Example:
        >>> dict(make_mesh(1, 1, 1).shape)
        {'order': 1, 'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
    """
    # Described devices (of a topology that is not here) take the same path as real ones, so that a
    # plan compiles for the mesh that a run would build.
    present = list(jax.devices() if devices is None else devices)
    requested = {"order": order, "data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    shape = mesh_shape(requested, slice_sizes(present), dcn)
    used = present[: math.prod(shape.sizes.values())]
    # Outer part of each axis: across slices; inner part: within a slice. With one slice all is
    # inner. An axis may take part of a physical axis of the torus: 8 x 8 x 8 chips are also 2 x 256
    # (`allow_split_physical_axes`).
    inner = [shape.sizes[name] // shape.across[name] for name in AXES]
    if max(shape.across.values()) == 1:
        grid = mesh_utils.create_device_mesh(inner, used, allow_split_physical_axes=True)
    else:
        across = [shape.across[name] for name in AXES]
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, across, used, allow_split_physical_axes=True
        )
    # Auto axes: the compiler inserts the collectives of `data`, `fsdp`, `sequence` and `tensor`
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_sizes(devices: Sequence[jax.Device]) -> list[int]:
    """Return the number of devices of each slice of TPUs, or node of GPUs.

    Example:
        >>> slice_sizes(jax.devices()[:4])
        [4]
    """
    # CPUs have no slices, also those of several processes
    indices = [getattr(device, "slice_index", 0) for device in devices]
    return list(collections.Counter(indices).values())


def offered_memory(devices: Sequence[jax.Device]) -> int | None:
    """Return the bytes per device that the runtime offers to this process; None on CPUs.

    Example:
        >>> offered_memory(jax.devices()) is None
        True
    """
    # of a device of this process: the others do not tell
    local = next(device for device in devices if device.process_index == jax.process_index())
    return (local.memory_stats() or {}).get("bytes_limit")


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """Return the PartitionSpec of an array with these logical axes.

    An axis whose size is not a multiple of its mesh axes is replicated. No mesh axis is used twice,
    and mesh axes of size 1 are left out.

    Example:
        >>> mesh = make_mesh(1, 2, 2, data=2)
        >>> tuple(partition(("layer", "mlp", "embed"), (2, 8, 4), mesh))
        (None, 'tensor', 'fsdp')
        >>> tuple(partition(("batch", None), (8, 3), mesh))
        (('data', 'fsdp'), None)
    """
    return _spec(axes, shape, {name: size for name, size in mesh.shape.items() if size > 1})


def _spec(axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, extent in zip(axes, shape, strict=True):
        targets = tuple(
            axis for axis in RULES.get(name or "", ()) if axis in sizes and axis not in used
        )
        # Padding an axis would change sums over it; replicating costs memory only. It happens to
        # kv heads, fewer than the devices of `tensor`, and to odd vocabularies.
        if extent % math.prod(sizes[axis] for axis in targets):
            targets = ()
        used.update(targets)
        entries.append(targets if len(targets) > 1 else targets[0] if targets else None)
    return P(*entries)


def sharding(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """Return `NamedSharding(mesh, partition(axes, shape, mesh))`.

    Example:
        >>> tuple(sharding(("embed",), (4,), make_mesh(1, 2)).spec)
        ('fsdp',)
    """
    return NamedSharding(mesh, partition(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation by logical axes under `jax.set_mesh`.

    Without a mesh it is returned unchanged. Manual axes (in a shard_map over `order`) are ignored.

    Example:
        >>> import jax.numpy as jnp
        >>> constrain(jnp.ones((2, 3)), "batch", None).shape
        (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    # within a shard_map over `order` the array is one member's, which `order` cannot divide
    sizes = {
        name: size for name, size in mesh.shape.items() if size > 1 and name not in mesh.manual_axes
    }
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, sizes))


def extent(axis: str) -> int:
    """Return the number of shards of a logical axis under `jax.set_mesh`; 1 without a mesh.

    Example:
        >>> extent("batch")
        1
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[name] for name in RULES[axis] if name not in mesh.manual_axes)


def divide(
    fn: Callable[..., jax.Array], axis: str, arguments: Sequence[int | None], result: int
) -> Callable[..., jax.Array]:
    """Return `fn` mapped over the shards of one logical axis; the other axes stay automatic.

    It is for programs that the compiler would not divide well. Call it under `jax.set_mesh`.

    Args:
        fn: a function of arrays (or trees of them).
        axis: logical axis.
        arguments: for each argument the dimension that is divided; None is replicated.
        result: the dimension of the result that is divided.

    Example:
        >>> import jax.numpy as jnp
        >>> with jax.set_mesh(make_mesh(sequence=2)):
        ...     jax.jit(divide(lambda x, y: x + y.sum(), "length", (0, None), 0))(
        ...         jnp.arange(4), jnp.ones(4, int)
        ...     ).tolist()
        [4, 5, 6, 7]
    """
    # check_vma=False here and below: jax's check of replicated outputs rejects custom gradients and
    # kernels, which it cannot see into.
    names = RULES[axis]
    specs = [P() if dim is None else P(*[None] * dim, names) for dim in (*arguments, result)]
    return jax.shard_map(
        fn, in_specs=tuple(specs[:-1]), out_specs=specs[-1], axis_names=set(names), check_vma=False
    )


def per_device(fn: Callable[..., Any], arguments: PyTree, result: PyTree) -> Callable[..., Any]:
    """Return `fn` mapped over all devices, as custom kernels need. Call it under `jax.set_mesh`.

    Args:
        fn: a function of the shards of a device.
        arguments, result: PartitionSpecs, see `partition`.

    Example:
        >>> import jax.numpy as jnp
        >>> with jax.set_mesh(make_mesh(1, 2)):
        ...     jax.jit(per_device(lambda x: x.sum(keepdims=True), (P("fsdp"),), P("fsdp")))(
        ...         jnp.arange(4)
        ...     ).tolist()
        [1, 5]
    """
    # inside the map over members `order` is manual already and must not be named again
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        fn, in_specs=arguments, out_specs=result, axis_names=names, check_vma=False
    )


def divide_batch(fn: Callable[..., Any], arguments: PyTree, result: PyTree) -> Callable[..., Any]:
    """Return `fn` mapped over the devices that divide batches; the other axes stay automatic.

    Call it under `jax.set_mesh`.

    Args:
        fn: a function of the shards of a device, which may use collectives over `data` and `fsdp`.
        arguments, result: PartitionSpecs of these axes.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = P(RULES["batch"])
        >>> with jax.set_mesh(make_mesh(1, 2)):
        ...     jax.jit(divide_batch(lambda x: x.sum(keepdims=True), (rows,), rows))(
        ...         jnp.arange(4)
        ...     ).tolist()
        [1, 5]
    """
    names = set(RULES["batch"])
    return jax.shard_map(
        fn, in_specs=arguments, out_specs=result, axis_names=names, check_vma=False
    )


def check_host_memory(mesh: Mesh, setting: str) -> None:
    """Check that the devices of a mesh read the memory of the host by themselves.

    Args:
        mesh: its devices are present.
        setting: what asks for it, as in "model.remat = offload".

    Raises:
        UserError: they do not.

    Example:
        >>> check_host_memory(make_mesh(), "model.remat = offload")
    """
    kinds = sorted(memory.kind for memory in mesh.devices.flat[0].addressable_memories())
    if HOST_MEMORY not in kinds:
        raise UserError(
            f"{setting} needs devices that read the memory of the host ({HOST_MEMORY}):"
            f" {platform(mesh)} has {', '.join(kinds)}; leave the setting out"
        )


def platform(mesh: Mesh) -> str:
    """Return the platform of the devices of a mesh, which may be described only.

    Example:
        >>> platform(make_mesh())
        'cpu'
    """
    return str(mesh.devices.flat[0].platform)


def update_members(
    fn: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]], mesh: Mesh
) -> Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Map `fn(state, inputs, shared) -> (state, outputs)` of one member over a population.

    The mesh axis `order` is manual, so nothing crosses members. The members of one device group run
    one after another. The other axes stay automatic.

    Args:
        fn: a function of one member.
        mesh: its `order` axis divides the number of members.

    Returns:
        The function of states, inputs and outputs with a leading member axis. `shared` has no
        member axis and is in memory once. Call it under `jax.jit`.

    Example:
        >>> import jax.numpy as jnp
        >>> add = update_members(lambda state, x, shared: (state + x, shared * x), make_mesh())
        >>> [out.tolist() for out in jax.jit(add)(jnp.ones(3), jnp.arange(3.0), jnp.float32(2))]
        [[1.0, 2.0, 3.0], [0.0, 2.0, 4.0]]
    """

    def local(states: PyTree, inputs: PyTree, shared: PyTree) -> tuple[PyTree, PyTree]:
        # Each member updates its part of the carry in place. `lax.map` would return the states as
        # new arrays, and hold the population twice.
        def body(states: PyTree, step: tuple[jax.Array, PyTree]) -> tuple[PyTree, PyTree]:
            index, member_inputs = step
            state = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), states
            )
            state, outputs = fn(state, member_inputs, shared)
            if platform(mesh) in ("gpu", "cuda"):
                # Gradients are products that lie transposed. XLA on GPU took their layout for the
                # carry, and wrote all states anew before the first member and after the last.
                state = jax.tree.map(_row_major, state)
            states = jax.tree.map(
                lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0), states, state
            )
            return states, outputs

        # of this device group: the members are divided over `order` already
        count = jax.tree.leaves(states)[0].shape[0]
        return jax.lax.scan(body, states, (jax.numpy.arange(count), inputs))

    # Why not `vmap`? It batches the products of all members into one, whose sums round otherwise:
    # a member would not equal the member trained alone.
    specs = P("order")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, specs, P()),
        out_specs=specs,
        axis_names={"order"},
        check_vma=False,
    )


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def update_groups(
    fn: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]], mesh: Mesh
) -> Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Map `fn(states, inputs, shared) -> (states, outputs)` of one device group over a population.

    As `update_members`, but `fn` sees all members of the device group at once, on a leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> add = update_groups(lambda states, x, shared: (states + x.sum(), x), make_mesh(2))
        >>> jax.jit(add)(jnp.zeros(4), jnp.arange(4), 0)[0].tolist()
        [1.0, 1.0, 5.0, 5.0]
    """
    specs = P("order")
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(specs, specs, P()),
        out_specs=specs,
        axis_names={"order"},
        check_vma=False,
    )


def any_member(flag: jax.Array) -> jax.Array:
    """Return whether a flag is set for any member that runs at the same time.

    Outside of `map_members` it is the flag itself. A loop whose length depends on data continues by
    this flag: its collectives over the inner axes need all devices of the mesh, so no device group
    may leave the loop early.

    Example:
        >>> import jax.numpy as jnp
        >>> jax.jit(map_members(lambda x, y: any_member(x > y), make_mesh(2)))(
        ...     jnp.arange(2), jnp.int32(0)
        ... ).tolist()
        [True, True]
    """
    if "order" not in jax.sharding.get_abstract_mesh().manual_axes:
        return flag
    # psum has no boolean form
    return jax.lax.psum(flag.astype("int32"), "order") > 0


def map_members(
    fn: Callable[[PyTree, PyTree], PyTree], mesh: Mesh | AbstractMesh
) -> Callable[[PyTree, PyTree], PyTree]:
    """Map `fn(member, shared) -> outputs` over a population; `shared` has no member axis.

    The members run as in `update_members`.

    Example:
        >>> import jax.numpy as jnp
        >>> jax.jit(map_members(lambda x, y: x + y, make_mesh()))(
        ...     jnp.arange(3.0), jnp.float32(1)
        ... ).tolist()
        [1.0, 2.0, 3.0]
    """

    def local(members: PyTree, shared: PyTree) -> PyTree:
        return jax.lax.map(lambda member: fn(member, shared), members)

    specs = (P("order"), P())
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=specs,
        out_specs=P("order"),
        axis_names={"order"},
        check_vma=False,
    )


def provide_cpu_devices(sizes: Iterable[int]) -> None:
    """Divide the CPU into as many devices as a mesh needs. Call it before any other use of jax.

    Members that each have a device train faster than one after another on all cores. Accelerators,
    and a number of CPU devices in `XLA_FLAGS`, are not changed. If jax has started already, nothing
    happens, and `make_mesh` reports the missing devices.

    Args:
        sizes: sizes of the mesh axes; -1 needs no device.

    Example:
        >>> provide_cpu_devices([1, -1])
    """
    # A user's own XLA_FLAGS win: the tests set 8 devices there for every mesh.
    wanted = math.prod(size for size in sizes if size > 0)
    if wanted > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)


def check_accelerator() -> None:
    """Refuse to run on the CPU where `JAX_PLATFORMS` names an accelerator first.

    Raises:
        UserError: the accelerator is not there, or does not start.

    Example:
        >>> check_accelerator()
    """
    # `JAX_PLATFORMS=cuda,cpu` alone is no check: jax passes over cuda without a word where it sees
    # no NVIDIA device, and the run would go on, some hundred times slower.
    platforms = os.environ.get("JAX_PLATFORMS", "")
    wanted = platforms.split(",")[0]
    if wanted in ("", "cpu"):
        return
    try:
        present = jax.devices()[0].platform
    except RuntimeError as error:  # of the start of the accelerator; no class of its own
        raise UserError(
            f"JAX_PLATFORMS={platforms}: {str(error).splitlines()[0]}; check the driver, that no"
            " other program holds the devices, and the extra (tpu, cuda, cuda12)"
        ) from error
    if present == "cpu":
        raise UserError(
            f"JAX_PLATFORMS={platforms} asks for {wanted}, but jax finds the CPU only; check the"
            " driver (nvidia-smi), that the container sees it and the extra (tpu, cuda, cuda12), or"
            " set JAX_PLATFORMS=cpu"
        )
