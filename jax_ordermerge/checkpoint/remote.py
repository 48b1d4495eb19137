"""Buckets (gs:// and s3://): work happens in a copy on the local disk, which is copied back.

Tensors are memory-mapped, logs are appended to and complete files are renamed: an object store has
none of that. What it has is that an object appears completely or not at all. So a list of the files
of a directory with their digests, written last, says what is complete. A copy that is cut off
leaves the previous list, and every file in it as it was.
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
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_ordermerge import user_cache
from jax_ordermerge.checkpoint import atomic, object_store
from jax_ordermerge.checkpoint.object_store import File, Listing
from jax_ordermerge.errors import UserError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*):/+([^/].*)")
# A lock belongs to a process of one machine.
_UNFINISHED = re.compile(r"\.partial\b|\.orbax-checkpoint-tmp|\.lock$")
# Smaller files may change while they are copied: they are read once, for digest and content alike.
_READ_ONCE_BYTES = 64 * 2**20


class _RemoteFile(NamedTuple):
    """A file to copy: an identifier of its content, and a function that copies it to a path."""

    version: str
    download: Callable[[Path], None]


# ------------------------------------------------------------------------------------- addresses


def address(path: str | Path) -> str | None:
    """Return the address of a path in a bucket, None for any other path.

    pathlib drops one of two slashes; the address has both.

    Raises:
        UserError: an address of another kind.

    Example:
        >>> address("s3://orders/runs/one/"), address(Path("gs://orders/base")), address("runs/one")
        ('s3://orders/runs/one', 'gs://orders/base', None)
    """
    match = _ADDRESS.fullmatch(str(path))
    if match is None:
        return None
    scheme = match[1]
    if scheme not in object_store.PACKAGES:
        if os.path.lexists(path):
            return None  # a directory may be called `a:`
        supported = " and ".join(f"{name}://" for name in object_store.PACKAGES)
        raise UserError(f"{path}: {scheme}:// is not supported, only {supported}")
    # an address becomes a path of the local cache, which must stay inside of it
    parts = match[2].rstrip("/").split("/")
    if {"", ".", ".."} & set(parts):
        raise UserError(f"{path}: expected {scheme}://BUCKET/PATH without empty parts, . and ..")
    return f"{scheme}://{'/'.join(parts)}"


def expand(path: str | Path) -> Path:
    """Return a path with `~` expanded, unless it exists as it is written.

    In a directory called `~` that may also be a path that is to be written, or RUN/member_0.

    Example:
        >>> expand("~/data") == Path.home() / "data", expand("~no-user/data").as_posix()
        (True, '~no-user/data')
    """
    # os.path and not pathlib, which fails where there is no such user or a name is too long
    text, expanded = str(path), os.path.expanduser(path)
    is_below = os.path.lexists(text.partition("/")[0]) and not os.path.lexists(expanded)
    return Path(text if os.path.lexists(text) or is_below else expanded)


def _local(kind: str, url: str) -> Path:
    return (user_cache.directory() / kind / url.replace("://", "/")).absolute()


# --------------------------------------------------------------------------------------- reading


def fetch(path: str | Path, *, without: str | None = None) -> Path:
    """Return a local path of a file or directory: an up-to-date copy if it is in a bucket.

    Of a directory that this package wrote only listed files are read, of any other one all files.

    Args:
        path: a local path, or an address.
        without: pattern of names that are not needed, such as `"*.safetensors"`.

    Raises:
        UserError: it does not exist, or cannot be read.

    Example:
        >>> fetch("data/train.jsonl").as_posix()
        'data/train.jsonl'
    """
    url = address(path)
    if url is None:
        return expand(path)
    with object_store.one_line_errors(url, "read"):
        # a directory of this package is read by its list: a reader never mixes two saves; parents
        # are searched, too, since the address may be that of a file or a member inside
        root = _listed_root(url)
        # a whole run: share the working copy, it may be here already
        if root == url:
            mirror = Mirror(url)
            mirror.open()
            return mirror.local
        if root is None:
            files = _unlisted_files(url)
        else:
            files = _listed_files(root, url.removeprefix(root).strip("/"))
        if without is not None:
            files = {
                name: file for name, file in files.items() if not fnmatch.fnmatch(name, without)
            }
        local = _local("copies", url)
        # two commands may fetch the same model at the same time
        with exclusive(local):
            _update(local, files, complete=without is None)
    return local


def _listed_root(url: str) -> str | None:
    """Return the directory with a list that an address lies in, None if there is none."""
    scheme, _, rest = url.partition("://")
    parts, store = rest.split("/"), object_store.open_store(url)
    for end in range(len(parts), 0, -1):
        root = f"{scheme}://{'/'.join(parts[:end])}"
        # a user may be allowed to read the inner directory only
        with contextlib.suppress(PermissionError):
            if store.exists(f"{root}/{object_store.LIST}"):
                return root
    return None


def _listed_files(root: str, below: str) -> dict[str, _RemoteFile]:
    """Return the listed files of a file (under the empty name) or directory."""
    listing = object_store.read_listing(root)
    assert listing is not None
    files = {}
    for name, file in listing.files.items():
        if name == below or name.startswith(f"{below}/"):
            download = functools.partial(_download, root, name, file)
            files[name.removeprefix(below).strip("/")] = _RemoteFile(file.digest, download)
    if not files:
        present = ", ".join(sorted({name.split("/")[0] for name in listing.files}))
        raise UserError(f"{root} holds no complete {below}; it has {present or 'nothing'}")
    return files


def _unlisted_files(url: str) -> dict[str, _RemoteFile]:
    """Return the objects of a file (under the empty name) or directory without a list."""
    store, files = object_store.open_store(url), {}
    for name, info in store.find(url, detail=True).items():
        if name.endswith("/"):
            continue
        # the ETag changes with the content; the size helps stores that have none
        version = f"{info['size']} {info.get('ETag') or info.get('etag')}"
        below = name.removeprefix(url.partition("://")[2]).strip("/")
        download = functools.partial(_get, store, name)
        files[object_store.check_inside(below) if below else ""] = _RemoteFile(version, download)
    if not files:
        raise UserError(f"{url} not found; give the address of a file or directory")
    return files


def _update(local: Path, files: Mapping[str, _RemoteFile], *, complete: bool) -> None:
    """Copy the files whose versions differ from those of the local copy."""
    record = local.with_name(f".{local.name}.versions")
    versions = json.loads(record.read_text()) if record.is_file() else {}
    for name, file in files.items():
        target = local / name if name else local
        if versions.get(name) != file.version or not target.is_file():
            file.download(target)
    # a partial fetch must not forget what an earlier one copied
    if complete:
        versions = {}
        if "" not in files:
            _remove_all_but(set(files), local)
    versions |= {name: file.version for name, file in files.items()}
    atomic.replace(record, json.dumps(versions).encode())


def _download(root: str, name: str, file: File, target: Path) -> None:
    """Copy a listed file unless the target has its content.

    It lies under its name, or in the staging directory if a copy to the bucket was cut off.
    """
    # the size first: hashing gigabytes takes seconds
    if (
        target.is_file()
        and target.stat().st_size == file.size
        and file_digest(target) == file.digest
    ):
        return
    for origin in (f"{root}/{name}", f"{root}/{object_store.STAGING}/{file.digest}"):
        with contextlib.suppress(FileNotFoundError):
            _get(object_store.open_store(root), origin, target, file.digest)
            return
    raise UserError(
        f"{root}/{name} is lost or was changed from outside; restore it, or remove {root} to start"
        " over"
    )


def _get(store: Any, origin: str, target: Path, digest: str | None = None) -> None:
    """Copy an object beside its target and rename it when it is complete.

    Raises:
        FileNotFoundError: there is no such object, or it has another digest.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        store.get_file(origin, str(partial))
        # an object under its name may be of a newer save, while the staged one is the listed one
        if digest is not None and file_digest(partial) != digest:
            raise FileNotFoundError(origin)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------- directories


class Mirror:
    """A directory in a bucket and its local copy, `local`. One process opens and saves it.

    Example:
        >>> Mirror("s3://orders/runs/one").local.as_posix()
        '.../runs/s3/orders/runs/one'
    """

    def __init__(self, url: str) -> None:
        self.url, self.local = url, _local("runs", url)
        # uploaded files, with the modification time that they had: unchanged ones are not hashed
        self._uploaded: dict[str, tuple[File, int]] = {}
        self._last_version: str | None = None

    def open(self) -> bool:
        """Bring the local copy up to date and return whether files were fetched.

        If another machine has continued from this copy, the bucket counts, and files that are here
        only are removed.

        Raises:
            UserError: the bucket cannot be read, or holds files of others.
        """
        with object_store.one_line_errors(self.url, "read"), exclusive(self.local):
            listing, record = object_store.read_listing(self.url), self.record
            if listing is not None and record is not None and listing.version == record.version:
                return False
            # without a list nothing says whose objects these are
            if listing is None:
                if object_store.has_objects(self.url):
                    raise UserError(
                        f"{self.url} is not empty and was not written by a run; give another"
                        " address, or remove what is there"
                    )
                listing = Listing(secrets.token_hex(8), {})
                object_store.write_listing(self.url, listing)
            # files that are here with the right digest are not copied
            for name, file in listing.files.items():
                _download(self.url, name, file, self.local / name)
            _remove_all_but(set(listing.files), self.local)
            self._write_record(listing)
            return bool(listing.files)

    def save(self) -> None:
        """Copy what has changed to the bucket. Until the end the bucket holds what it held before.

        Unfinished files (of `atomic`, of Orbax) and locks are left out. No file may be removed
        meanwhile; appending is allowed.

        Raises:
            UserError: the bucket cannot be written, or another process has written to it.
        """
        with object_store.one_line_errors(self.url, "written"):
            before, record = object_store.read_listing(self.url), self.record
            # a list may have been written although the answer of the store was lost
            expected = record and (record.version, self._last_version)
            if before is None or not expected or before.version not in expected:
                raise UserError(
                    f"{self.url} was written by another process meanwhile; nothing was changed"
                    " there, end one of the two"
                )
            # the previous save may have been cut off between its list and its last rename
            _finish_staging(self.url, before)
            files = {name: self._upload(name, before.files) for name in _finished(self.local)}
            if files == before.files:
                return
            gone = tuple(sorted(before.files.keys() - files.keys()))
            listing = Listing(secrets.token_hex(8), files, gone)
            # remembered before the write, whose answer may get lost
            self._last_version = listing.version
            object_store.write_listing(self.url, listing)
            self._write_record(listing)
            _finish_staging(self.url, listing)

    def _upload(self, name: str, listed: Mapping[str, File]) -> File:
        """Copy a file unless it is listed: under its name, or to staging if the name is taken."""
        path = self.local / name
        modified = path.stat().st_mtime_ns
        previous = self._uploaded.get(name)
        if previous and previous[1] == modified and listed.get(name) == previous[0]:
            return previous[0]
        size, content = path.stat().st_size, None
        if size < _READ_ONCE_BYTES:
            content = path.read_bytes()
            file = File(hashlib.sha256(content).hexdigest(), len(content))
        else:
            file = File(file_digest(path), size)
        # A new name is invisible until the list names it. A listed name must keep its content until
        # then, so its new content waits in staging.
        if listed.get(name) != file:
            store = object_store.open_store(self.url)
            target = f"{object_store.STAGING}/{file.digest}" if name in listed else name
            if content is None:
                store.put_file(str(path), f"{self.url}/{target}")
            else:
                shown = object_store.content_type(self.url, name)
                store.pipe_file(f"{self.url}/{target}", content, **shown)
        self._uploaded[name] = (file, modified)
        return file

    @property
    def record(self) -> Listing | None:
        """The list of the bucket when this copy was last equal to it."""
        path = self.local / object_store.LIST
        return object_store.parse_listing(path.read_bytes()) if path.is_file() else None

    def _write_record(self, listing: Listing) -> None:
        atomic.replace(self.local / object_store.LIST, object_store.listing_bytes(listing))


@contextlib.contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """Yield where to write a directory.

    That is the target itself, or for an address a local directory that is copied to the bucket when
    the block ends.

    Raises:
        UserError: the address is not empty, or cannot be written.

    Example:
        >>> with new_directory("merged") as directory:
        ...     directory.as_posix()
        'merged'
    """
    url = address(target)
    if url is None:
        yield Path(target)
        return
    with object_store.one_line_errors(url, "written"):
        listing = object_store.read_listing(url)
        if listing.files if listing is not None else object_store.has_objects(url):
            raise UserError(f"{url} is not empty; give a new address, or remove it")
    # remains of an earlier call that was cut off
    mirror = Mirror(url)
    shutil.rmtree(mirror.local, ignore_errors=True)
    yield mirror.local
    with object_store.one_line_errors(url, "written"):
        listing = listing or Listing(secrets.token_hex(8), {})
        object_store.write_listing(url, listing)
        mirror._write_record(listing)
    # the copy has done its work: a merge may be tens of gigabytes
    mirror.save()
    shutil.rmtree(mirror.local)


def check_writable(url: str) -> None:
    """Write, read and remove an object below an address.

    Raises:
        UserError: one of these failed.
    """
    store, name = (
        object_store.open_store(url),
        f"{url}/{object_store.BOOKKEEPING}/try-{secrets.token_hex(8)}",
    )
    content = b"complete"
    with object_store.one_line_errors(url, "written"):
        store.pipe_file(name, content)
        read = store.cat_file(name)
        store.rm_file(name)
    if read != content:
        raise UserError(f"{url}: an object that was written there has other content when read")


def measure_upload(url: str, size: int) -> float:
    """Write an object of `size` bytes below an address, remove it, and return the seconds.

    Raises:
        UserError: the bucket cannot be written.
    """
    store = object_store.open_store(url)
    name = f"{url}/{object_store.BOOKKEEPING}/try-{secrets.token_hex(8)}"
    content = secrets.token_bytes(size)
    with object_store.one_line_errors(url, "written"):
        start = time.monotonic()
        store.pipe_file(name, content)
        seconds = time.monotonic() - start
        store.rm_file(name)
    return seconds


def _finish_staging(url: str, listing: Listing) -> None:
    """Give staged files their names and remove unlisted ones; after a cut the next save does it."""
    store = object_store.open_store(url)
    staged = [key.rsplit("/", 1)[-1] for key in store.find(f"{url}/{object_store.STAGING}")]
    for digest in staged:
        for name, file in listing.files.items():
            if file.digest == digest:
                store.cp_file(f"{url}/{object_store.STAGING}/{digest}", f"{url}/{name}")
        store.rm_file(f"{url}/{object_store.STAGING}/{digest}")
    # last, so that a reader of the previous list can still finish
    for name in listing.gone:
        with contextlib.suppress(FileNotFoundError):
            store.rm_file(f"{url}/{name}")


# ----------------------------------------------------------------------------------------- parts


def _finished(directory: Path) -> list[str]:
    """Return the paths of the complete files below a directory."""
    files = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in files
        if path.parts[0] != object_store.BOOKKEEPING and not _UNFINISHED.search(path.as_posix())
    )


def _remove_all_but(names: set[str], directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):  # a directory after its content
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif name not in names and not name.startswith(f"{object_store.BOOKKEEPING}/"):
            path.unlink()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the bytes of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive(local: Path) -> Iterator[None]:
    """Let one process of this machine at a time bring a copy up to date."""
    # a lock file beside the copy, since the copy itself may be removed
    local.parent.mkdir(parents=True, exist_ok=True)
    with local.with_name(f".{local.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
