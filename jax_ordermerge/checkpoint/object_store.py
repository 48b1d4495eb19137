"""Objects of a bucket, and the list that says which of them make up a directory."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax_ordermerge.errors import UserError

PACKAGES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # extra, and the package it installs
# Objects below an address:
#   config.yaml, checkpoints/4/...    the files, under their names
#   .ordermerge/files.json            the list, written last: version, files, removed files
#   .ordermerge/waiting/DIGEST        new content of listed files, until the list names it
BOOKKEEPING = ".ordermerge"
# What a person opens in a browser, by suffix. Not `mimetypes`, whose tables depend on the machine.
_SHOWN = {
    "html": "text/html; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "yaml": "text/plain; charset=utf-8",
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}
LIST, STAGING = f"{BOOKKEEPING}/files.json", f"{BOOKKEEPING}/waiting"


class File(NamedTuple):
    """A file of a list: SHA-256 in hex, and bytes."""

    digest: str
    size: int


class Listing(NamedTuple):
    """The complete files of a directory in a bucket.

    Attributes:
        version: changes with every change of the files.
        files: by path below the directory.
        gone: paths that the previous version had.
    """

    version: str
    files: dict[str, File]
    gone: tuple[str, ...] = ()


def open_store(url: str) -> Any:
    """Return the fsspec file system of an address, with credentials of the environment."""
    import fsspec

    scheme = url.partition("://")[0]
    extra, package = PACKAGES[scheme]
    try:
        store = fsspec.filesystem(scheme)
        store.invalidate_cache()  # other machines write to the same bucket
        return store
    except ImportError as error:
        raise UserError(
            f"{url} needs the package {package}: pip install 'jax_ordermerge[{extra}]'"
        ) from error


@contextlib.contextmanager
def one_line_errors(url: str, action: str) -> Iterator[None]:
    """Turn the errors of a store, which has types of its own, into one line."""
    try:
        yield
    except UserError:
        raise
    # gcsfs, s3fs and their HTTP clients share no base class of errors
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{url} cannot be {action} ({type(error).__name__}: {reason}); check the address, the"
            " endpoint and the credentials"
        ) from error


def content_type(url: str, name: str) -> dict[str, str]:
    """Return the option of `pipe_file` that makes a browser show a file and not download it.

    Stores say `application/octet-stream` of all bytes that come without one.

    Args:
        url: of the directory.
        name: of the file.

    Example:
        >>> content_type("s3://runs/a", "report.html"), content_type("gs://runs/a", "orders.npz")
        ({'ContentType': 'text/html; charset=utf-8'}, {})
    """
    suffix = name.rpartition(".")[2]
    if suffix not in _SHOWN:
        return {}
    return {"ContentType" if url.startswith("s3:") else "content_type": _SHOWN[suffix]}


def read_listing(url: str) -> Listing | None:
    """Return the list below an address, None where there is none."""
    try:
        return parse_listing(open_store(url).cat_file(f"{url}/{LIST}"))
    except FileNotFoundError:
        return None


def has_objects(url: str) -> bool:
    """Return whether anything is stored below an address."""
    try:
        return bool(open_store(url).ls(url))
    except FileNotFoundError:
        return False


def match(pattern: str) -> list[str]:
    """Return the addresses of the objects and directories that a glob matches, hidden ones not.

    Raises:
        UserError: the bucket cannot be read.
    """
    scheme, _, rest = pattern.partition("://")
    with one_line_errors(pattern, "read"):
        names = [str(name) for name in open_store(pattern).glob(rest)]
    # as in glob.glob: a dot at the start of a name is matched by a dot alone
    if "/." not in rest:
        names = [name for name in names if "/." not in name]
    return [f"{scheme}://{name}" for name in names]


def write_listing(url: str, listing: Listing) -> None:
    """Replace the list below an address: one object, so readers see the old or the new one."""
    open_store(url).pipe_file(f"{url}/{LIST}", listing_bytes(listing))


def listing_bytes(listing: Listing) -> bytes:
    """Return a list as it is stored."""
    return json.dumps(listing._asdict(), indent=1).encode()


def parse_listing(text: bytes) -> Listing:
    """Return the list that `listing_bytes` made."""
    raw = json.loads(text)
    files = {check_inside(name): File(*file) for name, file in raw["files"].items()}
    return Listing(raw["version"], files, tuple(check_inside(name) for name in raw["gone"]))


def check_inside(name: str) -> str:
    """Return a path below a directory, and refuse one that leads out of it.

    Who may write to a bucket may not, by names of objects, write anywhere on this disk.
    """
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or BOOKKEEPING in parts:
        raise UserError(
            f"an object is named {name!r}, which is no path below a directory; rename or remove it"
        )
    return name
