"""What tests ask of a run directory: that no file changed, and that a killed run can go on."""

import contextlib
import hashlib

import pytest


def digests(directory):
    """Return the SHA-256 of every file below a directory, by its path there."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@contextlib.contextmanager
def interrupted(target, name, call):
    """Expect that a block ends, as by Ctrl-C, when it calls `target.name` for the `call`-th time."""
    original, calls = getattr(target, name), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, fails)
        with pytest.raises(KeyboardInterrupt):
            yield
