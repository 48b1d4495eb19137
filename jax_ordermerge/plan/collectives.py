"""Collectives of a compiled program, read from its HLO text: by kind and by mesh axes crossed.

The text is the only place where they can be read: shardings say what must move, the compiler
decides how. XLA's cost analysis does not tell collectives apart and counts loop bodies once.
"""

import collections
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jax_ordermerge.plan import hlo

Axes = tuple[str, ...]
# (kind, mesh axes crossed) -> (operations, bytes per device received)
Collectives = dict[tuple[str, Axes], tuple[float, float]]

# Examples of the lines that the patterns below find, in this order:
#   %r = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
#   %s = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%x), ...    begins: operands, result
#   replica_groups={{0,1},{2,3}}            groups listed
#   replica_groups=[4,2]<=[2,2,2]T(0,2,1)   4 groups of 2: an iota, reshaped and transposed
#   replica_groups=mesh['a'=2,'b'=8] {'b'}  axes of a mesh
#   source_target_pairs={{0,1},{1,0}}       pairs of a permutation
_COLLECTIVE = re.compile(
    r"= (?P<shape>\S.*?)"
    r" (?P<kind>all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all"
    r"|collective-permute|collective-broadcast)"
    r"(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+(?:e\w+)?)\[([\d,]*)\]")
# TPUs reduce and scatter in a fusion, whose computation is an all-reduce and the slice of a device.
_SCATTERED = "all-reduce-scatter"
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
# An instruction that only begins what its computation does.
_BEGUN = re.compile(r" async-start\(|^\s+(?:ROOT )?%?[\w.-]*async[\w.-]* = .* fusion\(")
# What XLA has made synchronous although it is written as begun.
_SYNCHRONOUS = '"is_sync":true'


class Exchange(NamedTuple):
    """A collective of a compiled program.

    Attributes:
        kind: as XLA names it, without `-start`.
        axes: mesh axes crossed.
        shape: shape of the results, as in the text.
        executions: how often it runs in one execution of the program.
        received: bytes per device and execution.
        is_synchronous: whether nothing else runs meanwhile.
    """

    kind: str
    axes: Axes
    shape: str
    executions: float
    received: float
    is_synchronous: bool


def read_collectives(program: str, mesh: Mesh | AbstractMesh, *, rounds: int = 1) -> Collectives:
    """Return the collectives of one execution of a compiled program.

    Collectives in a loop count once per iteration. Of a conditional the last branch counts, which
    in this package is that of the longest rows.

    Args:
        program: HLO text after compilation. Device numbers in it are positions in `mesh.devices`.
        mesh: mesh of the program.
        rounds: iterations of loops whose number cannot be read from the text.

    Returns:
        `(kind, axes) -> (operations, bytes)`, with bytes per device received. An all-reduce counts
        as in the best algorithm, with 2 (n - 1) / n of its size.

    Example:
        >>> from jax_ordermerge.mesh import make_mesh
        >>> mesh = make_mesh(2, 2)
        >>> line = "  %r = f32[8,4]{1,0} all-reduce(f32[8,4]{1,0} %x), replica_groups={{0,1},{2,3}}"
        >>> read_collectives(line, mesh)
        {('all-reduce', ('fsdp',)): (1.0, 128.0)}
    """
    totals: Collectives = collections.defaultdict(lambda: (0.0, 0.0))
    for exchange in list_exchanges(program, mesh, rounds=rounds):
        count, total = totals[exchange.kind, exchange.axes]
        times = exchange.executions
        totals[exchange.kind, exchange.axes] = count + times, total + times * exchange.received
    return dict(sorted(totals.items()))


def list_exchanges(program: str, mesh: Mesh | AbstractMesh, *, rounds: int = 1) -> list[Exchange]:
    """Return the collectives of a compiled program one by one.

    Args:
        program, mesh, rounds: see `read_collectives`.

    Example:
        >>> line = "  %r = f32[4] all-gather(f32[2] %x), replica_groups={{0,1}}, dimensions={0}"
        >>> list_exchanges(line, AbstractMesh((2,), ("fsdp",)))[0][2:]
        ('f32[4]', 1.0, 8.0, True)
    """
    exchanges = []
    for computation in hlo.read_computations(program, rounds=rounds):
        # XLA on TPU begins collectives in fusions called async-collective-start and the like
        begun = any(_BEGUN.search(line) for line in computation.callers)
        for line in computation.lines:
            collective = _COLLECTIVE.search(line)
            # a group of one device sends nothing and crosses no axis
            if not collective or not (axes := _crossed_axes(_device_groups(line, mesh.size), mesh)):
                continue
            shape = _result_shape(collective)
            kind, group = collective["kind"], math.prod(mesh.shape[axis] for axis in axes)
            size = array_bytes(shape)
            if kind == "all-reduce" and computation.name.startswith(_SCATTERED):
                # each device keeps a slice of the sum
                kind, size = "reduce-scatter", size / group
            started = begun or (collective["start"] and _SYNCHRONOUS not in line)
            received = size * _received(kind, group)
            exchanges.append(
                Exchange(kind, axes, shape, computation.executions, received, not started)
            )
    return exchanges


def _result_shape(collective: re.Match[str]) -> str:
    """Return the shape of the results of a collective on each device."""
    shape = collective["shape"]
    if collective["start"]:
        # What begins returns a tuple: operands, results, and for some kinds numbers. An all-reduce
        # returns its results alone, unless its operands are a tuple of their own.
        parts = _tuple_elements(shape)
        if len(parts) > 1 and (collective["kind"] != "all-reduce" or parts[0].startswith("(")):
            shape = parts[1]
    return shape


def _received(kind: str, group: int) -> float:
    """Return the bytes that each device of a group receives, per byte of its result."""
    factors = {
        "all-reduce": 2 * (group - 1) / group,
        "reduce-scatter": group - 1,
        "collective-permute": 1,
        "collective-broadcast": 1,
    }
    return factors.get(kind, (group - 1) / group)


def _tuple_elements(shape: str) -> list[str]:
    """Return the outer elements of a shape such as `((f32[4]{0}), f32[2]{0:T(256)})`.

    Example:
        >>> _tuple_elements("((f32[4]{0}, f32[8]), f32[2]{0:T(256)})")
        ['(f32[4]{0}, f32[8])', 'f32[2]{0:T(256)}']
    """
    if not shape.startswith("("):
        return [shape]
    elements, depth, start = [], 0, 1
    for position, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        # a comma of the outer tuple, or its end
        if (depth == 1 and character == ",") or (depth == 0 and position > start):
            elements.append(shape[start:position].strip())
            start = position + 1
    return elements


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def array_bytes(shape: str) -> float:
    """Return the bytes of all arrays of a shape in the text.

    Example:
        >>> array_bytes("(f32[2]{0}, pred[3]{0})")
        11.0
    """
    # a pred takes a byte, an s4 half of one; of f8e4m3 the first number counts the bits
    return sum(
        math.prod(_integers(extents))
        * (8 if dtype == "pred" else int(re.sub(r"\D+(\d+).*", r"\1", dtype)))
        / 8
        for dtype, extents in _ARRAY.findall(shape)
    )


def _device_groups(line: str, devices: int) -> Iterator[Sequence[int]]:
    """Yield the numbers of the devices of each group of a collective."""
    if listed := _LISTED.search(line) or _PAIRS.search(line):
        for group in re.findall(r"\{([\d,]*)\}", listed[1]):
            yield _integers(group)
    elif named := _NAMED.search(line):
        yield from _groups_of_axes(named[1], named[2])
    elif iota := _IOTA.search(line):
        order = np.arange(devices).reshape(_integers(iota[3]))
        if iota[4]:
            order = order.transpose(_integers(iota[4]))
        yield from order.reshape(int(iota[1]), int(iota[2])).tolist()
    else:
        yield range(devices)


def _groups_of_axes(mesh: str, axes: str) -> list[list[int]]:
    """Return the groups of axes `'a','b':(2)4` of a mesh `'a'=2,'b'=8`.

    That is all of `a`, and of `b` the sub-axis of size 4 that follows a sub-axis of size 2.
    """
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(mesh)}
    parts = {
        name: (int(outer or 1), int(size or sizes[name]))
        for name, _, outer, size in _AXIS.findall(axes)
    }
    # row-major device numbers, as jax and XLA number the devices of a mesh
    # each axis of the mesh becomes three: outside the sub-axis, the sub-axis, inside of it
    shape: list[int] = []
    grouped = []
    for name, size in sizes.items():
        outer, extent = parts.get(name, (size, 1))
        grouped += [len(shape) + 1] if name in parts else []
        shape += [outer, extent, size // (outer * extent)]
    devices = np.arange(math.prod(shape)).reshape(shape)
    devices = np.moveaxis(devices, grouped, range(-len(grouped), 0))
    return devices.reshape(-1, math.prod(shape[axis] for axis in grouped)).tolist()


def _crossed_axes(groups: Iterator[Sequence[int]], mesh: Mesh | AbstractMesh) -> Axes:
    """Return the mesh axes along which the devices of some group differ."""
    crossed = np.zeros(len(mesh.axis_names), bool)
    sizes = tuple(mesh.shape.values())
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.asarray(group), sizes))
        crossed |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(name for name, differs in zip(mesh.axis_names, crossed, strict=True) if differs)
