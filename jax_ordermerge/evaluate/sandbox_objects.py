"""What both interpreters of a sandbox know, and how it is written.

- Values of `sandbox_values.CODECS` cross by content. Mutable ones are shared: both sides have a
  copy under the same key, and a message brings the new content of those that were changed.
- Everything else stays where it is and crosses as a proxy (`sandbox_proxies`): generators,
  functions, classes and their instances. An instance of a class that is derived from a type with a
  codec, such as a named tuple, is both: content for comparisons, a proxy for its methods.

Keys are positive where the process of the tests made them, negative where that of the program did.
This module imports the standard library alone; see `sandbox_worker.py`.
"""

import functools
import importlib
import operator
import sys
import types
import weakref
from collections import deque
from collections.abc import Sequence

from jax_ordermerge.evaluate import sandbox_proxies as proxies
from jax_ordermerge.evaluate import sandbox_values as values
from jax_ordermerge.evaluate.sandbox_values import JsonValue, Value

_UNNAMED_TYPES = {kind.__name__: kind for kind in vars(types).values() if isinstance(kind, type)}
_WORKER = tuple(
    f"{__name__.removesuffix('objects')}{part}" for part in ("proxies", "objects", "rpc")
)


class Objects:
    """The objects of one process that the other one knows, and the proxies of the other's.

    Args:
        connection: of the process.
        packages: packages beside the standard library that both sides can import.
    """

    def __init__(self, connection: proxies.Connection, packages: Sequence[str]) -> None:
        self._connection = connection
        self._importable = sys.stdlib_module_names | set(packages)
        # Key 0 is an object without other references; see `_release`.
        self._objects: dict[int, Value] = {0: []}
        self._keys: dict[int, int] = {}  # by id, which `_objects` keeps valid
        self._opaque: dict[int, tuple[int, int | None]] = {}  # of this side: key of the class, hash
        # Shared values, and the parts of them that both sides know.
        self._shared: dict[int, values.Codec] = {}
        self._snapshots: dict[int, values.Parts] = {}
        # Of the other side: proxies of opaque objects, descriptions of classes, classes of proxies.
        self._proxies: weakref.WeakValueDictionary[int, Value] = weakref.WeakValueDictionary()
        self._dropped: set[int] = set()
        self._descriptions: dict[int, JsonValue] = {}
        self._classes: dict[int, proxies.ProxyType] = {}
        # What the message that is being written introduces.
        self._entries: list[JsonValue] = []
        self._unsent: deque[int] = deque()
        self._count = 0

    def drop(self, key: int) -> None:
        """Note that a proxy has gone; the object may then go, too."""
        # The other side may have sent it again in the meantime.
        if key not in self._objects and self._proxies.get(key) is None:
            self._dropped.add(key)

    # Writing ------------------------------------------------------------------------------------

    def encode(self, value: Value) -> JsonValue:
        """Return a value as JSON, of which `changes` may have to introduce parts."""
        kind = type(value)
        if kind in values.SCALARS:
            return value
        if kind is int:
            # Decimal digits of large numbers take quadratic time.
            return value if -(1 << 64) < value < 1 << 64 else ["int", hex(value)]
        name = values.type_name(kind)
        if name is not None and values.codec(name).fill is None:
            return [name, self._encode_all(values.codec(name).parts(value))]
        # With attributes of its own it crosses as a proxy: they may be anything.
        if values.is_exception(kind) and not vars(value):
            return [f"builtins.{kind.__name__}", *self._encode_exception(value)]
        key = self._key(value)
        return ["@", key, *self._opaque[key]] if key in self._opaque else ["#", key]

    def changes(self) -> JsonValue:
        """Return what the other side must know before it can decode what was encoded.

        These are descriptions of new objects, contents of shared values that are new or have
        changed, keys of values that are no longer shared, and keys of which no proxy is left.
        """
        for key, snapshot in self._snapshots.items():
            if not _same(self._shared[key].parts(self._objects[key]), snapshot):
                self._unsent.append(key)
        contents: list[JsonValue] = []
        # A queue and no recursion: lists may be nested deeply.
        while self._unsent:
            key = self._unsent.popleft()
            contents.append([key, self._encode_all(self._shared[key].parts(self._objects[key]))])
        released: list[int] = []
        if self._connection.guarded:
            self._take_snapshots([key for key, _ in contents])
        else:
            # References from snapshots would count as some of the program.
            self._snapshots = {}
            released = self._release()
            self._take_snapshots(list(self._shared))
        entries, self._entries = self._entries, []
        dropped, self._dropped = sorted(self._dropped), set()
        return [entries, contents, released, dropped]

    def _encode_all(self, parts: values.Parts) -> JsonValue:
        kinds = set(map(type, parts))
        # Most lists hold nothing but strings or small numbers, which JSON has.
        if kinds <= {str, float, bool, type(None)} or (
            kinds == {int} and max(map(abs, parts)) < 1 << 64
        ):
            return list(parts)
        return [self.encode(part) for part in parts]

    def _encode_exception(self, error: BaseException) -> JsonValue:
        return [self._encode_all(error.args), self.encode(error.__cause__)]

    def _key(self, value: Value) -> int:
        handle = proxies.handle_of(value)
        key = self._keys.get(id(value)) if handle is None else handle.key
        return self._introduce(value) if key is None else key

    def _introduce(self, value: Value) -> int:
        """Give an object a key, and describe it to the other side."""
        if type(value).__module__ in _WORKER:
            raise TypeError(f"a {type(value).__name__} of the sandbox itself is not passed on")
        shared = name = values.type_name(type(value))
        if isinstance(value, type):
            entry = self._describe_class(value)
        elif isinstance(value, types.ModuleType) and self._is_importable(value):
            entry = ["module", value.__name__]
        elif self._connection.guarded and (origin := self.origin(value)):
            # A function of Python: the program has the same one, and must not run it over here.
            entry = ["function", *origin]
        elif name is not None:
            entry = ["shared", name, self._encode_all(values.codec(name).fixed(value))]
        else:
            shared, entry = self._describe_instance(value)
        self._count += 1
        # by sign: each side numbers its objects without asking the other
        key = self._count if self._connection.guarded else -self._count
        self._objects[key], self._keys[id(value)] = value, key
        if entry[0] == "opaque":
            self._opaque[key] = (entry[1], entry[2])
        else:
            self._entries.append([key, *entry])
        if shared is not None and values.codec(shared).fill is not None:
            self._shared[key] = values.codec(shared)
            self._unsent.append(key)
        return key

    def _describe_instance(self, value: Value) -> tuple[str | None, JsonValue]:
        """Return the name of the codec of an object, if it has one, and its description."""
        kind = type(value)
        base, key = values.base_type(kind), self._key(kind)
        if base is object:
            return None, ["opaque", key, _hash(value)]
        if values.is_exception(base):
            return None, ["instance", key, *self._encode_exception(value)]
        name = values.type_name(base)
        assert name is not None
        codec = values.codec(name)
        # The content of a mutable value follows: it may contain the value itself.
        parts = codec.parts(value) if codec.fill is None else codec.fixed(value)
        return name, ["instance", key, self._encode_all(parts)]

    def _describe_class(self, kind: type) -> JsonValue:
        bases = [self._key(cls) for cls in kind.__bases__ if cls is not object]
        return ["class", self.origin(kind), bases, *proxies.describe(kind)]

    def origin(self, value: Value) -> tuple[str, str] | None:
        """Return module and name under which Python itself has an object, or None."""
        owner = getattr(value, "__objclass__", value)
        module, name = getattr(owner, "__module__", None), getattr(value, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(name, str):
            return None
        return (module, name) if self._find(module, name, imports=False) is value else None

    def _release(self) -> list[int]:
        """Forget shared values that nothing in this process refers to; return their keys.

        From then on they belong to the tests alone. Without it the cost of a call would grow with
        the arguments of all calls before.
        """
        unshared = self._references(0)
        released = []
        for key in list(self._shared):
            # A proxy needs its object.
            is_plain = values.type_name(type(self._objects[key])) is not None
            if is_plain and self._references(key) <= unshared:
                released.append(key)
                self._forget(key)
        return released

    def _references(self, key: int) -> int:
        return sys.getrefcount(self._objects[key])

    def _forget(self, key: int) -> None:
        self._shared.pop(key, None)
        self._snapshots.pop(key, None)
        self._opaque.pop(key, None)
        self._keys.pop(id(self._objects.pop(key)), None)

    def _take_snapshots(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._snapshots[key] = self._shared[key].parts(self._objects[key])

    # Reading ------------------------------------------------------------------------------------

    def apply(self, changes: JsonValue) -> None:
        """Make what `changes` of the other side introduces.

        Raises:
            Exception: of any kind where it makes no sense.
        """
        entries, contents, _, _ = changes
        for key, kind, *description in entries:
            self._add(key, kind, description)
        for key, parts in contents:
            fill = self._shared[key].fill
            assert fill is not None
            fill(self._objects[key], [self.decode(part) for part in parts])
        self._take_snapshots([key for key, _ in contents])

    def forget(self, changes: JsonValue) -> None:
        """Forget what `changes` says, after all of its message is decoded."""
        _, _, released, dropped = changes
        for key in released:
            self._forget(key)
        for key in dropped:
            if key in self._opaque:
                self._forget(key)

    def decode(self, data: JsonValue) -> Value:
        """Return the value that was encoded."""
        if not isinstance(data, list):
            return data
        name, inner = data[:2]
        if name == "#":
            return self._objects[inner]
        if name == "@":
            return self._proxy(*data[1:])
        if name == "int":
            return int(inner, 16)
        parts = [self.decode(part) for part in inner]
        if name not in values.CODECS:
            error = values.find_type(name)(*parts)
            error.__cause__ = self.decode(data[2])
            return error
        codec = values.codec(name)
        if codec.fill is not None:
            raise ValueError(f"a {name} without a key")
        return codec.make(values.find_type(name), parts)

    def _add(self, key: int, kind: str, description: JsonValue) -> None:
        value: Value
        # otherwise a program could put an object in the place of one of the tests
        if key in self._objects or (key > 0) == self._connection.guarded:
            raise ValueError(f"{key} is not a new key of the other side")
        if kind == "class":
            self._descriptions[key] = description
            cls = self._python_class(key)
            usable = cls is not None and (not self._connection.guarded or _is_data(cls))
            value = cls if usable else self._class(key)
        elif kind == "instance":
            value = self._instance(key, *description)
        elif kind == "shared":
            value = self._share(key, *description)
        elif kind == "module" and description[0].partition(".")[0] in self._importable:
            value = importlib.import_module(description[0])
        elif kind == "function" and not self._connection.guarded:
            value = self._find(*description, imports=True)
        else:
            raise ValueError(f"{kind} {description} is not accepted")
        self._objects[key] = value
        self._keys[id(value)] = key

    def _share(self, key: int, name: str, fixed: JsonValue) -> Value:
        codec = self._shared[key] = values.codec(name)
        return codec.make(values.find_type(name), [self.decode(part) for part in fixed])

    def _instance(
        self, key: int, class_key: int, encoded: JsonValue, cause: JsonValue = None
    ) -> Value:
        """Return an object with content that is also a proxy; `cause` is that of an exception."""
        cls: Value = self._class(class_key)
        base = values.base_type(cls)
        parts = [self.decode(part) for part in encoded]
        name = values.type_name(base)
        if name is None:
            value = cls.__new__(cls, *parts)
            value.__cause__ = self.decode(cause)
        else:
            codec = values.codec(name)
            value = codec.make(cls, parts)
            if codec.fill is not None:
                self._shared[key] = codec
        vars(value)[proxies.HANDLE] = proxies.Handle(self._connection, key)
        return value

    def _proxy(self, key: int, class_key: int, hash_value: int | None) -> Value:
        """Return the proxy of an opaque object: the same one as long as it lives."""
        proxy = self._proxies.get(key)
        if proxy is None:
            cls: Value = self._class(class_key)
            proxy = object.__new__(cls)
            handle = proxies.Handle(self._connection, key)
            proxy.__dict__ |= {proxies.HANDLE: handle, proxies.HASH: hash_value}
            self._proxies[key] = proxy
            self._dropped.discard(key)
        return proxy

    def _class(self, key: int) -> proxies.ProxyType:
        """Return the class of the proxies of a class."""
        if key not in self._classes:
            _, base_keys, *description = self._description(key)
            appearance = self._python_class(key)
            bases = [self._base(base_key) for base_key in base_keys]
            if appearance is not None and _has_content(appearance):
                bases, appearance = [appearance], None
            handle = proxies.Handle(self._connection, key)
            self._classes[key] = proxies.make_class(
                proxies.Description(*description), bases, handle, appearance
            )
        return self._classes[key]

    def _base(self, key: int) -> type:
        cls = self._python_class(key)
        return cls if cls is not None and _has_content(cls) else self._class(key)

    def _description(self, key: int) -> JsonValue:
        if key not in self._descriptions:
            # A class that this side has introduced itself: functions, for example, have one class.
            self._descriptions[key] = self._describe_class(self._objects[key])[1:]
        return self._descriptions[key]

    def _python_class(self, key: int) -> type | None:
        """Return the class of Python that a class of the other side is, or None."""
        origin = self._description(key)[0]
        cls = origin and self._find(*origin, imports=not self._connection.guarded)
        return cls if isinstance(cls, type) else None

    def _is_importable(self, module: types.ModuleType) -> bool:
        is_known = module.__name__.partition(".")[0] in self._importable
        return is_known and sys.modules.get(module.__name__) is module

    def _find(self, module: str, name: str, *, imports: bool) -> Value:
        """Return what Python has under a name, None where it has nothing."""
        if module.partition(".")[0] not in self._importable:
            return None
        # The tests have imported what they know.
        if imports or f"{module}.{name}" in values.CODECS:
            importlib.import_module(module)
        try:
            return functools.reduce(getattr, name.split("."), sys.modules.get(module))
        except AttributeError:
            return _UNNAMED_TYPES.get(name) if module == "builtins" else None


def _same(parts: values.Parts, snapshot: values.Parts) -> bool:
    # By identity: a part that has itself changed is shared too. Bytes are made anew each time.
    return (len(parts) == len(snapshot) and all(map(operator.is_, parts, snapshot))) or (
        set(map(type, parts)) == {bytes} and parts == snapshot
    )


def _hash(value: Value) -> int | None:
    try:
        return hash(value)
    except Exception:  # of a method that a program wrote
        return None


def _has_content(cls: type) -> bool:
    return values.type_name(cls) is not None or issubclass(cls, BaseException)


def _is_data(cls: type) -> bool:
    """Return whether tests may use a class of Python that the program names.

    Not any class: `unittest.mock` has objects that are equal to all.
    """
    return _has_content(cls) or cls.__module__ in ("builtins", "numpy")
