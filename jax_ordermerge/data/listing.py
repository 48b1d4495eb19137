"""The data files that a path stands for: a file, a directory or a glob, also in a bucket."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from jax_ordermerge.checkpoint import object_store, remote
from jax_ordermerge.errors import UserError, similar_path

KINDS: Final = (".json", ".jsonl", ".csv", ".tsv", ".txt")
CODECS: Final = (".gz", ".zst")
SUFFIXES: Final = (
    *KINDS,
    ".parquet",
    *(f"{kind}{codec}" for codec in CODECS for kind in KINDS),
)
# For messages: all of them would hide what is wrong.
EXPECTED: Final = f"{' '.join((*KINDS, '.parquet'))}; all but parquet also {' '.join(CODECS)}"
HUB_NAME: Final = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[^@]+))?"
)


class Listing(NamedTuple):
    """The data files of a path, in the order in which they are read.

    Attributes:
        files: the name of each for readers, and where it lies on this machine.
        passed_over: names of files of a directory or glob that are no data.
    """

    files: tuple[tuple[str, Path], ...]
    passed_over: tuple[str, ...] = ()


def list_files(path: str) -> Listing | None:
    """Return the data files of a path, or None where it is neither a file, a directory nor a glob.

    A directory stands for all files below it, a glob for the files and directories that it matches;
    `**` matches any number of directories. They are read in the order of their names, part by part.
    Hidden files are passed over, as a shell does. Other files that are no data by their suffix are
    passed over and named.

    Args:
        path: on a disk, or an address in a bucket (gs://, s3://), whose files are fetched.

    Raises:
        UserError: there is no such file, it is of an unknown kind, it cannot be read, or nothing
            matches.
    """
    url = remote.address(path)
    # A name with brackets may be that of a file, or the split of a hub dataset.
    is_name = url is None and (os.path.lexists(remote.expand(path)) or HUB_NAME.fullmatch(path))
    if glob.has_magic(path) and not is_name:
        return _list_glob(path, url)
    local = remote.fetch(path)
    if local.is_dir():
        files = [(f"{path.rstrip('/')}/{name}", file) for name, file in _walk(local)]
        return _select(path, files)
    if not local.exists():
        # It may be a name of the hub; with a suffix of ours it was meant as a file.
        if not path.lower().endswith(SUFFIXES):
            return None
        raise UserError(
            f"data file {path} not found{similar_path(local)}; give an existing file (relative"
            f" paths begin at {Path.cwd()})"
        )
    if not local.name.lower().endswith(SUFFIXES):
        raise UserError(f"data file {path} has an unknown suffix; expected {EXPECTED}")
    return _select(path, [(path, local)])


def _list_glob(path: str, url: str | None) -> Listing:
    if url is None:
        matches = [(name, Path(name)) for name in glob.glob(_escape_existing(path), recursive=True)]
    else:
        matches = [(name, remote.fetch(name)) for name in object_store.match(url)]
    # A dict, since `**` matches a directory and what is in it.
    files: dict[str, Path] = {}
    for name, local in matches:
        below = _walk(local) if local.is_dir() else [("", local)]
        files |= {f"{name.rstrip('/')}/{inner}".rstrip("/"): file for inner, file in below}
    return _select(path, list(files.items()))


def _escape_existing(path: str) -> str:
    """Return a glob in which directories that exist as they are written stand for themselves."""
    parts = remote.expand(path).parts
    for end in range(len(parts), 0, -1):
        directory = Path(*parts[:end])
        if os.path.lexists(directory):
            return str(Path(glob.escape(str(directory)), *parts[end:]))
    return str(Path(*parts))


def _select(path: str, files: list[tuple[str, Path]]) -> Listing:
    """Sort files and take the data among them."""
    files = sorted(files, key=lambda item: item[0].split("/"))
    data = tuple(item for item in files if item[0].lower().endswith(SUFFIXES))
    passed_over = tuple(name for name, _ in files if not name.lower().endswith(SUFFIXES))
    if not data:
        named = f"only {', '.join(passed_over[:5])}" if passed_over else "nothing"
        raise UserError(f"data {path} matches no data file, {named}; expected {EXPECTED}")
    for name, local in data:
        if not local.is_file():  # reading a pipe would wait for its writer
            raise UserError(f"data file {name} is a broken link, or no regular file; remove it")
    return Listing(data, passed_over)


def _walk(directory: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, Path]]:
    """Yield the path of each file below a directory, and the file. Links are followed."""
    resolved = directory.resolve()
    if resolved in above:
        raise UserError(f"data {directory} is a link to a directory above it; remove it")
    for entry in directory.iterdir():
        # Such as .ipynb_checkpoints, whose files are copies of others.
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            below = _walk(entry, (*above, resolved))
            yield from ((f"{entry.name}/{name}", file) for name, file in below)
        else:
            yield entry.name, entry
