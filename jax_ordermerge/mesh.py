"""The device mesh, and the one table from logical to mesh axes.

Mesh axes, the outermost first: `order` holds members (no communication crosses it while training), `data` divides batches alone,
`fsdp` divides parameters and batches, `sequence` the positions of long inputs, `tensor` heads and the mlp. This file sees logical
axis names only, never a model.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge.errors import UserError

AXES = ("order", "data", "fsdp", "sequence", "tensor")

# logical axis -> mesh axes. What is not named is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "member": ("order",),
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "looked_up": ("tensor",),
}


def make_mesh(
    order: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    data: int = 1,
    sequence: int = 1,
    dcn: Mapping[str, int] | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Return a mesh with the axes `AXES`; one size may be -1 for all remaining devices.

    Devices of one slice (a TPU slice; they are connected faster than slices are) stay together on the inner parts of the axes.

    Args:
        order, fsdp, tensor, data, sequence: axis sizes.
        dcn: how many parts of which axis lie on different slices, `{"order": 2}`; one may be -1. By default `order` is divided over
            all slices: nothing crosses it while training. Of no effect on devices of one slice.
        devices: the devices to use, by default as many of `jax.devices()` as the sizes ask for.

    Raises:
        UserError: the sizes do not fit the devices or the slices.

    Example:
        >>> dict(make_mesh(1, 1, 1).shape)
        {'order': 1, 'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
    """
    present = list(jax.devices() if devices is None else devices)
    given = {"order": order, "data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    asked, sizes = _asked(given), axis_sizes(given, len(present))
    chosen = present[: math.prod(sizes.values())]
    slices = len({getattr(device, "slice_index", 0) for device in chosen})
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        # an axis may take a part of a physical axis of the torus: 8 x 8 x 8 chips are then also 2 x 256
        placed = mesh_utils.create_device_mesh(
            tuple(sizes.values()), chosen, allow_split_physical_axes=True
        )
        return Mesh(placed, AXES, axis_types=types)
    outer = _fill(
        {**dict.fromkeys(AXES, 1), **(dcn or {"order": slices})},
        slices,
        f"mesh.dcn {dict(dcn or {})}",
        "slices",
    )
    for name, factor in outer.items():
        if sizes[name] % factor:
            raise UserError(
                f"{asked}: {name} = {sizes[name]} cannot be divided over {factor} slices; change it, or say with mesh.dcn which axis can"
            )
    inner = [sizes[name] // outer[name] for name in AXES]
    across = [outer[name] for name in AXES]
    placed = mesh_utils.create_hybrid_device_mesh(
        inner, across, chosen, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=types)


def axis_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Return the sizes of the mesh axes with -1 replaced by all that remains of so many devices.

    Raises:
        UserError: the sizes do not fit the devices.

    Example:
        >>> axis_sizes({"order": 2, "fsdp": -1}, 8)
        {'order': 2, 'fsdp': 4}
    """
    return _fill(dict(sizes), devices, _asked(sizes), "devices")


def _asked(sizes: Mapping[str, int]) -> str:
    return "mesh " + ", ".join(
        f"{name}={size}" for name, size in sizes.items() if size != 1 or name == "order"
    )


def _fill(sizes: dict[str, int], present: int, asked: str, what: str) -> dict[str, int]:
    """Return the sizes with -1 replaced by all that remains of the devices (or slices)."""
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"{asked}: sizes are positive, and at most one is -1 (all remaining {what})"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if unknown:
        if present % fixed:
            raise UserError(
                f"{asked}: {present} {what} cannot be divided by {fixed}; change the sizes"
            )
        return {**sizes, unknown[0]: present // fixed}
    if fixed > present:
        raise UserError(
            f"{asked} needs {fixed} {what}, {present} are present; make an axis smaller or give -1"
        )
    return sizes


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """Return the PartitionSpec of an array with these logical axes.

    An axis whose size its mesh axes do not divide is replicated, and no mesh axis is used twice. Mesh axes of size 1 are left out.

    Example:
        >>> mesh = make_mesh(1, 2, 2, data=2)
        >>> (
        ...     tuple(partition(("layer", "mlp", "embed"), (2, 8, 4), mesh)),
        ...     tuple(partition(("batch", None), (8, 3), mesh)),
        ... )
        ((None, 'tensor', 'fsdp'), (('data', 'fsdp'), None))
    """
    return _spec(axes, shape, {name: size for name, size in mesh.shape.items() if size > 1})


def _spec(axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, extent in zip(axes, shape, strict=True):
        target = tuple(one for one in RULES.get(name or "", ()) if one in sizes and one not in used)
        if extent % math.prod(sizes[one] for one in target):
            target = ()
        used.update(target)
        entries.append(target if len(target) > 1 else target[0] if target else None)
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
    """Constrain an activation by logical axes under `jax.set_mesh`; without a mesh return it unchanged.

    Manual axes (inside a shard_map over `order`) are left alone.

    Example:
        >>> import jax.numpy as jnp
        >>> constrain(jnp.ones((2, 3)), "batch", None).shape
        (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    sizes = {
        name: size for name, size in mesh.shape.items() if size > 1 and name not in mesh.manual_axes
    }
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, sizes))


def extent(axis: str) -> int:
    """Return over how many devices a logical axis is divided under `jax.set_mesh`; 1 without a mesh.

    Example:
        >>> extent("batch")
        1
    """
    mesh = jax.sharding.get_abstract_mesh()
    return (
        1
        if mesh.empty
        else math.prod(mesh.shape[name] for name in RULES[axis] if name not in mesh.manual_axes)
    )


def divide(
    fn: Callable[..., jax.Array], axis: str, arguments: Sequence[int | None], result: int
) -> Callable[..., jax.Array]:
    """Return `fn` that sees its share of a logical axis and all of the others; outside it is called on whole arrays.

    For what the compiler would not divide well by itself. Call it under `jax.set_mesh`.

    Args:
        fn: of arrays (or trees of them).
        axis: logical axis.
        arguments: for each argument the dimension that is divided; None is given whole to everyone.
        result: the dimension of the result that is divided.

    Example:
        >>> import jax.numpy as jnp
        >>> with jax.set_mesh(make_mesh(sequence=2)):
        ...     jax.jit(divide(lambda x, y: x + y.sum(), "length", (0, None), 0))(
        ...         jnp.arange(4), jnp.ones(4, int)
        ...     ).tolist()
        [4, 5, 6, 7]
    """
    names = RULES[axis]
    specs = [P() if at is None else P(*[None] * at, names) for at in (*arguments, result)]
    return jax.shard_map(
        fn, in_specs=tuple(specs[:-1]), out_specs=specs[-1], axis_names=set(names), check_vma=False
    )


def by_hand(fn: Callable[..., Any], arguments: Any, result: Any) -> Callable[..., Any]:
    """Return `fn` that every device calls on its own parts: what kernels written by hand need. Call it under `jax.set_mesh`.

    Args:
        fn: of the parts of arrays.
        arguments, result: PartitionSpecs, see `partition`.

    Example:
        >>> import jax.numpy as jnp
        >>> with jax.set_mesh(make_mesh(1, 2)):
        ...     jax.jit(by_hand(lambda x: x.sum(keepdims=True), (P("fsdp"),), P("fsdp")))(
        ...         jnp.arange(4)
        ...     ).tolist()
        [1, 5]
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        fn, in_specs=arguments, out_specs=result, axis_names=names, check_vma=False
    )


def update_members(
    fn: Callable[[Any, Any, Any], tuple[Any, Any]], mesh: Mesh
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Turn `fn(state, inputs, shared) -> (state, outputs)` of one member into the same over a population.

    The mesh axis `order` is manual, so that nothing crosses members; those of one device group run one after another, each updating
    its part of the carried states in place (`lax.map` would hold the population twice). The inner axes stay automatic.

    Args:
        fn: of one member.
        mesh: its `order` axis divides the number of members.

    Returns:
        The function of states, inputs and outputs with a leading member axis; `shared` has none and is held once. Call it under
        `jax.jit`.

    Example:
        >>> import jax.numpy as jnp
        >>> add = update_members(lambda state, x, shared: (state + x, shared * x), make_mesh())
        >>> [out.tolist() for out in jax.jit(add)(jnp.ones(3), jnp.arange(3.0), jnp.float32(2))]
        [[1.0, 2.0, 3.0], [0.0, 2.0, 4.0]]
    """

    def local(states: Any, inputs: Any, shared: Any) -> tuple[Any, Any]:
        def body(states: Any, item: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            index, own = item
            mine = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), states
            )
            new, outputs = fn(mine, own, shared)
            return jax.tree.map(
                lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0), states, new
            ), outputs

        count = jax.tree.leaves(states)[0].shape[0]
        return jax.lax.scan(body, states, (jax.numpy.arange(count), inputs))

    specs = P("order")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, specs, P()),
        out_specs=specs,
        axis_names={"order"},
        check_vma=False,
    )


def any_member(flag: jax.Array) -> jax.Array:
    """Return whether a flag holds for any of the members that run at the same time; outside `map_members` the flag itself.

    A loop whose length depends on data goes on by this: its exchanges over the inner axes need all devices of the mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> jax.jit(map_members(lambda x, y: any_member(x > y), make_mesh(2)))(
        ...     jnp.arange(2), jnp.int32(0)
        ... ).tolist()
        [True, True]
    """
    if "order" not in jax.sharding.get_abstract_mesh().manual_axes:
        return flag
    return jax.lax.psum(flag.astype("int32"), "order") > 0


def map_members(
    fn: Callable[[Any, Any], Any], mesh: Mesh | AbstractMesh
) -> Callable[[Any, Any], Any]:
    """Turn `fn(member, shared) -> outputs` into the same over a population; `shared` has no member axis.

    Runs as `update_members` does.

    Example:
        >>> import jax.numpy as jnp
        >>> jax.jit(map_members(lambda x, y: x + y, make_mesh()))(
        ...     jnp.arange(3.0), jnp.float32(1)
        ... ).tolist()
        [1.0, 2.0, 3.0]
    """

    def local(members: Any, shared: Any) -> Any:
        return jax.lax.map(lambda one: fn(one, shared), members)

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
    """Let a machine without accelerators act as the devices a mesh asks for. Call before any other use of jax.

    Members on devices of their own train faster than one after another on all cores together. Accelerators, and a number of CPU
    devices given in `XLA_FLAGS`, are left as they are; so is a jax that has started already (`make_mesh` then says what lacks).

    Args:
        sizes: of the mesh axes; -1 asks for nothing.

    Example:
        >>> provide_cpu_devices([1, -1])
    """
    wanted = math.prod(size for size in sizes if size > 0)
    if wanted > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)


def keep_programs(directory: str) -> None:
    """Keep compiled programs in a directory, for this and every later start with the same versions and devices.

    Args:
        directory: created if absent; `~` is the home directory.

    Example:
        >>> before = jax.config.jax_compilation_cache_dir
        >>> keep_programs("compiled")
        >>> jax.config.update("jax_compilation_cache_dir", before)
    """
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", 0.0
    )  # else what compiles fast is compiled at every start
