"""Stand-ins for objects that live in the other interpreter of a sandbox.

A stand-in (proxy) has a class of its own, made after the class of its object. What one does with it
is done to the object, by a request. In the process of the tests there is one exception, on which
all verdicts rest: a value of the tests is not given to an operator of the program. `answer == 3`
would otherwise be decided by the `__eq__` of a class that the program may have written. This module
imports the standard library alone; see `sandbox_worker.py`.
"""

import abc
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from jax_ordermerge.evaluate import sandbox_values as values
from jax_ordermerge.evaluate.sandbox_values import Value

# The keys under which a proxy keeps what it stands for. No attribute can have such a name.
HANDLE, HASH = "<handle>", "<hash>"

_BINARY = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow"),
    *("lshift", "rshift", "and", "xor", "or"),
)
COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__")
ARITHMETIC = tuple(f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r", "i"))
# Operators without a second operand, and those whose operand says which part is asked for.
QUESTIONS = tuple(
    f"__{name}__"
    for name in (
        *("call", "iter", "next", "reversed", "len", "bool", "getitem", "setitem", "delitem"),
        *("missing", "str", "repr", "format", "bytes", "int", "float", "complex", "index"),
        *("round", "trunc", "floor", "ceil", "abs", "neg", "pos", "invert", "fspath"),
        *("enter", "exit", "await", "aiter", "anext"),
    )
)
# Of the names that Python and libraries reserve only these are asked of the object. Others would
# let it take part where values of the tests are compared, as `__array_function__` does for numpy.
_READABLE = (
    *("__name__", "__qualname__", "__doc__", "__module__", "__wrapped__", "__annotations__"),
    *("__defaults__", "__kwdefaults__", "__code__", "__self__", "__func__", "__members__"),
    *("__dataclass_fields__", "__match_args__", "__version__", "__notes__"),
)
SPECIAL_METHODS = frozenset(COMPARISONS + ARITHMETIC + QUESTIONS)


class Connection(Protocol):
    """What proxies need of `sandbox_rpc.Connection`."""

    guarded: bool
    operable: tuple[type, ...]

    def request(self, operation: str, /, *operands: Value, **keywords: Value) -> Value:
        """Return the result of an operation in the other process."""

    def drop(self, key: int) -> None:
        """Note that no proxy of a key is left."""


class Handle(NamedTuple):
    """What a proxy stands for: an object of the other process, by its key."""

    connection: Connection
    key: int


class ProxyType(abc.ABCMeta):
    """The class of classes that live in the other process."""

    # Derived from ABCMeta because classes of Python with that metaclass can be bases; but what is
    # an instance is told by the MRO.
    __instancecheck__ = type.__instancecheck__
    __subclasscheck__ = type.__subclasscheck__

    def __call__(cls, /, *args: Value, **kwargs: Value) -> Value:
        return _connection(cls).request("__call__", cls, *args, **kwargs)

    def __getattr__(cls, name: str) -> Value:
        return _attribute(cls, name)

    def __setattr__(cls, name: str, value: Value) -> None:
        # ABCMeta itself sets these.
        if name.startswith(("__", "_abc_")):
            type.__setattr__(cls, name, value)
        else:
            _connection(cls).request("setattr", cls, name, value)

    def __delattr__(cls, name: str) -> None:
        _connection(cls).request("delattr", cls, name)

    @property
    def __doc__(cls) -> Value:  # type: ignore[override]
        return _attribute(cls, "__doc__")

    # Without it the length would be asked.
    def __bool__(cls) -> bool:
        return True

    # Enumerations are containers of their members.
    def __getitem__(cls, key: Value) -> Value:
        return _connection(cls).request("__getitem__", cls, key)

    def __iter__(cls) -> Iterator[Value]:
        iterator: Iterator[Value] = _connection(cls).request("__iter__", cls)
        return iterator

    def __len__(cls) -> int:
        return int(_connection(cls).request("__len__", cls))

    def __contains__(cls, item: Value) -> bool:
        return any(item is member or item == member for member in cls)


class Proxy:
    """The base of all classes of proxies."""

    # no attributes, so that classes can also derive from any type of Python
    __slots__ = ()

    # Called only for what the class does not have.
    def __getattr__(self, name: str) -> Value:
        return _attribute(self, name)

    def __setattr__(self, name: str, value: Value) -> None:
        # Python itself sets those of exceptions, with frames of this process; and a value that is
        # being made stands for nothing yet.
        if name.startswith("__") or handle_of(self) is None:
            object.__setattr__(self, name, value)
        else:
            _connection(self).request("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        _connection(self).request("delattr", self, name)

    def __copy__(self) -> Value:
        return _connection(self).request("copy", self)

    def __deepcopy__(self, memo: Value) -> Value:
        return _connection(self).request("deepcopy", self)

    def __del__(self) -> None:
        handle = handle_of(self)
        if handle is not None:
            handle.connection.drop(handle.key)


def handle_of(value: Value) -> Handle | None:
    """Return what a proxy stands for; None for any other object."""
    # By type: isinstance would ask the attribute `__class__`.
    kind = type(value)
    is_proxy = kind is ProxyType or (isinstance(kind, ProxyType) and issubclass(kind, Proxy))
    # A class that tests derive from a proxy has no handle of its own.
    return vars(value).get(HANDLE) if is_proxy else None


def _connection(proxy: Value) -> Connection:
    handle = handle_of(proxy)
    if handle is None:
        raise TypeError("tests cannot derive classes from classes of the program")
    return handle.connection


def _attribute(proxy: Value, name: str) -> Value:
    if name.startswith("__") and name not in _READABLE:
        raise AttributeError(f"{type(proxy).__name__} object has no attribute {name!r}")
    return _connection(proxy).request("getattr", proxy, name)


class Description(NamedTuple):
    """What one process tells the other about a class.

    Attributes:
        name: of the class.
        methods: the special methods that it has beyond those of its base; see
            `sandbox_values.base_type`.
        overrides: the other names of its base that it redefines.
        hashing: "identity", "base", "none", or "sent" where each proxy comes with its hash.
    """

    name: str
    methods: Sequence[str]
    overrides: Sequence[str]
    hashing: str


def describe(kind: type) -> Description:
    """Return the description of a class.

    Example:
        >>> class Even(int):
        ...     def __len__(self):
        ...         return 2
        ...
        ...     def bit_length(self):
        ...         return 0
        >>> describe(Even)
        Description(name='Even', methods=['__len__'], overrides=['bit_length'], hashing='base')
    """
    base = values.base_type(kind)
    attributes: dict[str, Value] = {}
    for cls in reversed(kind.__mro__):
        if cls not in base.__mro__:
            attributes |= vars(cls)
    methods = sorted(
        name for name, value in attributes.items() if name in SPECIAL_METHODS and value is not None
    )
    overrides = sorted(
        name
        for name in attributes
        if base is not object and hasattr(base, name) and not name.startswith("__")
    )
    if base is not object:
        hashing = "base"
    elif "__hash__" in attributes:
        hashing = "none" if attributes["__hash__"] is None else "sent"
    else:
        hashing = "identity"
    return Description(kind.__name__, methods, overrides, hashing)


def make_class(
    description: Description,
    bases: Sequence[type],
    handle: Handle,
    appearance: type | None = None,
) -> ProxyType:
    """Return the class of the proxies of one class.

    Args:
        description: of the class.
        bases: proxies of its bases, types of Python that cross by content, and exceptions.
        handle: of the class itself.
        appearance: what `isinstance` sees, where Python has the class itself.

    Raises:
        ValueError: a name of the description may not be redefined.
    """
    # Not as described: the fallback of operators is a method of what the class really is.
    base = next((cls for cls in map(values.base_type, bases) if cls is not object), object)
    # Methods written in Python ask other methods of the object, which a program may have redefined.
    in_python = {name for name in COMPARISONS + ARITHMETIC if _is_python(getattr(base, name, None))}
    redefined = {attribute: _redefined(attribute) for attribute in description.overrides}
    special = {
        method: _special_method(method, base) for method in {*description.methods, *in_python}
    }
    text = property(lambda self: _attribute(self, "__doc__"))
    namespace: dict[str, Value] = {"__module__": "program", "__doc__": text, **redefined, **special}
    hashes = {"base": base.__hash__, "sent": _sent_hash, "none": None, "identity": object.__hash__}
    namespace["__hash__"] = hashes[description.hashing]
    if appearance is not None:
        namespace["__class__"] = property(lambda self: appearance)
    # first in the MRO: exceptions have methods for attributes of their own
    first = () if any(issubclass(cls, Proxy) for cls in bases) else (Proxy,)
    cls = ProxyType(description.name, (*first, *bases), namespace)
    type.__setattr__(cls, HANDLE, handle)
    return cls


def _special_method(name: str, base: type) -> Callable[..., Value]:
    if name not in SPECIAL_METHODS:
        raise ValueError(f"{name} is not a special method")
    if name == "__exit__":
        return _exit
    return _question(name) if name in QUESTIONS else _operator(name, base)


def _question(name: str) -> Callable[..., Value]:
    def method(self: Value, /, *args: Value, **kwargs: Value) -> Value:
        return _connection(self).request(name, self, *args, **kwargs)

    return method


def _exit(self: Value, kind: Value, error: Value, traceback: Value) -> Value:
    connection = _connection(self)
    result = connection.request("__exit__", self, kind, error, None)
    # A program that could end a block of the tests early would pass the assertions in it.
    return None if connection.guarded else result


def _operator(name: str, base: type) -> Callable[..., Value]:
    inherited = getattr(base, name, None)

    def method(self: Value, /, *operands: Value) -> Value:
        connection = _connection(self)
        # The rule of this module.
        if (
            not connection.guarded
            or all(handle_of(operand) for operand in operands)
            or (name in ARITHMETIC and isinstance(self, connection.operable))
        ):
            return connection.request(name, self, *operands)
        if inherited is not None:
            content = values.plain(self, base) if _is_python(inherited) else self
            return inherited(content, *operands)
        if name == "__contains__":
            return any(operands[0] is item or operands[0] == item for item in self)
        return NotImplemented

    return method


def _is_python(method: Value) -> bool:
    return isinstance(method, types.FunctionType)


def _redefined(name: str) -> property:
    if name.startswith("__"):
        raise ValueError(f"{name} is not an attribute")
    return property(
        lambda self: _connection(self).request("getattr", self, name),
        lambda self, value: _connection(self).request("setattr", self, name, value),
    )


def _sent_hash(self: Value) -> int:
    number = vars(self)[HASH]
    if number is None:
        raise TypeError(f"unhashable type: '{type(self).__name__}'")
    return int(number)
