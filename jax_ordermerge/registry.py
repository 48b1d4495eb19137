"""Tables of things that have a name in a config: merge methods, optimizers, task kinds, targets.

A table and the package of its entries belong together: each module of the package registers what
it defines, so an addition is one new module. Code outside the project registers in the same way.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from jax_ordermerge.errors import UserError, did_you_mean

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """A table of entries by name, in the order in which they were registered.

    Args:
        noun: what an entry is, for error messages, e.g. "merge method".
        package: dotted name of the package whose modules register the built-in entries. They are
            imported when the table is first read, not before: reading a config then stays cheap,
            and a package may use the table that its own modules fill.

    Example:
        >>> shapes = Registry[int]("shape")
        >>> shapes.register("square", 4)
        >>> shapes["square"], list(shapes)
        (4, ['square'])
        >>> shapes["squere"]
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: unknown shape 'squere' (did you mean 'square'?)
    """

    def __init__(self, noun: str, package: str | None = None) -> None:
        self._noun, self._package = noun, package
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
            ValueError: the name is in use. Replacing an entry would change what a config means.
        """
        if name in self._entries:
            raise ValueError(f"{self._noun} '{name}' is registered already")
        self._entries[name] = entry

    def unregister(self, name: str) -> None:
        """Remove an entry, so that a test leaves the table as it was."""
        del self._entries[name]

    def _load(self) -> None:
        package, self._package = self._package, None  # first, because modules may read the table
        if package is not None:
            for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{info.name}")

    def __getitem__(self, name: str) -> Entry:
        # An unknown name is an error as late as this: all modules have registered their entries.
        self._load()
        if name not in self._entries:
            raise UserError(f"unknown {self._noun} '{name}'{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._entries)

    def __len__(self) -> int:
        self._load()
        return len(self._entries)
