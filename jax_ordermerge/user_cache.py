"""Where files are kept that may be made again: copies of buckets, examples, compiled programs."""

import os
from pathlib import Path


def directory() -> Path:
    """Return `ORDERMERGE_CACHE`, by default `jax_ordermerge` in the user's cache.

    Raises:
        RuntimeError: the user has no home.

    Example:
        >>> directory().name
        'jax_ordermerge'
    """
    named = os.environ.get("ORDERMERGE_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jax_ordermerge"
