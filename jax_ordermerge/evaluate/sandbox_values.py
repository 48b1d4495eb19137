"""Types whose values cross between the two interpreters of a sandbox by their content.

A value arrives as an object of the receiver's own type, made from parts that are values again. So
an `==` between it and a value of the tests is Python's, whatever the program does. Types are
named, and only the names of this file are accepted: unlike pickle, no message can call anything
else. This module imports the standard library alone; see `sandbox_worker.py`.
"""

import builtins
import collections
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Value = Any  # any Python object
JsonValue = Any  # what `json` reads and writes: a list, an object or a scalar
Parts = Sequence[Value]
SCALARS = (str, float, bool, type(None))  # JSON has these; `json` writes NaN and infinities too


class Codec(NamedTuple):
    """How values of a type are taken apart and made.

    Attributes:
        parts: the content of a value.
        make: `(class, parts) -> value`, where the class is the type or a subclass of it. Of a
            mutable type the parts are those of `fixed`, and the value is filled afterwards, so
            that it may contain itself.
        fill: `(value, parts) -> None` replaces the content; None for immutable types.
        fixed: the parts that a mutable value keeps for life.
    """

    parts: Callable[[Value], Parts]
    make: Callable[[type, Parts], Value]
    fill: Callable[[Value, Parts], None] | None = None
    fixed: Callable[[Value], Parts] = lambda value: ()


Factory = Callable[[Value], Codec]  # from the type


# Methods are taken from the type and not from the value: a subclass may override them.
def _constructor(parts: Callable[[Value], Parts]) -> Factory:
    """Return the codec of immutable types whose `__new__` takes the parts."""
    return lambda kind: Codec(parts, lambda cls, parts: kind.__new__(cls, *parts))


def _function(parts: Callable[[Value], Parts], make: Callable[..., Value]) -> Factory:
    """Return the codec of immutable types that a function makes of the parts."""
    return lambda kind: Codec(parts, lambda cls, parts: make(*parts))


def _collection(kind: Value) -> Codec:
    return Codec(
        lambda value: list(kind.__iter__(value)),
        lambda cls, parts: kind.__new__(cls, parts),
    )


def _moment(*fields: str) -> Factory:
    """Return the codec of `datetime` and `time`, whose `fold` is a keyword."""

    def build(kind: Value) -> Codec:
        return Codec(
            lambda value: [getattr(value, field) for field in (*fields, "fold")],
            lambda cls, parts: kind.__new__(cls, *parts[:-1], fold=parts[-1]),
        )

    return build


def _list(kind: type) -> Codec:
    return Codec(
        list.copy,
        lambda cls, fixed: list.__new__(cls),
        lambda value, parts: list.__setitem__(value, slice(None), parts),
    )


def _set(kind: type) -> Codec:
    def fill(value: Value, parts: Parts) -> None:
        set.clear(value)
        set.update(value, parts)

    return Codec(lambda value: list(set.__iter__(value)), lambda cls, _: set.__new__(cls), fill)


def _dict(kind: Value) -> Codec:
    """Return the codec of dict, OrderedDict and Counter: keys and values in turn."""

    def fill(value: Value, parts: Parts) -> None:
        kind.clear(value)
        for key, item in zip(parts[::2], parts[1::2], strict=True):
            dict_type.__setitem__(value, key, item)

    # Counter inherits; OrderedDict keeps an order of its own, which dict's methods would corrupt.
    dict_type = kind if kind.__name__ == "OrderedDict" else dict
    return Codec(
        lambda value: [part for item in dict_type.items(value) for part in item],
        lambda cls, fixed: kind.__new__(cls),
        fill,
    )


def _defaultdict(kind: Value) -> Codec:
    plain = _dict(kind)

    def fill(value: Value, parts: Parts) -> None:
        # A program may change the factory, so it is content. Set by the descriptor of the type,
        # past an attribute of this name in a subclass.
        kind.default_factory.__set__(value, parts[0])
        assert plain.fill is not None
        plain.fill(value, parts[1:])

    return Codec(lambda value: [value.default_factory, *plain.parts(value)], plain.make, fill)


def _deque(kind: Value) -> Codec:
    def make(cls: type, fixed: Parts) -> Value:
        value = kind.__new__(cls)
        # `maxlen` cannot be changed later, so it is no content.
        kind.__init__(value, (), *fixed)
        return value

    def fill(value: Value, parts: Parts) -> None:
        kind.clear(value)
        kind.extend(value, parts)

    return Codec(lambda value: list(kind.__iter__(value)), make, fill, lambda value: [value.maxlen])


def _bytearray(kind: type) -> Codec:
    return Codec(
        lambda value: [bytes(value)],
        lambda cls, fixed: bytearray.__new__(cls),
        lambda value, parts: bytearray.__setitem__(value, slice(None), parts[0]),
    )


def _array(kind: Value) -> Codec:
    def fill(value: Value, parts: Parts) -> None:
        kind.__delitem__(value, slice(None))
        kind.frombytes(value, parts[0])

    return Codec(
        lambda value: [kind.tobytes(value)],
        lambda cls, fixed: kind.__new__(cls, *fixed),
        fill,
        lambda value: [value.typecode],
    )


def _ndarray(kind: Value) -> Codec:
    import numpy as np

    def parts(value: Value) -> Parts:
        return list(value.flat) if value.dtype.hasobject else [value.tobytes()]

    def fill(value: Value, parts: Parts) -> None:
        # objects have no bytes that mean anything elsewhere
        if value.dtype.hasobject:
            value.flat = parts
        else:
            value[...] = np.frombuffer(parts[0], value.dtype).reshape(value.shape)

    return Codec(
        parts,
        lambda cls, fixed: kind.__new__(cls, fixed[1], np.dtype(fixed[0])),
        fill,
        lambda value: [value.dtype.str, value.shape],
    )


def _numpy_scalar(dtype: str, data: bytes) -> Value:
    import numpy as np

    return np.frombuffer(data, np.dtype(dtype))[0]


def _state(kind: Value) -> Codec:
    """Return the codec of classes written in Python: names and values of their attributes."""
    slots = [name for cls in kind.__mro__ for name in getattr(cls, "__slots__", ())]

    def parts(value: Value) -> Parts:
        # a slot that was never set has no value
        state = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        state |= getattr(value, "__dict__", {})
        # not what Python or a proxy keeps there
        attributes = [item for item in state.items() if item[0][:1] != "<" and item[0][:2] != "__"]
        return [part for item in attributes for part in item]

    def fill(value: Value, parts: Parts) -> None:
        for name, item in zip(parts[::2], parts[1::2], strict=True):
            if name.startswith(("<", "__")):
                # a program could write the handle of a proxy, or the class of an object
                raise ValueError(f"{name} is no attribute of a {kind.__name__}")
            object.__setattr__(value, name, item)

    return Codec(parts, lambda cls, fixed: kind.__new__(cls), fill)


def _views(name: str) -> dict[str, Factory]:
    prefix = f"builtins.{name}"
    return {
        f"{prefix}_keys": _function(list, lambda *keys: dict.fromkeys(keys).keys()),
        f"{prefix}_values": _function(list, lambda *values: dict(enumerate(values)).values()),
        f"{prefix}_items": _function(list, lambda *items: dict(items).items()),
    }


def _exact(kind: Value) -> Codec:
    """Return the codec of subclasses of scalars, whose content is a scalar."""
    # of the type itself: `__str__` of a subclass may say anything
    convert = {str: str.__str__, int: int.__int__, float: float.__float__}[kind]
    return Codec(lambda value: [convert(value)], lambda cls, parts: kind.__new__(cls, *parts))


CODECS: dict[str, Factory] = {
    # Only the content of subclasses comes here: plain ones are scalars of JSON.
    "builtins.str": _exact,
    "builtins.int": _exact,
    "builtins.float": _exact,
    "builtins.complex": _constructor(lambda value: [value.real, value.imag]),
    "builtins.tuple": _collection,
    "builtins.frozenset": _collection,
    "builtins.bytes": lambda kind: Codec(
        lambda value: [bytes.hex(value)],
        lambda cls, parts: bytes.__new__(cls, bytes.fromhex(parts[0])),
    ),
    "builtins.memoryview": _function(lambda value: [value.tobytes()], memoryview),
    "builtins.range": _constructor(lambda value: [value.start, value.stop, value.step]),
    "builtins.slice": _constructor(lambda value: [value.start, value.stop, value.step]),
    "builtins.ellipsis": _constructor(lambda value: []),
    "builtins.NotImplementedType": _constructor(lambda value: []),
    "builtins.mappingproxy": _constructor(lambda value: [dict(value)]),
    **_views("dict"),
    **_views("odict"),
    "fractions.Fraction": _constructor(lambda value: [value.numerator, value.denominator]),
    "decimal.Decimal": _constructor(lambda value: [str(value)]),
    "datetime.date": _constructor(lambda value: [value.year, value.month, value.day]),
    "datetime.time": _moment("hour", "minute", "second", "microsecond", "tzinfo"),
    "datetime.datetime": _moment(
        *("year", "month", "day", "hour", "minute", "second", "microsecond", "tzinfo")
    ),
    "datetime.timedelta": _constructor(
        lambda value: [value.days, value.seconds, value.microseconds]
    ),
    "datetime.timezone": _constructor(lambda value: value.__getinitargs__()),
    "zoneinfo.ZoneInfo": _constructor(lambda value: [value.key]),
    "re.Pattern": _function(
        lambda value: [value.pattern, value.flags],
        lambda *arguments: importlib.import_module("re").compile(*arguments),
    ),
    "pathlib.PurePosixPath": _constructor(lambda value: [str(value)]),
    "pathlib.PosixPath": _constructor(lambda value: [str(value)]),
    # By dtype and bytes: exact also for float16 and for NaN with a payload.
    "numpy.generic": _function(lambda value: [value.dtype.str, value.tobytes()], _numpy_scalar),
    "builtins.list": _list,
    "builtins.dict": _dict,
    "builtins.set": _set,
    "builtins.bytearray": _bytearray,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _defaultdict,
    "collections.deque": _deque,
    "array.array": _array,
    "numpy.ndarray": _ndarray,
    "collections.ChainMap": _state,
    "collections.UserDict": _state,
    "collections.UserList": _state,
    "collections.UserString": _state,
    "types.SimpleNamespace": _state,
    "uuid.UUID": _state,
    "ipaddress.IPv4Address": _state,
    "ipaddress.IPv6Address": _state,
    "ipaddress.IPv4Network": _state,
    "ipaddress.IPv6Network": _state,
}
# Types that their module does not name.
_ORDERED: collections.OrderedDict[str, str] = collections.OrderedDict()
_HIDDEN: tuple[type, ...] = (
    *(type(...), type(NotImplemented), type(type.__dict__)),
    *(type({}.keys()), type({}.values()), type({}.items())),
    *(type(_ORDERED.keys()), type(_ORDERED.values()), type(_ORDERED.items())),
)
_UNNAMED = {f"builtins.{cls.__name__}": cls for cls in _HIDDEN}


@functools.cache
def codec(name: str) -> Codec:
    """Return the codec of a name of `CODECS`.

    Raises:
        KeyError: there is none.

    Example:
        >>> codec("builtins.range").make(range, (1, 9, 2))
        range(1, 9, 2)
    """
    factory = CODECS[name]
    return factory(find_type(name))


def find_type(name: str) -> Value:
    """Return the type of a name of `CODECS`, or the builtin exception of a name.

    Raises:
        KeyError: it is neither.

    Example:
        >>> find_type("collections.Counter"), find_type("builtins.KeyError")
        (<class 'collections.Counter'>, <class 'KeyError'>)
    """
    module, _, attribute = name.rpartition(".")
    if name in _UNNAMED:
        return _UNNAMED[name]
    kind = getattr(importlib.import_module(module), attribute) if name in CODECS else None
    if kind is None and module == "builtins":
        kind = getattr(builtins, attribute, None)
        kind = kind if isinstance(kind, type) and is_exception(kind) else None
    if kind is None:
        raise KeyError(name)
    return kind


_names: dict[type, str | None] = {}


def type_name(kind: type) -> str | None:
    """Return the name of a type in `CODECS`, None where its values do not cross by content.

    Example:
        >>> type_name(list), type_name(type({}.keys())), type_name(object)
        ('builtins.list', 'builtins.dict_keys', None)
    """
    try:
        return _names[kind]
    except KeyError:
        pass
    name = _numpy_name(kind) or f"{kind.__module__}.{kind.__qualname__}"
    # By identity: a program may have a class of the same name.
    has_codec = name in CODECS and (name == "numpy.generic" or find_type(name) is kind)
    # Kept by the class itself: a program may rename one.
    _names[kind] = name if has_codec else None
    return _names[kind]


def _numpy_name(kind: type) -> str | None:
    generic = getattr(sys.modules.get("numpy"), "generic", None)
    # Scalars have many types. Those of records have no name that another process understands.
    is_scalar = generic is not None and issubclass(kind, generic) and kind.__name__ != "void"
    return "numpy.generic" if is_scalar and kind.__module__ == "numpy" else None


def base_type(kind: type) -> type:
    """Return the first class of the MRO of a class whose values cross by content, or `object`.

    Exceptions of Python itself count as such classes.

    Example:
        >>> class Point(tuple):
        ...     pass
        >>> base_type(Point), base_type(KeyError), base_type(type(print))
        (<class 'tuple'>, <class 'KeyError'>, <class 'object'>)
    """
    # In the order of the MRO: of a named tuple it is `tuple`, of an enumeration of integers `int`.
    for cls in kind.__mro__:
        if type_name(cls) or is_exception(cls):
            return cls
    return object


def plain(value: Value, kind: type) -> Value:
    """Return the content of an object of a subclass, as an object of the type itself."""
    name = type_name(kind)
    assert name is not None
    kind_codec = codec(name)
    parts = kind_codec.parts(value)
    if kind_codec.fill is None:
        return kind_codec.make(kind, parts)
    result = kind_codec.make(kind, kind_codec.fixed(value))
    kind_codec.fill(result, parts)
    return result


def is_exception(kind: type) -> bool:
    """Return whether a class is an exception of Python itself, and not of a module or a program."""
    return issubclass(kind, BaseException) and getattr(builtins, kind.__name__, None) is kind
