"""The processes inside of a sandbox.

This module and the other `sandbox_*` modules are compiled in the parent and sent to `python -I -S`
(`sandbox._modules`), which sees no installed package. So they import the standard library alone.

There are two processes that share nothing but a socket: one runs the program, the other its tests.
To the tests it looks as if they ran in the program's namespace, as in the published evaluations.
But all that the program can do is answer calls, and what it answers is compared in the process of
the tests.
"""

import _sitebuiltins
import builtins
import contextlib
import importlib.machinery
import os
import resource
import socket
import sys
import types
from collections.abc import Mapping, Sequence

from jax_ordermerge.evaluate.sandbox_proxies import ProxyType
from jax_ordermerge.evaluate.sandbox_rpc import QUIET, Connection, ConnectionLost
from jax_ordermerge.evaluate.sandbox_values import JsonValue, Value

MAX_DETAIL = 500  # characters of an error


def limit(memory: int, seconds: int) -> None:
    """Set limits that neither this process nor its children can raise.

    Args:
        memory: bytes of address space.
        seconds: of CPU time.
    """
    for name, maximum in (
        ("AS", memory),
        ("CPU", seconds),
        ("FSIZE", 1 << 20),
        # few files and processes: a program that opens or forks without end fails, not the machine
        ("NOFILE", 64),
        ("NPROC", 32),
        ("CORE", 0),
        ("STACK", 64 << 20),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        # A limit above the hard one of this process would be refused.
        hard = resource.getrlimit(kind)[1]
        maximum = maximum if hard == resource.RLIM_INFINITY else min(maximum, hard)
        resource.setrlimit(kind, (maximum, maximum))


class PackageFinder:
    """Finds a few packages and nothing else of the directories that hold them."""

    def __init__(self, directories: Mapping[str, str]) -> None:
        self._directories = directories

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of one of the packages; their modules are found by their own path."""
        if name not in self._directories:
            return None
        return importlib.machinery.PathFinder.find_spec(name, [self._directories[name]], target)


def run_program(
    channel: socket.socket,
    source: str,
    *,
    imports: str,
    reads: Sequence[str],
    packages: Sequence[str],
) -> None:
    """Run a program, then answer what the tests ask of it.

    Args:
        channel: to the tests.
        source: of the program.
        imports: of the tests, which share their namespace with the program.
        reads, packages: see `Connection`.
    """
    # Without a name, as in the published evaluations: `__name__` is then "builtins", and a guarded
    # main part does not run.
    space: dict[str, Value] = {}
    connection = Connection(channel, space, guarded=False, reads=reads, packages=packages)
    sys.argv = ["program"]
    # Two builtins that `-S` leaves out.
    vars(builtins).update({name: _sitebuiltins.Quitter(name, "") for name in ("exit", "quit")})

    def start() -> None:
        exec(compile(source, "<program>", "exec", dont_inherit=True), space)
        _run_each(imports, space)

    # The tests have ended, and nobody is left to answer.
    with contextlib.suppress(ConnectionLost):
        connection.answer(start)
        connection.wait()


def run_tests(
    channel: socket.socket,
    setup: str,
    tests: str,
    *,
    names: Sequence[str],
    reads: Sequence[str],
    imports: str,
    classes: Sequence[str],
    packages: Sequence[str],
) -> str:
    """Run tests against a program; return "passed" or the error.

    Args:
        channel: to the program.
        setup, tests: source texts.
        names: what the program has to define, even where Python or the setup have it too.
        imports: of a right program. They are made here, and not taken from the program.
        classes: those of a right program; see `Connection.operable`.
        reads, packages: see `Connection`.
    """
    space: dict[str, Value] = {}
    connection = Connection(channel, space, guarded=True, reads=reads, packages=packages)
    connection.expected = frozenset(name for name in QUIET if name in tests)
    if "asyncio" in tests:
        connection.expected |= {"StopIteration"}  # the end of a coroutine
    try:
        # An error of the program itself is raised here.
        connection.wait()
        imported: dict[str, Value] = {}
        _run_each(imports, imported)
        space |= {name: imported[name] for name in connection.names.keys() & imported.keys()}
        connection.operable = tuple(
            space[name] for name in classes if isinstance(space.get(name), ProxyType)
        )
        # The setup may build objects of classes of the program.
        exec(compile(setup, "<setup>", "exec", dont_inherit=True), space)
        # For HumanEval it also defines the functions of the program, as stubs.
        for name in names:
            space.pop(name, None)
        space |= {name: connection.names[name] for name in names if name in connection.names}
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), space)
    except BaseException as error:
        return f"failed: {type(error).__name__}: {_text(error)}"[:MAX_DETAIL]
    # Tests may catch any error.
    return "failed: the program ended before it answered" if connection.lost else "passed"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as another:  # of a method of the program
        return f"no message: {type(another).__name__}"


def _run_each(imports: str, space: dict[str, Value]) -> None:
    """Run import statements, one per line, as far as they work."""
    for line in imports.splitlines():
        try:
            exec(line, space)
        except Exception:  # the statement fails once more where the tests have it
            continue


def main(inputs: Mapping[str, JsonValue]) -> None:
    """Run as one of the two processes.

    Args:
        inputs: `role` ("program" or "tests"), `handle` (file descriptor of the socket), `memory`
            and `seconds` (see `limit`), `packages` (with their directories), and the other
            arguments of `run_program` or `run_tests`. The tests write their verdict to the
            standard output.
    """
    # The lowest free number: a program must not have other chances where the parent has more files.
    channel = socket.socket(fileno=os.dup(inputs["handle"]))
    os.close(inputs["handle"])
    # The standard streams go nowhere: what a program prints cannot be taken for a verdict.
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    # Here and not in the parent, whose own limits must stay.
    limit(inputs["memory"], inputs["seconds"])
    # Libraries of linear algebra would start a thread, with its memory, for each core.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.putenv(name, "1")
    # A limit of digits is younger than the published evaluations.
    sys.set_int_max_str_digits(0)
    sys.meta_path.append(PackageFinder(inputs["packages"]))
    arguments = {name: inputs[name] for name in inputs["arguments"]}
    arguments["packages"] = list(inputs["packages"])
    if inputs["role"] == "program":
        os.close(verdict)
        run_program(channel, **arguments)
    else:
        os.write(verdict, run_tests(channel, **arguments).encode(errors="replace"))
    # Threads and objects that the program has left behind are not waited for.
    os._exit(0)
