"""Tests of generated programs, isolated from the machine. Texts in, verdicts out.

A program runs in one interpreter and its tests in another, so that it cannot reach the tests or the
verdict. It can only answer calls over a socket. From the bottom up:

- `sandbox_values`: types whose values cross the socket by content, and how.
- `sandbox_proxies`: stand-ins for all other objects, such as functions and instances.
- `sandbox_objects`: the keys of objects that both sides know, and the JSON of values and proxies.
- `sandbox_rpc`: requests and answers, and what the side of the tests refuses.
- `sandbox_worker`: the main function of both interpreters.

Both are isolated by the stronger of

- `namespaces` of processes, network, mounts and, unless root starts it, users (unshare, mount,
  pivot_root and setpriv of util-linux). There is no network and no other process. The only files
  are those of the interpreter, read-only, and an empty /tmp in memory that is gone at the end.
- `rlimits-only`: limits of memory, CPU, files and processes. A program can then read and delete
  what its user can and reach the network, and processes that it leaves behind may live on. Root
  becomes nobody, where nobody can read the interpreter.

The verdict says which one was in force.
"""

import ast
import builtins
import contextlib
import dataclasses
import functools
import importlib.util
import json
import marshal
import os
import shutil
import signal
import socket
import subprocess
import symtable
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json

ISOLATIONS = ("namespaces", "rlimits-only")
# Enough for the tests of HumanEval and MBPP. Programs run one after another.
MEMORY = 1 << 30  # bytes per process
PACKAGES = ("numpy",)  # which programs and tests may import where they are installed


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
    reference: str = "",
    timeout: float = 10.0,
    isolation: str | None = None,
) -> Verdict:
    """Run tests against a program.

    The tests see what they would see if they followed the program in one file that is imported and
    not run as a script: its functions, classes, imports and global variables, arguments that it
    changes, exceptions that it raises. There are two exceptions, because a program must not pass
    by what it defines. Python's own functions are those of Python, unless `names` has them. And an
    object of a class of the program is equal only to other objects of the program; but one of a
    class that is derived from a type of Python, such as a named tuple, is compared as that type.

    Args:
        program: Python source, not trusted.
        tests: Python source that ends without an exception where the program is right.
        names: functions and classes that the tests check. The program has to define them, even
            where Python or the setup do.
        setup: Python source that runs between the program and its tests.
        reference: a right program. Modules and classes that it imports and that the tests use are
            imported for them, and not taken from the program. The objects of its classes have the
            arithmetic of the program also with numbers of the tests.
        timeout: seconds for the program and its tests together.
        isolation: one of `ISOLATIONS`; None is the strongest that works here.

    Raises:
        UserError: the isolation does not work here.

    Example:
        >>> judge("def add(a, b): return a + b", "assert add(1, 2) == 3", ["add"]).passed
        True
        >>> judge("def add(a, b): return a - b", "assert add(1, 2) == 3", ["add"]).detail
        'failed: AssertionError: '
        >>> judge("def sum(a): return 'wrong'", "assert sum([1, 2]) == 3", ["sum"]).passed
        False
    """
    isolation = isolation or available()[0]
    if isolation not in available():
        works = ", ".join(available())
        raise UserError(f"isolation {isolation} does not work here; working: {works}")
    detail = _run(isolation, program, setup, tests, list(names), timeout, reference)
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
    isolation: str,
    program: str,
    setup: str,
    tests: str,
    names: list[str],
    timeout: float,
    reference: str = "",
) -> str:
    """Run a program and its tests, and return the detail of the verdict."""
    free = free_names(f"{setup}\n{tests}")
    # Python's functions are not taken from the program, unless they are what is tested.
    reads = sorted({*names, *(free - set(dir(builtins)))})
    roles: dict[str, Json] = {
        "program": {
            "source": program,
            "imports": _imports(f"{setup}\n{tests}"),
            "reads": reads,
        },
        "tests": {
            "setup": setup,
            "tests": tests,
            "names": names,
            "reads": reads,
            "imports": _imports(reference),
            "classes": [
                node.name for node in _statements(reference) if isinstance(node, ast.ClassDef)
            ],
        },
    }
    # one deadline for start, program and tests: a program cannot gain time by starting slowly
    deadline = time.monotonic() + timeout
    # A pair of sockets: both directions on one descriptor, without a name that others could open.
    program_end, tests_end = socket.socketpair()
    with program_end, tests_end, contextlib.ExitStack() as stack:
        workers = []
        for role, channel in (("program", program_end), ("tests", tests_end)):
            process = _start(isolation, role, channel.fileno())
            stack.callback(_kill, process)
            workers.append(process)
            # Taken from the process, because communicate would flush the closed pipe again.
            pipe, process.stdin = process.stdin, None
            assert pipe is not None
            inputs = {
                "role": role,
                "handle": channel.fileno(),
                "memory": MEMORY,
                # The limit in CPU seconds also ends processes that a program leaves behind.
                "seconds": int(timeout) + 1,
                "packages": {
                    name: "/packages" if isolation == "namespaces" else str(directory)
                    for name, directory in _packages().items()
                },
                "arguments": list(roles[role]),
                **roles[role],
            }
            with contextlib.suppress(BrokenPipeError), pipe:
                pipe.write(json.dumps({"modules": _modules(), "inputs": inputs}).encode())
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


def _start(isolation: str, role: str, handle: int) -> subprocess.Popen[bytes]:
    # -I ignores variables and the directory of a user, -S leaves site-packages out.
    worker = [_python(), "-I", "-S", "-c", _BOOTSTRAP]
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
def _packages() -> dict[str, Path]:
    """Return the packages that programs may import, with the directories that hold them."""
    packages = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            packages[name] = Path(spec.origin).parents[1]
    return packages


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


@functools.cache
def _modules() -> dict[str, str]:
    """Return the modules of a worker, each after those that it imports, as compiled code."""
    modules = {}
    for part in ("values", "proxies", "objects", "rpc", "worker"):
        name = f"{__package__}.sandbox_{part}"
        source = Path(__file__).with_name(f"sandbox_{part}.py").read_text()
        # Not their files: the new root has no directory of this package. The interpreter is the
        # one of this process, so it reads the same code.
        code = marshal.dumps(compile(source, name, "exec"))
        modules[name] = code.hex()
    return modules


def free_names(source: str) -> set[str]:
    """Return the global names that a source reads and does not bind; none where it has errors.

    Example:
        >>> sorted(free_names("import math\\nassert all(f(x) == math.pi for x in y)"))
        ['all', 'f', 'y']
    """
    try:
        top = symtable.symtable(source, "<source>", "exec")
    except (SyntaxError, ValueError, RecursionError):
        return set()
    tables, reads, binds = [top], set[str](), set[str]()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            is_global = table is top or symbol.is_global()
            if is_global and symbol.is_referenced():
                reads.add(symbol.get_name())
            if is_global and (symbol.is_assigned() or symbol.is_imported()):
                binds.add(symbol.get_name())
    return reads - binds


def _statements(source: str) -> list[ast.stmt]:
    """Return the statements at the top level of a source; none where it has errors."""
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError):
        return []


def _imports(source: str) -> str:
    statements = _statements(source)
    imports = [node for node in statements if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(map(ast.unparse, imports))


def _without_root() -> list[str]:
    """Return the command that turns root into nobody, nothing where that does not work."""
    if os.geteuid() != 0 or shutil.which(_ROOT_DROPS[0]) is None:
        return []
    # Nobody may not be allowed to read an interpreter below the home of root.
    trial = subprocess.run(
        [*_ROOT_DROPS, _python(), "-I", "-S", "-c", ""], capture_output=True, check=False
    )
    return list(_ROOT_DROPS) if trial.returncode == 0 else []


# Makes the modules of a worker from what is on its standard input.
_BOOTSTRAP = """
# Of the two interpreters of a sandbox, which share nothing but a socket.
import json, marshal, sys, types
data = json.load(sys.stdin)
for name, code in data["modules"].items():
    parts = name.split(".")
    for package in [".".join(parts[:count]) for count in range(1, len(parts))]:
        sys.modules.setdefault(package, types.ModuleType(package)).__path__ = []
    module = sys.modules[name] = types.ModuleType(name)
    exec(marshal.loads(bytes.fromhex(code)), vars(module))
module.main(data["inputs"])
"""

# The kernel exempts root from the limit on processes, so root becomes nobody at the end.
_DROPS = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")
_ROOT_DROPS = (*_DROPS, "--reuid=65534", "--regid=65534", "--clear-groups")

# Builds a new root file system in memory over /mnt and detaches the old one, so that nothing of it
# can be seen.
_ENTER = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=1m,mode=755 tmpfs /mnt
IFS='
'
for path in $NEEDED; do
  if [ -L "$path" ]; then ln -s "$(readlink "$path")" "/mnt$path"; continue; fi
  mkdir -p "/mnt$path"
  mount --bind "$path" "/mnt$path"
  mount -o remount,bind,ro "/mnt$path"
done
for path in $PACKAGES; do
  mkdir -p "/mnt/packages/${path##*/}"
  mount --bind "$path" "/mnt/packages/${path##*/}"
  mount -o remount,bind,ro "/mnt/packages/${path##*/}"
done
unset IFS
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
    # A wheel keeps its libraries in NAME.libs beside the package.
    packages = [
        str(entry)
        for name, directory in _packages().items()
        for entry in (directory / name, directory / f"{name}.libs")
        if entry.is_dir()
    ]
    # Separated by line feeds, which `_ENTER` reads: paths may have spaces.
    needed = "\n".join(_interpreter_directories())
    command += ["env", "-i", f"PATH={path}", f"NEEDED={needed}"]
    command += ["PACKAGES=" + "\n".join(packages)]
    return [*command, "sh", "-c", _ENTER, "sh", *(_ROOT_DROPS if is_root else _DROPS)]
