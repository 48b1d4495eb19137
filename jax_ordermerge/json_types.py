"""The types of JSON values: of configs, logs and results, and of the rows of data files.

A file may hold anything under any key, and mypy cannot know what. So an object is open, and
whoever reads a key of it checks the value there.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

# Not the union of scalars, lists and objects: each use would need a cast where a check stands.
JsonValue: TypeAlias = Any
Json: TypeAlias = dict[str, JsonValue]  # an object
JsonRow: TypeAlias = Mapping[str, JsonValue]  # an object that is only read
