"""What a compiled program sends between devices, read from its HLO text: by kind, and by the mesh axes that it crosses."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

Axes = tuple[str, ...]
Exchanges = dict[tuple[str, Axes], tuple[float, float]]

_COLLECTIVE = re.compile(
    r"= (?P<shape>\S.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"(\d+)"')
# what counts the rounds of a loop: in its condition `place < constant`, in its body `place + constant`
_CONSTANT = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_PLACE = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* get-tuple-element\(.*index=(\d+)")
_SUM = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* add\(%?([\w.-]+), %?([\w.-]+)\)")
_COMPARED = re.compile(r"ROOT .* compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT")
_RESULTS = re.compile(r"ROOT .* tuple\((.*?)\)(?:,|$)")


@dataclasses.dataclass
class _Computation:
    """One computation of a program: its own exchanges, the others that it runs, and what tells how often a loop runs.

    Attributes:
        exchanges: kind, axes crossed, bytes received.
        runs: names, and how often: a number, or the name of a loop's condition.
        constants, places, sums: whole numbers by name: constants, elements of the parameter, sums of two others.
        compared: the two sides of `<`, of a condition.
        results: names of what it returns, if that is a tuple.
    """

    exchanges: list[tuple[str, Axes, float]] = dataclasses.field(default_factory=list)
    runs: list[tuple[str, str | int]] = dataclasses.field(default_factory=list)
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    places: dict[str, int] = dataclasses.field(default_factory=dict)
    sums: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    compared: tuple[str, str] | None = None
    results: list[str] = dataclasses.field(default_factory=list)


def exchanges(program: str, mesh: Mesh, *, rounds: int = 1) -> Exchanges:
    """Return the exchanges between devices while a compiled program runs once.

    A loop counts as often as it runs. Of the branches of a conditional the last is taken: that of the longest rows.

    Args:
        program: HLO text after compilation; numbers in it are positions in `mesh.devices`.
        mesh: the mesh.
        rounds: of loops whose number of rounds the program does not say.

    Returns:
        `(kind, axes) -> (operations, bytes)`: bytes that one device receives, of an all-reduce those of the best algorithm,
        2 (n - 1) / n of its size.

    Example:
        >>> from jax_ordermerge.mesh import make_mesh
        >>> mesh = make_mesh(2, 2)
        >>> line = "  %r = f32[8,4]{1,0} all-reduce(f32[8,4]{1,0} %x), replica_groups={{0,1},{2,3}}, to_apply=%add"
        >>> exchanges(line, mesh)
        {('all-reduce', ('fsdp',)): (1.0, 128.0)}
    """
    computations, entry = _computations(program, mesh)
    times: dict[str, float] = collections.defaultdict(float)

    def run(name: str, often: float) -> None:
        times[name] += often
        for callee, count in computations[name].runs:
            if isinstance(count, str):
                count = _rounds(computations[count], computations[callee]) or rounds
            if callee in computations:
                run(callee, often * count)

    run(entry, 1.0)
    found: Exchanges = collections.defaultdict(lambda: (0.0, 0.0))
    for name, often in times.items():
        for kind, axes, size in computations[name].exchanges:
            count, total = found[kind, axes]
            found[kind, axes] = count + often, total + often * size
    return dict(sorted(found.items()))


def _computations(program: str, mesh: Mesh) -> tuple[dict[str, _Computation], str]:
    """Return the computations by name, and the name of the first to run."""
    name = entry = ""
    found: dict[str, _Computation] = collections.defaultdict(_Computation)
    found[name] = _Computation()
    for line in program.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            found[name] = _Computation()
            entry = name if header[1] else entry
            continue
        here, loop, branches = found[name], _LOOP.search(line), _BRANCHES.search(line)
        _note_numbers(here, line)
        if loop:
            trips = _TRIPS.search(line)
            here.runs.append((loop[2], int(trips[1]) if trips else loop[1]))
        elif branches:
            here.runs.append((branches[1].split(",")[-1].strip().lstrip("%"), 1))
        else:
            here.runs += [(callee, 1) for callee in _CALLED.findall(line)]
        exchange = _COLLECTIVE.search(line)
        if exchange:
            groups = list(_groups(line, mesh.size))
            axes = _crossed(groups, mesh)
            if axes:
                here.exchanges.append(
                    (
                        exchange["kind"],
                        axes,
                        _received(exchange, math.prod(mesh.shape[axis] for axis in axes)),
                    )
                )
    return dict(found), entry


def _note_numbers(here: _Computation, line: str) -> None:
    constant, place, total = _CONSTANT.search(line), _PLACE.search(line), _SUM.search(line)
    compared, results = _COMPARED.search(line), _RESULTS.search(line)
    if constant:
        here.constants[constant[1]] = int(constant[2])
    if place:
        here.places[place[1]] = int(place[2])
    if total:
        here.sums[total[1]] = (total[2], total[3])
    if compared:
        here.compared = (compared[1], compared[2])
    if results:
        here.results = [
            one.split()[-1].split("*/")[-1].lstrip("%") for one in results[1].split(", ")
        ]


def _rounds(condition: _Computation, body: _Computation) -> int | None:
    """Return how often a loop runs that counts from 0; None where that cannot be read."""
    if condition.compared is None:
        return None
    counter, limit = condition.compared
    place = condition.places.get(counter)
    if place is None or limit not in condition.constants:
        return None
    terms = body.sums.get(body.results[place], ()) if place < len(body.results) else ()
    stride = next((body.constants[one] for one in terms if one in body.constants), 1)
    return -(-condition.constants[limit] // stride)


def _received(exchange: re.Match[str], group: int) -> float:
    """Return the bytes that a device receives."""
    kind, arrays = exchange["kind"], _sizes(exchange["shape"])
    # what is started gives operands, results and, of a permutation, two numbers
    size = sum(arrays)
    if exchange["start"] and kind == "collective-permute":
        size = arrays[1]
    elif exchange["start"] and kind == "all-gather":
        size = sum(arrays[len(arrays) // 2 :])
    factors = {
        "all-reduce": 2 * (group - 1) / group,
        "reduce-scatter": group - 1,
        "collective-permute": 1,
    }
    return size * factors.get(kind, (group - 1) / group)


def _sizes(shape: str) -> list[int]:
    return [
        math.prod(int(one) for one in extents.split(",") if one)
        * (1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8)
        for kind, extents in _ARRAY.findall(shape)
    ]


def _groups(line: str, devices: int) -> Iterator[Sequence[int]]:
    """Yield the numbers of the devices that exchange with each other."""
    listed = _LISTED.search(line) or _PAIRS.search(line)
    if listed:
        for group in re.findall(r"\{([\d,]*)\}", listed[1]):
            yield [int(one) for one in group.split(",")]
        return
    named = _NAMED.search(line)
    if named:
        yield from _groups_of_axes(named[1], named[2])
        return
    iota = _IOTA.search(line)
    if iota is None:
        yield range(devices)
        return
    order = np.arange(devices).reshape([int(one) for one in iota[3].split(",")])
    if iota[4]:
        order = order.transpose([int(one) for one in iota[4].split(",")])
    yield from order.reshape(int(iota[1]), int(iota[2])).tolist()


def _groups_of_axes(mesh: str, axes: str) -> list[list[int]]:
    """Read `'a'=2,'b'=8` and `'a','b':(2)4`: the whole of a, and of b the part of size 4 after one of size 2."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(mesh)}
    inside = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, _, before, size in _AXIS.findall(axes)
    }
    shape: list[int] = []
    grouped = []
    for name, size in sizes.items():
        before, own = inside.get(name, (size, 1))
        grouped += [len(shape) + 1] if name in inside else []
        shape += [before, own, size // (before * own)]
    order = np.moveaxis(
        np.arange(math.prod(shape)).reshape(shape), grouped, range(-len(grouped), 0)
    )
    return order.reshape(-1, math.prod(shape[axis] for axis in grouped)).tolist()


def _crossed(groups: list[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
    crossed = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape))
        crossed |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, one in zip(mesh.axis_names, crossed, strict=True) if one)
