"""Calls between the two interpreters of a sandbox, as if both were one.

Control is in one process at a time: a request passes it on, the answer brings it back, and a
callback is a request within a request. With each message goes what has changed since the last one,
so that a list that both know is one list for whoever has control.

The process of the tests trusts nothing that it reads. It makes values only of the types of
`sandbox_values`, and lets the program only use objects that the tests have passed to it. This
module imports the standard library alone; see `sandbox_worker.py`.
"""

import copy
import json
import operator
import socket
import threading
import types
from collections.abc import Callable, Sequence
from typing import NoReturn

from jax_ordermerge.evaluate import sandbox_proxies as proxies
from jax_ordermerge.evaluate.sandbox_objects import Objects
from jax_ordermerge.evaluate.sandbox_values import JsonValue, Value

MAX_MESSAGE = 1 << 26  # bytes
_ABSENT = object()
_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "__call__": lambda function, /, *args, **kwargs: function(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
# Operators of classes themselves, which are methods of their metaclass.
_OF_CLASSES: dict[str, Callable[..., Value]] = {
    "__getitem__": operator.getitem,
    "__iter__": iter,
    "__len__": len,
}
# Attributes of frames, generators and the like lead to everything that the tests know.
_INTERNALS = ("_", "f_", "gi_", "cr_", "ag_", "tb_", "co_")
# But a decorator reads the name of a function, and a curried one needs its number of arguments.
_ABOUT_FUNCTIONS = (
    *("__name__", "__qualname__", "__doc__", "__annotations__"),
    *("__defaults__", "__kwdefaults__", "__code__"),
)
_SIGNATURE = (
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_varnames", "co_flags"),
    "co_name",
)
# Exceptions that are no failure for whoever catches them: `list(map(f, items))` ends early where f
# raises StopIteration, and unittest counts a skipped test as a success.
QUIET = {"StopIteration", "StopAsyncIteration", "SkipTest"}


class ConnectionLost(BaseException):
    """The other process has ended, or what it sends is no message.

    Not an `Exception`: tests that expect one would pass.
    """


class Connection:
    """One end of a connection.

    Args:
        channel: to the other end.
        space: the namespace of the program, or that of the tests, which follows it.
        guarded: whether this is the end of the tests.
        reads: the global names that the tests read.
        packages: packages beside the standard library that both sides can import.

    Attributes:
        names: those of `reads` that the program has, with their values.
        operable: classes whose arithmetic takes values of the tests; see `sandbox.judge`.
        expected: those of the exceptions that end something quietly which the tests know.
        lost: whether a message did not come or was none.
    """

    def __init__(
        self,
        channel: socket.socket,
        space: dict[str, Value],
        *,
        guarded: bool,
        reads: Sequence[str],
        packages: Sequence[str],
    ) -> None:
        self.names: dict[str, Value] = {}
        self.space = space
        self.guarded = guarded
        self.operable: tuple[type, ...] = ()
        self.expected: frozenset[str] = frozenset()
        self.lost = False
        self._channel = channel
        self._reads = frozenset(reads)
        self._objects = Objects(self, packages)
        # Threads of the program may call functions of the tests.
        self._lock = threading.RLock()

    def request(self, operation: str, /, *operands: Value, **keywords: Value) -> Value:
        """Return the result of an operation in the other process, or raise its exception."""
        with self._lock:
            self._send("request", list(operands), operation, keywords)
            return self.wait(operation)

    def wait(self, operation: str = "") -> Value:
        """Answer requests until the answer to the request of this side comes, and return it."""
        while True:
            kind, operands, asked, keywords = self._receive()
            if kind == "value":
                return operands[0]
            if kind == "error":
                self._raise(operands[0], operation)
            self.answer(self._execute, asked, operands, keywords)

    def answer(self, function: Callable[..., Value], *arguments: Value) -> None:
        """Send the result of a function, or the exception that it raises."""
        try:
            kind, results = "value", [function(*arguments)]
        except ConnectionLost:
            raise
        except BaseException as error:  # also SystemExit, which a program may raise
            # frames would keep arguments alive
            kind, results = "error", [error.with_traceback(None)]
        try:
            self._send(kind, results)
        except Exception as error:  # RecursionError of a tuple in a tuple in a ...
            self._send("error", [error.with_traceback(None)])

    def drop(self, key: int) -> None:
        """Note that no proxy of a key is left."""
        self._objects.drop(key)

    def _raise(self, error: Value, operation: str) -> NoReturn:
        if not isinstance(error, BaseException):
            self.lost = True
            raise ConnectionLost("the program raised what is no exception")
        quiet = QUIET & {cls.__name__ for cls in type(error).__mro__}
        in_turn = operation in ("__next__", "__anext__")
        if self.guarded and not in_turn and not quiet <= self.expected:
            raise RuntimeError(f"the program raised {type(error).__name__}")
        raise error

    def _execute(self, operation: str, operands: list[Value], keywords: dict[str, Value]) -> Value:
        if self.guarded:
            self._check(operation, operands)
            if operation == "getattr" and operands[1] == "__code__":
                return _signature(operands[0])
        of_class = _OF_CLASSES.get(operation) if isinstance(operands[0], type) else None
        function = of_class or _FUNCTIONS.get(operation) or getattr(type(operands[0]), operation)
        arguments, named = tuple(operands), dict(keywords)
        # No other reference is left here: only what the program keeps stays shared with it.
        operands.clear()
        keywords.clear()
        return function(*arguments, **named)

    def _check(self, operation: str, operands: list[Value]) -> None:
        """Raise AttributeError where a program may not do something to an object of the tests."""
        subject, *rest = operands
        # What Python has, the program has too: there is no reason to use it over here.
        is_python = isinstance(subject, types.ModuleType) or self._objects.origin(subject)
        if operation in ("getattr", "setattr", "delattr"):
            name = rest[0]
            about = operation == "getattr" and name in _ABOUT_FUNCTIONS
            allowed = type(name) is str and (about or not name.startswith(_INTERNALS))
        else:
            allowed = operation in proxies.SPECIAL_METHODS or operation in ("copy", "deepcopy")
        if is_python or not allowed:
            raise AttributeError(f"{operation} {rest[:1]} of an object of the tests")

    def _send(
        self,
        kind: str,
        operands: list[Value],
        operation: str = "",
        keywords: dict[str, Value] | None = None,
    ) -> None:
        """Write a message, and empty the list of operands.

        Raises:
            ConnectionLost: nobody reads it.
        """
        encode = self._objects.encode
        encoded = []
        while operands:
            encoded.append(encode(operands.pop(0)))
        named = {name: encode(value) for name, value in (keywords or {}).items()}
        updates = [] if self.guarded else self._updates()
        # Last, because it introduces what was encoded.
        changes = self._objects.changes()
        text = json.dumps([kind, changes, updates, encoded, operation, named]).encode()
        try:
            self._channel.sendall(len(text).to_bytes(8, "big") + text)
        except OSError as error:  # an `Exception`, which the tests may expect
            self.lost = True
            raise ConnectionLost(f"{error}") from error

    def _receive(self) -> tuple[str, list[Value], str, dict[str, Value]]:
        """Read a message: its kind, operands, operation and keywords.

        Raises:
            ConnectionLost: there is none.
        """
        try:
            size = int.from_bytes(self._read(8), "big")
            # A hostile program may announce any size.
            if size > MAX_MESSAGE:
                raise ValueError(f"the program answered {size} bytes")
            kind, changes, updates, operands, operation, named = json.loads(self._read(size))
            decode = self._objects.decode
            self._objects.apply(changes)
            for name, data in updates:
                self._update(name, decode(data))
            keywords = {name: decode(value) for name, value in named.items()}
            decoded = [decode(operand) for operand in operands]
            self._objects.forget(changes)
            return kind, decoded, operation, keywords
        except Exception as error:  # what a program writes may fail anywhere
            self.lost = True
            raise ConnectionLost(f"{error}") from error

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._channel.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise EOFError("the program ended before it answered")
            parts += part
        return bytes(parts)

    def _updates(self) -> JsonValue:
        """Return the names that the program has bound since the last message."""
        names = {name: self.space[name] for name in self._reads & self.space.keys()}
        changed = [name for name in names if names[name] is not self.names.get(name, _ABSENT)]
        self.names = names
        return [[name, self._objects.encode(names[name])] for name in sorted(changed)]

    def _update(self, name: str, value: Value) -> None:
        if name not in self._reads:
            raise ValueError(f"{name} is not a name that the tests read")
        # What the tests have bound themselves stays as it is.
        if self.space.get(name, _ABSENT) is self.names.get(name, _ABSENT):
            self.space[name] = value
        self.names[name] = value


def _signature(function: Value) -> types.SimpleNamespace:
    """Return what `inspect.signature` reads of the code of a function, and nothing else."""
    code = function.__code__
    return types.SimpleNamespace(**{name: getattr(code, name) for name in _SIGNATURE})
