"""Compiled programs, kept on the disk from start to start.

jax has the cache (https://docs.jax.dev/en/latest/persistent_compilation_cache.html) and names each
entry by a digest of the program, the options and the version of the compiler. Here it gets a
directory by default, `programs` in the user's cache, and a limit of its size. A command that ran
before then compiles nothing.

Nothing of jax is imported before it is needed: the variables are set before its start.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Final

from jax_ordermerge import user_cache

OFF: Final = "off"  # the setting that compiles at every start
LIMIT_BYTES: Final = 2**30  # the programs that were used longest ago go first
_DIRECTORY: Final = "JAX_COMPILATION_CACHE_DIR"
_SMALLEST_TIME: Final = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def set_default() -> None:
    """Cache the programs of this process, unless the environment names another directory.

    Call it before jax is imported. Where the user's cache cannot be written, nothing is cached.

    Example:
        >>> before = dict(os.environ)
        >>> os.environ["JAX_COMPILATION_CACHE_DIR"] = "compiled"
        >>> set_default()
        >>> os.environ["JAX_COMPILATION_CACHE_DIR"]
        'compiled'
        >>> os.environ.clear()
        >>> os.environ.update(before)
    """
    directory = default_directory()
    if _DIRECTORY in os.environ or directory is None:
        return
    os.environ[_DIRECTORY] = str(directory)
    # jax caches what took a second. Our programs are many, and most of them are small.
    os.environ.setdefault(_SMALLEST_TIME, "0")


@functools.cache
def default_directory() -> Path | None:
    """Return the directory in the user's cache; None where it cannot be written.

    Its name holds the version of the compiler and a digest of the processor. A home may be shared
    by machines with other processors, for which a program may have instructions that they lack.
    """
    try:
        parent = (user_cache.directory() / "programs").absolute()
    except RuntimeError:  # a user without a home, as in some containers
        return None
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    # not made before jax writes into it: --help must leave no trace
    if not os.access(existing, os.W_OK | os.X_OK):
        return None
    version = importlib.metadata.version("jaxlib")
    return parent / f"jaxlib-{version}-{_processor_digest()}"


def _processor_digest() -> str:
    lines = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # of Linux alone
        cores = Path("/proc/cpuinfo").read_text()
        # all cores are alike
        lines += [
            line
            for line in cores.partition("\n\n")[0].splitlines()
            if line.startswith(("model name", "flags", "Features", "CPU part"))
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def configure(setting: str | None, *, by_default: bool = True) -> None:
    """Cache programs as a config says.

    Args:
        setting: a directory, made if absent; `off`; None for the default.
        by_default: whether there is a default. Several processes of one run have none: some would
            compile and wait for the others, which have read the program. They need a directory that
            all of them see, which only the user can name.

    Example:
        >>> import jax
        >>> before = jax.config.jax_compilation_cache_dir
        >>> configure("compiled")
        >>> jax.config.jax_compilation_cache_dir
        'compiled'
        >>> jax.config.update("jax_compilation_cache_dir", before)
    """
    import jax

    default = default_directory()
    current = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made by jax
    is_default = default is not None and current == str(default)
    if setting == OFF or (setting is None and is_default and not by_default):
        jax.config.update("jax_compilation_cache_dir", None)
    elif setting is not None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(setting))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def prune(limit: int = LIMIT_BYTES) -> None:
    """Remove the programs of the default directory that were used longest ago, beyond a limit.

    Those of other versions and processors lie beside it and count, too. It may run in several
    processes at a time: a program that is gone is compiled again.

    Args:
        limit: bytes of all programs together.
    """
    directory = default_directory()
    if directory is None or os.environ.get(_DIRECTORY) != str(directory):
        return  # the directory of somebody else
    with contextlib.suppress(OSError):  # tidying must not fail a command that is done
        stats = [(path.stat(), path) for path in directory.parent.glob("*/*") if path.is_file()]
        excess = sum(stat.st_size for stat, _ in stats) - limit
        # file systems note a reading at most once a day, which is enough for an order
        for stat, path in sorted(
            stats, key=lambda entry: (max(entry[0].st_atime, entry[0].st_mtime), entry[1])
        ):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= stat.st_size
