"""Tokenized examples of sources, kept on the disk between runs.

A file is named by a digest of all that the examples depend on: the bytes of the data, the settings,
the tokenizer with its chat template, the code of this package, and the versions of the libraries
that tokenize. There is nothing to invalidate: other inputs have another name. A file that is
damaged has another digest than it begins with, and is written again.

`ORDERMERGE_EXAMPLE_CACHE` names the directory, by default `examples` in the cache of
`user_cache`; `off` keeps nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from jax_ordermerge import config as schema
from jax_ordermerge import user_cache
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config.data import DataSource
from jax_ordermerge.data import dates, files
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.data.listing import list_files
from jax_ordermerge.data.provenance import DataFile, SourceInfo
from jax_ordermerge.json_types import JsonValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The files that were used longest ago go first.
LIMIT_BYTES: Final = 20 * 2**30
LIBRARIES: Final = ("transformers", "tokenizers", "jinja2", "pyarrow")
# Settings that change no example of a source. Any other setting changes the name of the file.
IRRELEVANT_SETTINGS: Final = frozenset(
    {"train", "test", "validation_examples", "test_examples", "allow_overlap", "packing", "buckets"}
)
# Classes whose fields are stored one by one: a new field is stored, or its type refused.
RECORDS: Final = {record.__name__: record for record in (Examples, SourceInfo, DataFile)}
_DIGEST_BYTES: Final = 32


class Entry(NamedTuple):
    """A file of the cache, and the digests of the data files that it was made from, by name."""

    path: Path
    digests: dict[str, str]


def directory() -> Path | None:
    """Return the directory of the cache, None where it is off."""
    setting = os.environ.get("ORDERMERGE_EXAMPLE_CACHE", "")
    if setting.lower() == "off":
        return None
    try:
        return Path(setting).expanduser() if setting else user_cache.directory() / "examples"
    except RuntimeError:  # a user without a home, as in some containers
        return None


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return a digest of what a tokenizer does to texts and conversations.

    None where the cache is off, and where that is not all in its state: a tokenizer in Python is
    code.
    """
    if directory() is None or not tokenizer.is_fast:
        return None
    tokenizer("a")  # sets the padding and truncation, which are part of the state, to none
    clock = dates.today().isoformat() if dates.reads_clock(tokenizer) else ""
    state = (
        type(tokenizer).__qualname__,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        list(tokenizer.all_special_tokens),
        bool(getattr(tokenizer, "split_special_tokens", False)),
        clock,
    )
    return _digest(state)


def locate(
    source: DataSource, settings: schema.Data, split: str, tokenizer: str | None
) -> Entry | None:
    """Return the file of the examples of a source, which need not exist.

    None where the cache is off, or where not all that the examples depend on can be seen: a dataset
    of the hub is no file.

    Args:
        source: what is read.
        settings: of this source.
        split: of a generated dataset that names none.
        tokenizer: its `fingerprint`.

    Raises:
        UserError: see `listing.list_files`.
    """
    folder = directory()
    listing = None if source.path.startswith(files.GENERATED) else list_files(source.path)
    is_hub = listing is None and not source.path.startswith(files.GENERATED)
    if folder is None or tokenizer is None or is_hub:
        return None
    try:
        digests = (
            {name: remote.file_digest(path) for name, path in listing.files} if listing else {}
        )
    except OSError:  # the reader says what is wrong with the file
        return None
    inputs = (
        source.model_dump(mode="json", exclude={"name", "weight"}),
        settings.model_dump(mode="json", exclude=set(IRRELEVANT_SETTINGS)),
        split,
        list(digests.items()),
        listing.passed_over if listing else (),
        tokenizer,
        _code_digest(),
        [importlib.metadata.version(name) for name in LIBRARIES],
    )
    return Entry(folder / f"{_digest(inputs)}.examples", digests)


def read(entry: Entry, source: DataSource) -> Examples | None:
    """Return the examples of a source in a file, None where it is absent or damaged."""
    examples = load(entry.path)
    if examples is None:
        return None
    # Name and weight change no example, so they are those of the config and not of the file.
    (info,) = examples.sources
    info = dataclasses.replace(info, name=source.label, weight=source.weight)
    result: Examples = dataclasses.replace(examples, sources=(info,))
    return result


def load(path: Path) -> Any:
    """Return what `store` wrote to a file, None where it is absent or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a cache that others write may be read only
        os.utime(path)
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    # Examples that are silently others would be the worst outcome of a cache.
    if hashlib.sha256(payload).digest() != digest:
        return None
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        return _unpack(json.loads(arrays["tree"].tobytes()), arrays)


def write(entry: Entry, examples: Examples) -> None:
    """Write examples to a file, which appears when it is complete. A full disk is no error.

    Raises:
        TypeError: a field of the examples has a type that is not stored.
    """
    # A data file that changed while it was read would be stored under the digest of before.
    read_files = [file for source in examples.sources for file in source.files]
    if any(file.sha256 != entry.digests.get(file.path, "") for file in read_files):
        return
    store(entry.path, examples)


def store(path: Path, value: Any) -> None:
    """Write a value of arrays and plain data to a file, which appears when it is complete.

    Raises:
        TypeError: a part of it has a type that is not stored.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _pack(value, arrays)
    buffer = io.BytesIO()
    text = json.dumps(tree).encode()
    np.savez(buffer, allow_pickle=False, tree=np.frombuffer(text, np.uint8), **arrays)
    payload = buffer.getbuffer()
    # a name of its own: other processes may write the same examples
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    # Without the file the next run tokenizes again, and that is all.
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(hashlib.sha256(payload).digest())
                file.write(payload)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _remove_oldest(path.parent)


def _remove_oldest(folder: Path) -> None:
    entries = [(path.stat(), path) for path in folder.glob("*.examples")]
    total = sum(stat.st_size for stat, _ in entries)
    # By use and not by age: `read` sets the time of a file.
    for stat, path in sorted(entries, key=lambda pair: pair[0].st_mtime):
        if total <= LIMIT_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= stat.st_size


@functools.cache
def _code_digest() -> str:
    package = Path(__file__).parents[1]
    # Any change of the code that makes examples, and of the random streams that it draws from.
    modules = [*sorted((package / "data").glob("*.py")), package / "rng.py"]
    return _digest([(path.name, remote.file_digest(path)) for path in modules])


def _digest(value: object) -> str:
    # Keys are not sorted: of two columns of one name, the last one counts.
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _pack(value: Any, arrays: dict[str, np.ndarray]) -> JsonValue:
    """Return a value as JSON that names its arrays.

    Example:
        >>> arrays = {}
        >>> _pack((1, {"a": np.arange(2)}), arrays), arrays
        (['tuple', [1, ['dict', [['a', ['array', 'a0']]]]]], {'a0': array([0, 1])})
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is np.ndarray:
        name = f"a{len(arrays)}"
        arrays[name] = value
        return ["array", name]
    if kind is Ragged:
        return ["Ragged", [_pack(value.flat, arrays), _pack(value.offsets, arrays)]]
    if kind in (list, tuple):
        return [kind.__name__, [_pack(part, arrays) for part in value]]
    if kind is dict:
        return ["dict", [[key, _pack(part, arrays)] for key, part in value.items()]]
    if RECORDS.get(kind.__name__) is kind:
        return [kind.__name__, {name: _pack(getattr(value, name), arrays) for name in _names(kind)}]
    raise TypeError(f"examples with a {kind.__name__} cannot be stored; add it to {__name__}")


def _unpack(tree: JsonValue, arrays: dict[str, np.ndarray]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, content = tree
    if kind == "array":
        return arrays[content]
    if kind == "Ragged":
        return Ragged(*(_unpack(part, arrays) for part in content))
    if kind in ("list", "tuple"):
        parts = [_unpack(part, arrays) for part in content]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict":
        return {key: _unpack(part, arrays) for key, part in content}
    return RECORDS[kind](**{name: _unpack(part, arrays) for name, part in content.items()})


def _names(record: type) -> Sequence[str]:
    if dataclasses.is_dataclass(record):
        return [field.name for field in dataclasses.fields(record)]
    return record._fields  # type: ignore[attr-defined]  # a NamedTuple
