"""Tests of generated programs, isolated from the machine. Texts in, verdicts out.

A program runs in one interpreter and its tests in another; see `sandbox_worker.py`. Both are
isolated by the stronger of

- `namespaces` of processes, network, mounts and, unless root starts it, users (unshare, mount,
  pivot_root and setpriv of util-linux). There is no network and no other process. The only files
  are those of the interpreter, read-only, and an empty /tmp in memory that is gone at the end.
- `rlimits-only`: limits of memory, CPU, files and processes. A program can then read and delete
  what its user can and reach the network, and processes that it leaves behind may live on. Root
  becomes nobody, where nobody can read the interpreter.

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
# Enough for the tests of HumanEval and MBPP. Programs run one after another.
MEMORY = 1 << 30  # bytes per process


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a program.

    Attributes:
        passed: whether all tests ran to their end.
        detail: `"passed"`, `"timeout"`, or an error such as `"failed: AssertionError"`.
        isolation: the one of `ISOLATIONS` that was in force.
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
        names: functions of the program that the tests call. Arguments and results must be plain
            data (numbers, strings, bytes, lists, tuples, sets, dicts, None); a result of another
            type fails.
        setup: Python source that runs before the tests; functions of `names` then replace those
            that it defines.
        timeout: seconds for the program and its tests together.
        isolation: one of `ISOLATIONS`; None is the strongest that works here.

    Raises:
        UserError: the isolation does not work here.

    Example:
        >>> judge("def add(a, b): return a + b", "assert add(1, 2) == 3", ["add"]).passed
        True
        >>> judge("def add(a, b): return a - b", "assert add(1, 2) == 3", ["add"]).detail
        'failed: AssertionError: '
    """
    isolation = isolation or available()[0]
    if isolation not in available():
        works = ", ".join(available())
        raise UserError(f"isolation {isolation} does not work here; working: {works}")
    detail = _run(isolation, program, setup, tests, list(names), timeout)
    return Verdict(detail == "passed", detail, isolation)


@functools.cache
def available() -> tuple[str, ...]:
    """Return the `ISOLATIONS` that work here, the strongest first. Each is tried once.

    Example:
        >>> available()[-1]
        'rlimits-only'
    """
    # Only directories of the system: a user's PATH could shadow the tools.
    tools = ("unshare", "mount", "umount", "pivot_root", "setpriv", "env", "sh")
    present = all(shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin") for tool in tools)
    # Kernels and containers forbid namespaces in many ways: only a trial tells.
    trial = ("namespaces", "def f(x): return x", "", "assert f(1) == 1", ["f"], 20.0)
    return ISOLATIONS if present and _run(*trial) == "passed" else ISOLATIONS[1:]


def _run(
    isolation: str, program: str, setup: str, tests: str, names: list[str], timeout: float
) -> str:
    """Run a program and its tests, and return the detail of the verdict."""
    # one deadline for start, program and tests: a program cannot gain time by starting slowly
    deadline = time.monotonic() + timeout
    # A pair of sockets: both directions on one descriptor, without a name that others could open.
    program_end, tests_end = socket.socketpair()
    with program_end, tests_end, contextlib.ExitStack() as stack:
        workers = []
        for role, channel, inputs in (
            ("program", program_end, {"source": program}),
            ("tests", tests_end, {"setup": setup, "tests": tests, "names": names}),
        ):
            process = _start(isolation, role, channel.fileno(), timeout)
            stack.callback(_kill, process)
            workers.append(process)
            # Taken from the process, because communicate would flush the closed pipe again.
            pipe, process.stdin = process.stdin, None
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError), pipe:
                pipe.write(json.dumps(inputs).encode())
        # Open copies here would keep a worker waiting for the other after that one has ended.
        program_end.close()
        tests_end.close()
        try:
            # The verdict comes from the process of the tests alone. The program cannot write there.
            verdict, _ = workers[1].communicate(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return "timeout"
    exit_code = workers[1].returncode
    # no verdict: the tests ended before they wrote one, killed by a limit for example
    return verdict.decode(errors="replace") or f"failed: the tests ended with exit code {exit_code}"


def _start(isolation: str, role: str, handle: int, timeout: float) -> subprocess.Popen[bytes]:
    # As text: the new root has no directory of this package.
    source = Path(__file__).with_name("sandbox_worker.py").read_text()
    # The limit in CPU seconds also ends processes that a program leaves behind.
    limits = [str(MEMORY), str(int(timeout) + 1)]
    # -I ignores variables and the directory of a user, -S leaves site-packages out.
    worker = [_python(), "-I", "-S", "-c", source, role, str(handle), *limits]
    wrapper = _namespaces() if isolation == "namespaces" else _without_root()
    return subprocess.Popen(
        [*wrapper, *worker],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if role == "tests" else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Nothing of this environment, which may hold credentials. A fixed hash seed makes the order
        # of sets, and so verdicts, repeatable.
        env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
        cwd="/",
        pass_fds=(handle,),
        # A group of its own, by which all that it starts can be killed.
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    # The whole group: a program may have started processes.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _python() -> str:
    # The interpreter itself and not the link to it in a virtual environment, so that a program sees
    # no installed package.
    return os.path.realpath(sys.executable)


@functools.cache
def _interpreter_directories() -> tuple[str, ...]:
    """Return the directories that an interpreter reads: its files and the system's libraries."""
    python = {
        os.path.realpath(sys.base_prefix),
        str(Path(_python()).parent),
        os.path.realpath(sysconfig.get_path("stdlib")),
    }
    # Of merged systems /bin and /lib are links, which are copied as links.
    system = [path for path in ("/usr", "/lib", "/lib64", "/bin") if Path(path).is_dir()]
    return (*system, *sorted(path for path in python if not path.startswith("/usr")))


def _without_root() -> list[str]:
    """Return the command that turns root into nobody, nothing where that does not work."""
    if os.geteuid() != 0 or shutil.which(_ROOT_DROPS[0]) is None:
        return []
    # Nobody may not be allowed to read an interpreter below the home of root.
    trial = subprocess.run(
        [*_ROOT_DROPS, _python(), "-I", "-S", "-c", ""], capture_output=True, check=False
    )
    return list(_ROOT_DROPS) if trial.returncode == 0 else []


# The kernel exempts root from the limit on processes, so root becomes nobody at the end.
_DROPS = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")
_ROOT_DROPS = (*_DROPS, "--reuid=65534", "--regid=65534", "--clear-groups")

# Builds a new root file system in memory over /mnt and detaches the old one, so that nothing of it
# can be seen.
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
for name in null zero random urandom; do
  : > "/mnt/dev/$name"
  mount --bind "/dev/$name" "/mnt/dev/$name"
done
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
    is_root = os.geteuid() == 0
    # As a user a namespace of users comes first: in it one may make the others.
    command = ["unshare", *(() if is_root else ("--user", "--map-root-user"))]
    # --kill-child: when unshare is killed, the namespace of processes ends with it
    command += ["--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child"]
    command += ["env", "-i", f"PATH={path}", f"NEEDED={' '.join(_interpreter_directories())}"]
    return [*command, "sh", "-c", _ENTER, "sh", *(_ROOT_DROPS if is_root else _DROPS)]
