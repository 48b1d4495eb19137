"""Buckets (gs:// and s3://): what is in one is worked on in a copy on this machine's disk, and copied back whenever something in it is whole.

Tensors are mapped into memory, journals are appended to, and what is whole is renamed: an object store has none of that. What it has is
that an object appears whole or not at all, so a list of the files with their digests, written last, says of a directory what is whole.
A copy that was cut off leaves the list that was there before, and every file in it as it was.
"""

import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError

_PACKAGES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # extra, and what it installs
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*):/+([^/].*)")
_OWN = ".ordermerge"  # a directory for what is ours: the list, and files that wait to take the place of others
_LIST, _WAITING = f"{_OWN}/files.json", f"{_OWN}/waiting"
_UNFINISHED = re.compile(r"\.partial\b|\.orbax-checkpoint-tmp")
_AT_ONCE = (
    64 * 2**20
)  # bytes: smaller files may change while they are copied, so they are read once, digest and content alike


class File(NamedTuple):
    """A file of a list: SHA-256 in hex, and bytes."""

    digest: str
    size: int


class Wanted(NamedTuple):
    """A file to be copied here: what it is known by, and how it is got."""

    version: str
    get: Callable[[Path], None]


class Listing(NamedTuple):
    """What is whole in a directory of a bucket.

    Attributes:
        version: another one after every change.
        files: by path below the directory.
        gone: paths that the version before had.
    """

    version: str
    files: dict[str, File]
    gone: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------- addresses


def address(path: str | Path) -> str | None:
    """Return the address of what is in a bucket, None of anything else. pathlib leaves out one of two slashes; that is mended.

    Raises:
        UserError: an address of another kind.

    Example:
        >>> address("s3://orders/runs/one/"), address(Path("gs://orders/base")), address("runs/one")
        ('s3://orders/runs/one', 'gs://orders/base', None)
    """
    found = _ADDRESS.fullmatch(str(path))
    if found is None:
        return None
    if found[1] not in _PACKAGES:
        raise UserError(
            f"{path}: addresses of {found[1]}:// are not offered, only {' and '.join(f'{one}://' for one in _PACKAGES)}"
        )
    parts = found[2].rstrip("/").split("/")
    if {"", ".", ".."} & set(parts):
        raise UserError(f"{path}: expected {found[1]}://BUCKET/PATH without empty parts, . and ..")
    return f"{found[1]}://{'/'.join(parts)}"


def cache() -> Path:
    """Return the directory that holds the copies: `ORDERMERGE_CACHE`, by default `jax_ordermerge` below the user's caches."""
    given = os.environ.get("ORDERMERGE_CACHE")
    return Path(given or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / (
        "" if given else "jax_ordermerge"
    )


def _near(kind: str, url: str) -> Path:
    return (cache() / kind / url.replace("://", "/")).absolute()


# ------------------------------------------------------------------------------------------------------------------------ reading


def fetch(path: str | Path, *, without: str | None = None) -> Path:
    """Return where a file or directory can be read: its copy if it is in a bucket, brought up to date, else the path itself.

    Of a directory that was copied there from here only what is in its list is read, of any other one all that is there.

    Args:
        path: a local path, or an address.
        without: pattern of names that are not needed, such as `"*.safetensors"`.

    Raises:
        UserError: it is not there, or cannot be read.

    Example:
        >>> fetch("data/train.jsonl").as_posix()
        'data/train.jsonl'
    """
    url = address(path)
    if url is None:
        return Path(path).expanduser()
    with _failures(url, "read"):
        root = _root(url)
        if root == url:
            mirror = Mirror(url)
            mirror.open()
            return mirror.local
        wanted = _plain(url) if root is None else _listed(root, url.removeprefix(root).strip("/"))
        if without is not None:
            wanted = {
                name: one for name, one in wanted.items() if not fnmatch.fnmatch(name, without)
            }
        local = _near("copies", url)
        with _turn(local):
            _bring(local, wanted, whole=without is None)
    return local


def _root(url: str) -> str | None:
    """Return the directory with a list that an address lies in."""
    scheme, _, rest = url.partition("://")
    parts, store = rest.split("/"), _store(url)
    for end in range(len(parts), 0, -1):
        root = f"{scheme}://{'/'.join(parts[:end])}"
        with contextlib.suppress(PermissionError):  # who may read this directory alone
            if store.exists(f"{root}/{_LIST}"):
                return root
    return None


def _listed(root: str, below: str) -> dict[str, Wanted]:
    """Return what a list has of a file (under the empty name) or directory."""
    listing = _listing(root)
    assert listing is not None
    found = {}
    for name, file in listing.files.items():
        if name == below or name.startswith(f"{below}/"):
            found[name.removeprefix(below).strip("/")] = Wanted(
                file.digest, functools.partial(_download, root, name, file)
            )
    if not found:
        known = ", ".join(sorted({name.split("/")[0] for name in listing.files}))
        raise UserError(f"{root} holds no whole {below}; it has {known or 'nothing'}")
    return found


def _plain(url: str) -> dict[str, Wanted]:
    """Return what is there of a file (under the empty name) or directory that has no list."""
    store, found = _store(url), {}
    for name, info in store.find(url, detail=True).items():
        if not name.endswith("/"):
            version = f"{info['size']} {info.get('ETag') or info.get('etag')}"
            below = name.removeprefix(url.partition("://")[2]).strip("/")
            found[_inside(below) if below else ""] = Wanted(
                version, functools.partial(_get, store, name)
            )
    if not found:
        raise UserError(f"{url} not found; give the address of a file or directory")
    return found


def _bring(local: Path, wanted: Mapping[str, Wanted], *, whole: bool) -> None:
    """Copy the files whose versions differ from those that are here."""
    mark = local.with_name(f".{local.name}.versions")
    known = json.loads(mark.read_text()) if mark.is_file() else {}
    for name, one in wanted.items():
        target = local / name if name else local
        if known.get(name) != one.version or not target.is_file():
            one.get(target)
    if whole and "" not in wanted:
        _remove_others(local, set(wanted))
    versions = ({} if whole else known) | {name: one.version for name, one in wanted.items()}
    atomic.replace(mark, json.dumps(versions).encode())


def _download(root: str, name: str, file: File, target: Path) -> None:
    """Copy a file of a list unless it is here; it lies under its name, or waits where a copy to the bucket was cut off."""
    if target.is_file() and target.stat().st_size == file.size and _digest(target) == file.digest:
        return
    for origin in (f"{root}/{name}", f"{root}/{_WAITING}/{file.digest}"):
        with contextlib.suppress(FileNotFoundError):
            _get(_store(root), origin, target, file.digest)
            return
    raise UserError(
        f"{root}/{name} is lost or was changed from outside; restore it, or remove {root} to start over"
    )


def _get(store: Any, origin: str, target: Path, digest: str | None = None) -> None:
    """Copy an object beside its target and rename it when whole.

    Raises:
        FileNotFoundError: there is no such object, or it is another one than the digest says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        store.get_file(origin, str(partial))
        if digest is not None and _digest(partial) != digest:
            raise FileNotFoundError(origin)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------- directories


class Mirror:
    """A directory of a bucket and the copy that is worked on, `local`. One process opens and saves it.

    Example:
        >>> Mirror("s3://orders/runs/one").local.as_posix()
        '.../runs/s3/orders/runs/one'
    """

    def __init__(self, url: str) -> None:
        self.url, self.local = url, _near("runs", url)
        self._known: dict[str, tuple[File, int]] = {}  # with the time of change of the local file
        self._written: str | None = None

    def open(self) -> bool:
        """Make the local copy what the list says, unless it is that already, or goes on from it; say whether files were fetched.

        Where another machine went on from what this one had copied, the bucket counts, and what is here alone is removed.

        Raises:
            UserError: the bucket cannot be read, or holds other things.
        """
        with _failures(self.url, "read"), _turn(self.local):
            listing, had = _listing(self.url), self.record
            if listing is not None and had is not None and listing.version == had.version:
                return False
            if listing is None:
                if _holds(self.url):
                    raise UserError(
                        f"{self.url} is not empty and was not written by a run; give another address, or remove what is there"
                    )
                listing = Listing(secrets.token_hex(8), {})
                _write_listing(self.url, listing)
            for name, file in listing.files.items():
                _download(self.url, name, file, self.local / name)
            _remove_others(self.local, set(listing.files))
            self._keep(listing)
            return bool(listing.files)

    def save(self) -> None:
        """Copy what has changed to the bucket. Until that is done it holds what it held before.

        Files in the making (`atomic.py`, Orbax) are left out. Nobody may remove files meanwhile; appending to them is allowed.

        Raises:
            UserError: the bucket cannot be written, or another process has written to this address meanwhile.
        """
        with _failures(self.url, "written"):
            before, had = _listing(self.url), self.record
            # a list may have been written although the store's answer was lost
            if before is None or had is None or before.version not in (had.version, self._written):
                raise UserError(
                    f"{self.url} was written by another process meanwhile; nothing was changed there, end one of the two"
                )
            _settle(self.url, before)
            files = {name: self._upload(name, before.files) for name in _names(self.local)}
            if files == before.files:
                return
            listing = Listing(
                secrets.token_hex(8), files, tuple(sorted(before.files.keys() - files.keys()))
            )
            self._written = listing.version
            _write_listing(self.url, listing)
            self._keep(listing)
            _settle(self.url, listing)

    def _upload(self, name: str, there: Mapping[str, File]) -> File:
        """Copy a file unless it is there: under its name, or where it waits if the list has another one of that name."""
        path = self.local / name
        changed = path.stat().st_mtime_ns
        known = self._known.get(name)
        if known and known[1] == changed and there.get(name) == known[0]:
            return known[0]
        size, content = path.stat().st_size, None
        if size < _AT_ONCE:
            content = path.read_bytes()
            size = len(content)
        file = File(_digest(path) if content is None else hashlib.sha256(content).hexdigest(), size)
        if there.get(name) != file:
            store = _store(self.url)
            target = (
                f"{self.url}/{_WAITING}/{file.digest}" if name in there else f"{self.url}/{name}"
            )
            store.put_file(str(path), target) if content is None else store.pipe_file(
                target, content
            )
        self._known[name] = (file, changed)
        return file

    @property
    def record(self) -> Listing | None:
        """What the bucket held when this copy was last the same."""
        file = self.local / _LIST
        return _parse(file.read_bytes()) if file.is_file() else None

    def _keep(self, listing: Listing) -> None:
        atomic.replace(self.local / _LIST, _text(listing))


@contextlib.contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """Yield where to write a directory: the target itself, or a local one that is copied to the bucket when the block ends.

    Raises:
        UserError: something is in the bucket under that address, or it cannot be written.

    Example:
        >>> with new_directory("merged") as directory:
        ...     directory.as_posix()
        'merged'
    """
    url = address(target)
    if url is None:
        yield Path(target)
        return
    with _failures(url, "written"):
        listing = _listing(url)
        if listing.files if listing is not None else _holds(url):
            raise UserError(f"{url} is not empty; give a new address, or remove it")
    mirror = Mirror(url)
    shutil.rmtree(mirror.local, ignore_errors=True)
    yield mirror.local
    with _failures(url, "written"):
        listing = listing or Listing(secrets.token_hex(8), {})
        _write_listing(url, listing)
        mirror._keep(listing)
    mirror.save()
    shutil.rmtree(mirror.local)


def try_out(url: str) -> None:
    """Write, read and remove an object below an address.

    Raises:
        UserError: one of these failed.
    """
    store, name = _store(url), f"{url}/{_OWN}/try-{secrets.token_hex(8)}"
    with _failures(url, "written"):
        store.pipe_file(name, b"whole")
        whole = store.cat_file(name) == b"whole"
        store.rm_file(name)
    if not whole:
        raise UserError(f"{url}: what was written there was read back otherwise")


def _settle(url: str, listing: Listing) -> None:
    """Give waiting files their names and remove what the list has no more. Done again by the next save where it was cut off."""
    store = _store(url)
    waiting = [key.rsplit("/", 1)[-1] for key in store.find(f"{url}/{_WAITING}")]
    for digest in waiting:
        for name, file in listing.files.items():
            if file.digest == digest:
                store.cp_file(f"{url}/{_WAITING}/{digest}", f"{url}/{name}")
        store.rm_file(f"{url}/{_WAITING}/{digest}")
    for name in listing.gone:
        with contextlib.suppress(FileNotFoundError):
            store.rm_file(f"{url}/{name}")


# ---------------------------------------------------------------------------------------------------------------------------- parts


def _listing(url: str) -> Listing | None:
    store = _store(url)
    try:
        return _parse(store.cat_file(f"{url}/{_LIST}"))
    except FileNotFoundError:
        return None


def _holds(url: str) -> bool:
    try:
        return bool(_store(url).ls(url))
    except FileNotFoundError:
        return False


def _write_listing(url: str, listing: Listing) -> None:
    _store(url).pipe_file(f"{url}/{_LIST}", _text(listing))


def _text(listing: Listing) -> bytes:
    return json.dumps(listing._asdict(), indent=1).encode()


def _parse(text: bytes) -> Listing:
    raw = json.loads(text)
    files = {_inside(name): File(*file) for name, file in raw["files"].items()}
    return Listing(raw["version"], files, tuple(_inside(name) for name in raw["gone"]))


def _inside(name: str) -> str:
    """Return a path below a directory as it is, and refuse what leads out of it: who may write to a bucket may not write to this disk."""
    if {"", ".", ".."} & set(name.split("/")) or _OWN in name.split("/"):
        raise UserError(
            f"an object is named {name!r}, which is no path below a directory; rename or remove it"
        )
    return name


def _names(directory: Path) -> list[str]:
    """Return the paths of the files that are whole, below a directory."""
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(
        p.as_posix() for p in found if p.parts[0] != _OWN and not _UNFINISHED.search(p.as_posix())
    )


def _remove_others(directory: Path, names: set[str]) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif name not in names and not name.startswith(f"{_OWN}/"):
            path.unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _turn(local: Path) -> Iterator[None]:
    """Let the processes of this machine bring a copy up to date one after another."""
    local.parent.mkdir(parents=True, exist_ok=True)
    with local.with_name(f".{local.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _store(url: str) -> Any:
    """Return the file system of an address. Credentials and endpoints are those of the environment; none are kept."""
    import fsspec

    scheme = url.partition("://")[0]
    extra, package = _PACKAGES[scheme]
    try:
        store = fsspec.filesystem(scheme)
        store.invalidate_cache()  # what is there is asked anew: others write too
        return store
    except ImportError as error:
        raise UserError(
            f"{url} needs the package {package}: pip install 'jax_ordermerge[{extra}]'"
        ) from error


@contextlib.contextmanager
def _failures(url: str, what: str) -> Iterator[None]:
    """Say in one line what a store refused: each has errors of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{url} cannot be {what} ({type(error).__name__}: {reason}); check the address, the endpoint and the credentials"
        ) from error
