"""Generated programs against their tests, kept away from the machine. Texts in, verdicts out; knows nothing of models or tasks.

Every program gets an interpreter of its own, and its tests get another one: see `sandbox_worker.py`. Both are closed in by the stronger of

- `namespaces` (of processes, network, mounts and, unless root starts it, users, by unshare, mount, pivot_root and setpriv of
  util-linux): no network, no other processes, no files but the interpreter's, read-only, and an empty /tmp in memory that is gone at
  the end;
- `rlimits-only`: limits of memory, CPU, files and processes alone. A program can then read and delete what its user can, and reach the
  network, and what it leaves behind may live on. Root becomes nobody where nobody can read the interpreter.

The verdict says which one was in force.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from jax_ordermerge.errors import UserError

ISOLATIONS = ("namespaces", "rlimits-only")
MEMORY = 1 << 30  # bytes a process


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        passed: all tests ran to their end.
        detail: `"passed"`, or what went wrong: `"failed: AssertionError"`, `"timeout"`.
        isolation: one of `ISOLATIONS`, which was in force.
    """

    passed: bool
    detail: str
    isolation: str


def judge(
    program: str,
    tests: str,
    names: Sequence[str],
    *,
    setup: str = "",
    timeout: float = 10.0,
    isolation: str | None = None,
) -> Verdict:
    """Run tests against the functions of a program.

    Args:
        program: Python source, not trusted.
        tests: Python source that ends without an exception where the program is right.
        names: functions of the program that the tests call. Arguments and results must be plain data (numbers, strings, bytes, lists,
            tuples, sets, dicts, None); a result of another type fails.
        setup: Python source the tests need, run before; the program's functions then replace those of `names`.
        timeout: seconds for all of it.
        isolation: one of `ISOLATIONS`; None is the strongest that works here.

    Raises:
        UserError: an isolation that does not work here.

    Example:
        >>> judge("def add(a, b): return a + b", "assert add(1, 2) == 3", ["add"]).passed
        True
        >>> judge("def add(a, b): return a - b", "assert add(1, 2) == 3", ["add"]).detail
        'failed: AssertionError: '
    """
    chosen = available()[0] if isolation is None else isolation
    if chosen not in available():
        raise UserError(f"isolation {chosen} does not work here; working: {', '.join(available())}")
    detail = _run(chosen, program, setup, tests, list(names), timeout)
    return Verdict(detail == "passed", detail, chosen)


@functools.cache
def available() -> tuple[str, ...]:
    """Return which of `ISOLATIONS` work here, the strongest first, as a trial says.

    Example:
        >>> available()[-1]
        'rlimits-only'
    """
    tools = ("unshare", "mount", "umount", "pivot_root", "setpriv", "env", "sh")
    present = all(shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin") for tool in tools)
    works = (
        present
        and _run("namespaces", "def f(x): return x", "", "assert f(1) == 1", ["f"], 20.0)
        == "passed"
    )
    return ISOLATIONS if works else ISOLATIONS[1:]


def _run(
    isolation: str, program: str, setup: str, tests: str, names: list[str], timeout: float
) -> str:
    deadline = time.monotonic() + timeout
    near, far = socket.socketpair()
    with near, far, contextlib.ExitStack() as stack:
        parts = []
        for part, channel, given in (
            ("program", near, {"source": program}),
            ("tests", far, {"setup": setup, "tests": tests, "names": names}),
        ):
            process = _start(isolation, part, channel.fileno(), timeout)
            stack.callback(_end, process)
            parts.append(process)
            pipe, process.stdin = process.stdin, None  # else communicate would flush it once more
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError), pipe:
                pipe.write(json.dumps(given).encode())
        near.close()
        far.close()
        try:
            found, _ = parts[1].communicate(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return "timeout"
    return (
        found.decode(errors="replace")
        or f"failed: the tests ended with exit code {parts[1].returncode}"
    )


def _start(isolation: str, part: str, handle: int, timeout: float) -> subprocess.Popen[bytes]:
    source = Path(__file__).with_name("sandbox_worker.py").read_text()
    inner = [
        _python(),
        "-I",
        "-S",
        "-c",
        source,
        part,
        str(handle),
        str(MEMORY),
        str(int(timeout) + 1),
    ]
    command = _namespaces() if isolation == "namespaces" else _plain()
    return subprocess.Popen(
        [*command, *inner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if part == "tests" else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
        cwd="/",
        pass_fds=(handle,),
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _python() -> str:
    # the interpreter itself, not a virtual environment's link to it: no installed package is wanted inside
    return os.path.realpath(sys.executable)


@functools.cache
def _needed() -> tuple[str, ...]:
    """Return the directories that an interpreter reads: its own and those of the system's libraries."""
    own = {
        os.path.realpath(sys.base_prefix),
        str(Path(_python()).parent),
        os.path.realpath(sysconfig.get_path("stdlib")),
    }
    system = [path for path in ("/usr", "/lib", "/lib64", "/bin") if Path(path).is_dir()]
    return (*system, *sorted(path for path in own if not path.startswith("/usr")))


def _plain() -> list[str]:
    return (
        list(_ROOT_DROPS)
        if os.geteuid() == 0 and _works([*_ROOT_DROPS, _python(), "-I", "-S", "-c", ""])
        else []
    )


def _works(command: list[str]) -> bool:
    return (
        shutil.which(command[0]) is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


# The kernel exempts root from the limit of processes, so that root becomes nobody at the end.
_DROPS = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")
_ROOT_DROPS = (*_DROPS, "--reuid=65534", "--regid=65534", "--clear-groups")

# A root of its own, made in memory over /mnt: then nothing of the old one is left to be seen.
_ENTER = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=1m,mode=755 tmpfs /mnt
for path in $NEEDED; do
  if [ -L "$path" ]; then ln -s "$(readlink "$path")" "/mnt$path"; continue; fi
  mkdir -p "/mnt$path"
  mount --bind "$path" "/mnt$path"
  mount -o remount,bind,ro "/mnt$path"
done
mkdir -p /mnt/dev /mnt/proc /mnt/tmp /mnt/old
for name in null zero random urandom; do : > "/mnt/dev/$name"; mount --bind "/dev/$name" "/mnt/dev/$name"; done
mount -t proc -o nosuid,nodev,noexec proc /mnt/proc
mount -t tmpfs -o size=16m,nr_inodes=4k,mode=1777,nosuid,nodev tmpfs /mnt/tmp
cd /mnt
pivot_root . old
umount -l /old
mount -o remount,ro /
cd /tmp
exec env -i PYTHONHASHSEED=0 "$@"
"""


def _namespaces() -> list[str]:
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    enter = ["unshare", *(() if os.geteuid() == 0 else ("--user", "--map-root-user"))]
    enter += ["--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child"]
    drops = _ROOT_DROPS if os.geteuid() == 0 else _DROPS
    return [
        *enter,
        "env",
        "-i",
        f"PATH={path}",
        f"NEEDED={' '.join(_needed())}",
        "sh",
        "-c",
        _ENTER,
        "sh",
        *drops,
    ]
