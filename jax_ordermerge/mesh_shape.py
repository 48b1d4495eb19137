"""Sizes of the mesh axes, and how they lie over slices (of TPUs) or nodes (of GPUs).

Plan, launch and run ask this module alone, so that they accept and refuse the same meshes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from jax_ordermerge.errors import UserError

AXES: Final = ("order", "data", "fsdp", "sequence", "tensor")
# Axes that are laid over slices unless `mesh.dcn` says otherwise, first those that send least:
# nothing crosses `order` in training, `data` sends gradients, `fsdp` weights and gradients. The
# activations of each layer cross the other two, which no network between slices is fast enough for.
_ACROSS: Final = ("order", "data", "fsdp")


class MeshShape(NamedTuple):
    """Sizes by mesh axis.

    Attributes:
        sizes: number of devices along each axis.
        across: number of slices along each axis, a divisor of its size.
    """

    sizes: dict[str, int]
    across: dict[str, int]


def mesh_shape(
    sizes: Mapping[str, int], slices: Sequence[int], dcn: Mapping[Any, int] | None = None
) -> MeshShape:
    """Return the shape of a mesh over slices, or nodes.

    Args:
        sizes: axis sizes; one may be -1 for all remaining devices.
        slices: number of devices of each slice.
        dcn: number of slices that an axis is divided over; one may be -1. By default the slices are
            divided over `order`, then `data`, then `fsdp`. Ignored for a single slice.

    Raises:
        UserError: the sizes do not fit the devices or the slices.

    Example:
        >>> mesh_shape({"order": 2, "fsdp": -1}, [8, 8, 8, 8]).across
        {'order': 2, 'data': 1, 'fsdp': 2, 'sequence': 1, 'tensor': 1}
    """
    # dcn: Any, since the keys of a config are literals, and a mapping is invariant in its keys
    label = _describe(sizes)
    filled = axis_sizes({**dict.fromkeys(AXES, 1), **sizes}, sum(slices))
    if len(slices) == 1:
        return MeshShape(filled, dict.fromkeys(AXES, 1))
    used = math.prod(filled.values())
    # a slice that is used in part, or not at all, would leave a process without devices
    if used != sum(slices) or len(set(slices)) > 1:
        per_slice = ", ".join(map(str, slices))
        raise UserError(
            f"{label} takes {used} devices of {len(slices)} slices or nodes with {per_slice}: it"
            " must take all of them, of slices of one size; change the sizes, or give one -1"
        )
    across = _divide_slices(filled, len(slices), dcn or {}, label)
    for name, count in across.items():
        if filled[name] % count:
            raise UserError(
                f"{label}: {name} = {filled[name]} cannot be divided over {count} slices or nodes;"
                " change it, or name another axis in mesh.dcn"
            )
    return MeshShape(filled, across)


def _divide_slices(
    sizes: Mapping[str, int], slices: int, dcn: Mapping[str, int], label: str
) -> dict[str, int]:
    """Return the number of slices along each axis."""
    across = dict.fromkeys(AXES, 1)
    if dcn:
        written = f"mesh.dcn {dict(dcn)}"
        across = _fill({**across, **dcn}, slices, label=written, noun="slices or nodes")
        divided = math.prod(across.values())
        if divided != slices:
            raise UserError(
                f"{written} is for {divided} slices or nodes, there are {slices}; give one axis -1,"
                " or leave mesh.dcn out"
            )
        return across
    rest = slices
    # Each prime factor of the slices goes to the first axis that has it, so nothing is left unless
    # the three axes together are no multiple of the slices.
    for name in _ACROSS:
        across[name] = math.gcd(sizes[name], rest)
        rest //= across[name]
    if rest > 1:
        axes = " x ".join(f"{name} {sizes[name]}" for name in _ACROSS)
        raise UserError(
            f"{label}: {axes} cannot be divided over {slices} slices or nodes; change the sizes,"
            " or name another axis in mesh.dcn"
        )
    return across


def axis_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Return the sizes of the mesh axes with -1 replaced by all remaining devices.

    Raises:
        UserError: the sizes do not fit the devices.

    Example:
        >>> axis_sizes({"order": 2, "fsdp": -1}, 8)
        {'order': 2, 'fsdp': 4}
    """
    return _fill(dict(sizes), devices, label=_describe(sizes), noun="devices")


def _describe(sizes: Mapping[str, int]) -> str:
    return "mesh " + ", ".join(
        f"{name}={size}" for name, size in sizes.items() if size != 1 or name == "order"
    )


def _fill(sizes: dict[str, int], present: int, *, label: str, noun: str) -> dict[str, int]:
    """Return the sizes with -1 replaced by all remaining devices (or slices)."""
    # A product smaller than `present` is allowed: tests and small runs use some of the devices.
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"{label}: sizes are positive, and at most one is -1 (all remaining {noun})"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        if present % fixed:
            raise UserError(
                f"{label}: {present} {noun} cannot be divided by {fixed}; change the sizes"
            )
        return {**sizes, open_axes[0]: present // fixed}
    if fixed > present:
        raise UserError(
            f"{label} needs {fixed} {noun}, {present} are present; make an axis smaller or give -1"
        )
    return sizes
