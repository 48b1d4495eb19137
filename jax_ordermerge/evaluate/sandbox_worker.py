"""The processes inside of a sandbox.

The text of this file is passed to `python -I -S -c` (see `sandbox.py`), so it imports the standard
library alone.

There are two processes that share nothing but a socket: one runs the program, the other its tests.
The tests call functions of the program by name; arguments and results are sent as plain data. So
whatever the program does, it can only answer calls.
"""

import json
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any

Value = Any  # of plain Python types
Json = Any
MAX_MESSAGE = 1 << 24  # bytes
MAX_DETAIL = 500  # characters of an error
COLLECTIONS: dict[str, type[Value]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}


def encode(value: Value) -> Json:
    """Return a value as JSON that `decode` turns back: floats keep their bits, tuples their type.

    A subclass becomes its plain type: the methods of a program must not reach the tests, where
    an `__eq__` that is always true would pass them.

    Raises:
        TypeError: the value is no plain data.

    Example:
        >>> decode(encode({1: [(2.5, float("inf")), {"a"}]}))
        {1: [(2.5, inf), {'a'}]}
    """
    if isinstance(value, (str, type(None))) or type(value) is bool:
        return value
    if isinstance(value, int):
        return int(value)
    # repr of a float is read back to the same bits; JSON has neither infinities nor NaN.
    if isinstance(value, (float, complex)):
        return [type(value).__name__ if type(value) in (float, complex) else "float", repr(value)]
    # As pairs: keys of JSON objects are strings.
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    for name, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            return [name, [encode(item) for item in value]]
    raise TypeError(f"{type(value).__name__} is not plain data")


def decode(data: Json) -> Value:
    """Return the value that `encode` got."""
    if not isinstance(data, list):
        return data
    name, inner = data
    if name in COLLECTIONS:
        return COLLECTIONS[name](decode(item) for item in inner)
    if name == "dict":
        return {decode(key): decode(item) for key, item in inner}
    if name == "bytes":
        return bytes.fromhex(inner)
    return {"float": float, "complex": complex}[name](inner)


def send(channel: socket.socket, data: Json) -> None:
    """Write one message."""
    text = json.dumps(data).encode()
    channel.sendall(len(text).to_bytes(8, "big") + text)


def receive(channel: socket.socket) -> Json:
    """Read one message.

    Raises:
        EOFError: the other process has ended, or sends too much.
    """

    def read(count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = channel.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError("the program ended before it answered")
            parts += part
        return bytes(parts)

    # A hostile program may announce any size.
    size = int.from_bytes(read(8), "big")
    if size > MAX_MESSAGE:
        raise EOFError(f"the program answered {size} bytes")
    return json.loads(read(size))


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


def run_program(channel: socket.socket, source: str) -> None:
    """Run the program, then its functions as the tests call them."""
    # as a script, so that a guarded main part runs as it does for its author
    space: dict[str, Value] = {"__name__": "__main__"}
    try:
        exec(compile(source, "<program>", "exec"), space)
        # The tests wait for it: errors of the program itself are reported before any call.
        send(channel, ["ready", None])
        while True:
            name, args, kwargs = receive(channel)
            result = space[name](*decode(args), **decode(kwargs))
            send(channel, ["value", encode(result)])
    # the tests have ended, and nobody is left to answer
    except EOFError:
        return
    except BaseException as error:  # also SystemExit, which a program may raise
        send(channel, ["error", f"{type(error).__name__}: {error}"[:MAX_DETAIL]])


def run_tests(channel: socket.socket, setup: str, tests: str, names: list[str]) -> str:
    """Run tests against the functions of the program; return "passed" or the error."""

    def remote(name: str) -> Callable[..., Value]:
        def call(*args: Value, **kwargs: Value) -> Value:
            # Each call is a round trip; the program keeps its state between calls.
            send(channel, [name, encode(args), encode(kwargs)])
            kind, value = receive(channel)
            if kind != "value":
                raise RuntimeError(value)
            return decode(value)

        return call

    try:
        kind, value = receive(channel)
        if kind != "ready":
            return f"failed: {value}"
        space: dict[str, Value] = {"__name__": "tests"}
        exec(compile(setup, "<setup>", "exec"), space)
        # After the setup, which for HumanEval defines the same names as stubs.
        space |= {name: remote(name) for name in names}
        exec(compile(tests, "<tests>", "exec"), space)
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"[:MAX_DETAIL]
    return "passed"


def main(role: str, handle: int, memory: int, seconds: int) -> None:
    """Run as one of the two processes.

    Args:
        role: "program" or "tests". Its inputs are JSON on the standard input; the tests write
            their verdict to the standard output.
        handle: file descriptor of the socket.
        memory, seconds: see `limit`.
    """
    inputs = json.load(sys.stdin)
    channel = socket.socket(fileno=handle)
    # The standard streams go nowhere: what a program prints cannot be taken for a verdict.
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    # Here and not in the parent, whose own limits must stay.
    limit(memory, seconds)
    if role == "program":
        os.close(verdict)
        run_program(channel, inputs["source"])
    else:
        detail = run_tests(channel, inputs["setup"], inputs["tests"], inputs["names"])
        os.write(verdict, detail.encode())


if __name__ == "__main__" and len(sys.argv) == 5:
    main(sys.argv[1], *map(int, sys.argv[2:]))
