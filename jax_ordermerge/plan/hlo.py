"""The text of a compiled program: its computations, and how often each one is executed.

XLA's cost analysis counts the body of a loop once, so whoever counts what a program does reads the
text and multiplies by the trip counts of its loops.
"""

import collections
import dataclasses
import re

# Which computation calls which:
#   %body (p: (u32[], f32[2])) -> (u32[], f32[2]) {
#   %w = (...) while(%a), condition=%condition, body=%body
#   %c = f32[2] conditional(%i, %x, %x), branch_computations={%short, %long}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
# The end of an operation that has begun elsewhere. Some versions of XLA repeat `calls=` there.
_ENDING = re.compile(r" async-(?:update|done)\(")
# How often a loop runs: `known_trip_count` where XLA writes it, else `counter < constant` in the
# condition and `counter + constant` in the body.
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"(\d+)"')
_CONSTANT = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_ELEMENT = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* get-tuple-element\(.*index=(\d+)")
_SUM = re.compile(r"%?([\w.-]+) = [su]\d+\[\]\S* add\(%?([\w.-]+), %?([\w.-]+)\)")
_COMPARISON = re.compile(r"ROOT .* compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT")
_RESULTS = re.compile(r"ROOT .* tuple\((.*?)\)(?:,|$)")


@dataclasses.dataclass
class Computation:
    """One computation of a program.

    Attributes:
        name: as in the text.
        lines: its instructions.
        callers: the instructions that call it, without loops and conditionals.
        executions: how often it runs in one execution of the program.
    """

    name: str
    lines: list[str] = dataclasses.field(default_factory=list)
    callers: list[str] = dataclasses.field(default_factory=list)
    executions: float = 0.0

    # callee and how often: a number, or the name of the condition of a loop
    _calls: list[tuple[str, str | int]] = dataclasses.field(default_factory=list)
    # scalar integers: constants and elements of the parameter by name, the two terms of sums
    _constants: dict[str, int] = dataclasses.field(default_factory=dict)
    _elements: dict[str, int] = dataclasses.field(default_factory=dict)
    _sums: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    # both sides of the `<` that a condition returns, and the elements of a returned tuple
    _comparison: tuple[str, str] | None = None
    _results: list[str] = dataclasses.field(default_factory=list)

    def add(self, line: str) -> None:
        """Add an instruction."""
        self.lines.append(line)
        # the condition of a loop runs as often as the body but has nothing to count
        if loop := _LOOP.search(line):
            trips = _TRIPS.search(line)
            self._calls.append((loop[2], int(trips[1]) if trips else loop[1]))
        elif branches := _BRANCHES.search(line):
            self._calls.append((branches[1].split(",")[-1].strip().lstrip("%"), 1))
        elif not _ENDING.search(line):
            self._calls += [(callee, 1) for callee in _CALLED.findall(line)]
        if match := _CONSTANT.search(line):
            self._constants[match[1]] = int(match[2])
        if match := _ELEMENT.search(line):
            self._elements[match[1]] = int(match[2])
        if match := _SUM.search(line):
            self._sums[match[1]] = (match[2], match[3])
        if match := _COMPARISON.search(line):
            self._comparison = (match[1], match[2])
        if match := _RESULTS.search(line):
            # an element may be written `f32[2]{0} /*index=1*/%name`
            self._results = [
                element.split()[-1].split("*/")[-1].lstrip("%") for element in match[1].split(", ")
            ]


def read_computations(program: str, *, rounds: int = 1) -> list[Computation]:
    """Return the computations that a program executes.

    Of a conditional the last branch counts, which in this package is that of the longest rows.

    Args:
        program: HLO text after compilation.
        rounds: iterations of loops whose number cannot be read from the text.

    Example:
        >>> text = '''%f (p: f32[2]) -> f32[2] {
        ...   ROOT %a = f32[2] add(%p, %p)
        ... }
        ... ENTRY %main (x: f32[2]) -> f32[2] {
        ...   %y = f32[2] fusion(%x), kind=kLoop, calls=%f
        ...   ROOT %z = f32[2] fusion(%y), kind=kLoop, calls=%f
        ... }'''
        >>> [(c.name, c.executions, len(c.callers)) for c in read_computations(text)]
        [('f', 2.0, 2), ('main', 1.0, 0)]
    """
    name = entry = ""
    computations = {name: Computation(name)}  # of lines outside any computation
    for line in program.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = Computation(name)
            entry = name if header[1] else entry
        else:
            computations[name].add(line)
    for computation in computations.values():
        for line in computation.lines:
            if not _ENDING.search(line):
                for callee in _CALLED.findall(line):
                    # reducers such as %add of a collective are left out of some texts
                    if callee in computations:
                        computations[callee].callers.append(line)
    # A computation may be called from several places, and a loop within a loop multiplies: so walk
    # the calls from the entry and add up how often each computation is executed.
    multiples: dict[str, float] = collections.defaultdict(float)

    def execute(name: str, times: float) -> None:
        multiples[name] += times
        for callee, count in computations[name]._calls:
            if isinstance(count, str):
                count = _iterations(computations[count], computations[callee]) or rounds
            if callee in computations:
                execute(callee, times * count)

    execute(entry, 1.0)
    for name, times in multiples.items():
        computations[name].executions = times
    return [computation for computation in computations.values() if computation.executions]


def _iterations(condition: Computation, body: Computation) -> int | None:
    """Return the iterations of a loop that counts from 0; None if the text does not say."""
    if condition._comparison is None:
        return None
    counter, limit = condition._comparison
    index = condition._elements.get(counter)
    if index is None or limit not in condition._constants:
        return None
    terms = body._sums.get(body._results[index], ()) if index < len(body._results) else ()
    stride = next((body._constants[term] for term in terms if term in body._constants), 1)
    return -(-condition._constants[limit] // stride)
