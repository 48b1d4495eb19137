"""Collectives of a compiled program, read from its HLO text: by kind and by mesh axes crossed.

The text is the only place where they can be read: shardings say what must move, the compiler
decides how. XLA's cost analysis does not tell collectives apart and counts loop bodies once.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

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
# The end of an operation that has begun elsewhere. Some versions of XLA repeat `calls=` there.
_ENDING = re.compile(r" async-(?:update|done)\(")
# TPUs reduce and scatter in a fusion, whose computation is an all-reduce and the slice of a device.
_SCATTERED = "all-reduce-scatter"
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
# Which computation calls which:
#   %body (p: (u32[], f32[2])) -> (u32[], f32[2]) {
#   %w = (...) while(%a), condition=%condition, body=%body
#   %c = f32[2] conditional(%i, %x, %x), branch_computations={%short, %long}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
# How often a loop runs: `known_trip_count` where XLA writes it, else `counter < constant` in the
# condition and `counter + constant` in the body.
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"(\d+)"')
_CONSTANT = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* get-tuple-element\(.*index=(\d+)")
_SUM = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* add\(%?([\w.-]+), %?([\w.-]+)\)")
_COMPARISON = re.compile(r"ROOT .* compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT")
_RESULTS = re.compile(r"ROOT .* tuple\((.*?)\)(?:,|$)")


@dataclasses.dataclass
class _Computation:
    """One computation of a program.

    Attributes:
        collectives: kind, axes crossed, bytes per device received.
        calls: callee and how often: a number, or the name of the condition of a loop.
        constants: scalar integer constants by name.
        elements: indices of scalar integer elements of the parameter by name.
        sums: the two terms of scalar integer sums by name.
        comparison: both sides of the `<` that a condition returns.
        results: names of the elements of the tuple that is returned.
    """

    collectives: list[tuple[str, Axes, float]] = dataclasses.field(default_factory=list)
    calls: list[tuple[str, str | int]] = dataclasses.field(default_factory=list)
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    elements: dict[str, int] = dataclasses.field(default_factory=dict)
    sums: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    comparison: tuple[str, str] | None = None
    results: list[str] = dataclasses.field(default_factory=list)


def read_collectives(program: str, mesh: Mesh, *, rounds: int = 1) -> Collectives:
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
    computations, entry = _parse(program, mesh)
    # A computation may be called from several places, and a loop within a loop multiplies: so walk
    # the calls from the entry and add up how often each computation is executed.
    executions: dict[str, float] = collections.defaultdict(float)

    def execute(name: str, times: float) -> None:
        executions[name] += times
        for callee, count in computations[name].calls:
            if isinstance(count, str):
                count = _iterations(computations[count], computations[callee]) or rounds
            # reducers such as %add of a collective are computations of their own, some are left out
            if callee in computations:
                execute(callee, times * count)

    execute(entry, 1.0)
    totals: Collectives = collections.defaultdict(lambda: (0.0, 0.0))
    for name, times in executions.items():
        for kind, axes, size in computations[name].collectives:
            count, total = totals[kind, axes]
            totals[kind, axes] = count + times, total + times * size
    return dict(sorted(totals.items()))


def _parse(program: str, mesh: Mesh) -> tuple[dict[str, _Computation], str]:
    """Return the computations by name, and the name of the entry computation."""
    name = entry = ""
    computations: dict[str, _Computation] = collections.defaultdict(_Computation)
    computations[name] = _Computation()  # of lines outside any computation
    for line in program.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = _Computation()
            entry = name if header[1] else entry
            continue
        computation = computations[name]
        _read_integers(computation, line)
        # the condition of a loop runs as often as the body but has no collectives
        if loop := _LOOP.search(line):
            trips = _TRIPS.search(line)
            computation.calls.append((loop[2], int(trips[1]) if trips else loop[1]))
        elif branches := _BRANCHES.search(line):
            computation.calls.append((branches[1].split(",")[-1].strip().lstrip("%"), 1))
        elif not _ENDING.search(line):
            computation.calls += [(callee, 1) for callee in _CALLED.findall(line)]
        if collective := _COLLECTIVE.search(line):
            # a group of one device sends nothing and crosses no axis
            axes = _crossed_axes(_device_groups(line, mesh.size), mesh)
            if axes:
                size = _result_bytes(collective)
                kind, group = collective["kind"], math.prod(mesh.shape[axis] for axis in axes)
                if kind == "all-reduce" and name.startswith(_SCATTERED):
                    # each device keeps a slice of the sum
                    kind, size = "reduce-scatter", size / group
                computation.collectives.append((kind, axes, size * _received(kind, group)))
    return dict(computations), entry


def _read_integers(computation: _Computation, line: str) -> None:
    """Note what a line contributes to the number of iterations of a loop."""
    if match := _CONSTANT.search(line):
        computation.constants[match[1]] = int(match[2])
    if match := _ELEMENT.search(line):
        computation.elements[match[1]] = int(match[2])
    if match := _SUM.search(line):
        computation.sums[match[1]] = (match[2], match[3])
    if match := _COMPARISON.search(line):
        computation.comparison = (match[1], match[2])
    if match := _RESULTS.search(line):
        # an element may be written `f32[2]{0} /*index=1*/%name`
        computation.results = [
            element.split()[-1].split("*/")[-1].lstrip("%") for element in match[1].split(", ")
        ]


def _iterations(condition: _Computation, body: _Computation) -> int | None:
    """Return the iterations of a loop that counts from 0; None if the text does not say."""
    if condition.comparison is None:
        return None
    counter, limit = condition.comparison
    index = condition.elements.get(counter)
    if index is None or limit not in condition.constants:
        return None
    terms = body.sums.get(body.results[index], ()) if index < len(body.results) else ()
    stride = next((body.constants[term] for term in terms if term in body.constants), 1)
    return -(-condition.constants[limit] // stride)


def _result_bytes(collective: re.Match[str]) -> float:
    """Return the bytes of the results of a collective on each device."""
    shape = collective["shape"]
    if collective["start"]:
        # What begins returns a tuple: operands, results, and for some kinds numbers. An all-reduce
        # returns its results alone, unless its operands are a tuple of their own.
        parts = _tuple_elements(shape)
        if len(parts) > 1 and (collective["kind"] != "all-reduce" or parts[0].startswith("(")):
            shape = parts[1]
    return _array_bytes(shape)


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


def _array_bytes(shape: str) -> float:
    """Return the bytes of all arrays of a shape such as `(f32[2]{0}, pred[3]{0})`."""
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


def _crossed_axes(groups: Iterator[Sequence[int]], mesh: Mesh) -> Axes:
    """Return the mesh axes along which the devices of some group differ."""
    crossed = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape))
        crossed |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(name for name, differs in zip(mesh.axis_names, crossed, strict=True) if differs)
