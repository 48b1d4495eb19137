"""What runs inside a sandbox. Standard library only: the text of this file is handed to `python -I -S -c`, see `sandbox.py`.

Two processes that share nothing but a socket: one holds the program under test, the other its tests. The tests call functions of the
program by name; arguments and results travel as plain data. Whatever the program does, it can only answer calls.
"""

import json
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any

LONGEST = 1 << 24  # bytes of a message
PLAIN = (str, type(None))
GROUPS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any) -> Any:
    """Return a value of plain Python types as JSON-able data; floats keep their bits, tuples stay tuples.

    Raises:
        TypeError: another type.

    Example:
        >>> decode(encode({1: [(2.5, float("inf")), {"a"}]}))
        {1: [(2.5, inf), {'a'}]}
    """
    if isinstance(value, PLAIN) or type(value) is bool:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (float, complex)):
        return [type(value).__name__ if type(value) in (float, complex) else "float", repr(value)]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    for name, kind in GROUPS.items():
        if isinstance(value, kind):
            return [name, [encode(item) for item in value]]
    raise TypeError(f"{type(value).__name__} is not plain data")


def decode(data: Any) -> Any:
    """Invert `encode`."""
    if not isinstance(data, list):
        return data
    name, inner = data
    if name in GROUPS:
        return GROUPS[name](decode(item) for item in inner)
    if name == "dict":
        return {decode(key): decode(item) for key, item in inner}
    return (
        bytes.fromhex(inner)
        if name == "bytes"
        else {"float": float, "complex": complex}[name](inner)
    )


def send(channel: socket.socket, data: Any) -> None:
    """Write one message."""
    text = json.dumps(data).encode()
    channel.sendall(len(text).to_bytes(8, "big") + text)


def receive(channel: socket.socket) -> Any:
    """Read one message.

    Raises:
        EOFError: the other side is gone, or sends too much.
    """

    def read(count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = channel.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError("the program ended before it answered")
            parts += part
        return bytes(parts)

    size = int.from_bytes(read(8), "big")
    if size > LONGEST:
        raise EOFError(f"the program answered {size} bytes")
    return json.loads(read(size))


def limit(memory: int, seconds: int) -> None:
    """Set limits that nothing started from here can raise: bytes of memory, CPU seconds, files, processes."""
    for name, most in (
        ("AS", memory),
        ("CPU", seconds),
        ("FSIZE", 1 << 20),
        ("NOFILE", 64),
        ("NPROC", 32),
        ("CORE", 0),
        ("STACK", 64 << 20),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def answer(channel: socket.socket, source: str) -> None:
    """Run the program under test, then its functions as they are called."""
    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(source, "<program>", "exec"), space)
        send(channel, ["ready", None])
        while True:
            name, arguments, named = receive(channel)
            found = space[name](*decode(arguments), **decode(named))
            send(channel, ["value", encode(found)])
    except EOFError:
        return
    except BaseException as error:
        send(channel, ["error", f"{type(error).__name__}: {error}"[:500]])


def examine(channel: socket.socket, setup: str, tests: str, names: list[str]) -> str:
    """Run tests against the functions of the program; return "passed", or what went wrong."""

    def remote(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            send(channel, [name, encode(arguments), encode(named)])
            kind, value = receive(channel)
            if kind != "value":
                raise RuntimeError(value)
            return decode(value)

        return call

    try:
        kind, value = receive(channel)
        if kind != "ready":
            return f"failed: {value}"
        space: dict[str, Any] = {"__name__": "tests"}
        exec(compile(setup, "<setup>", "exec"), space)
        space |= {name: remote(name) for name in names}
        exec(compile(tests, "<tests>", "exec"), space)
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"[:500]
    return "passed"


def main(part: str, handle: int, memory: int, seconds: int) -> None:
    """Take one part; what it needs is JSON on the standard input. The tests write their verdict on the standard output."""
    given = json.load(sys.stdin)
    channel = socket.socket(fileno=handle)
    verdict = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(quiet, number)
    limit(memory, seconds)
    if part == "program":
        os.close(verdict)
        answer(channel, given["source"])
    else:
        os.write(verdict, examine(channel, given["setup"], given["tests"], given["names"]).encode())


if __name__ == "__main__" and len(sys.argv) == 5:
    main(sys.argv[1], *map(int, sys.argv[2:]))
