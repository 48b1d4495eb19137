"""Programs that are right, wrong and hostile. A hostile one must not pass, must not live on, and must leave nothing behind."""

import contextlib
import gzip
import json
import os
import pathlib
import socket
import time

import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import sandbox
from jax_ordermerge.evaluate.tasks import programs

TESTS = "for i in range(3): assert f(i) == i + 1"
RIGHT = "def f(x): return x + 1"
needs_namespaces = pytest.mark.skipif(
    "namespaces" not in sandbox.available(), reason="this kernel or user may not make namespaces"
)


@pytest.mark.parametrize("isolation", sandbox.available())
def test_right_and_wrong(isolation):
    found = sandbox.judge(RIGHT, TESTS, ["f"], isolation=isolation)
    assert found == sandbox.Verdict(True, "passed", isolation)
    for program, said in (
        ("def f(x): return x", "AssertionError"),
        ("def f(x): return x +", "SyntaxError"),
        ("def g(x): return x + 1", "KeyError: 'f'"),
        ("def f(x): raise ValueError('no')", "ValueError: no"),
        ("", "KeyError: 'f'"),
    ):
        wrong = sandbox.judge(program, TESTS, ["f"], isolation=isolation)
        assert not wrong.passed
        assert said in wrong.detail


def test_plain_data_travels_as_it_is():
    program = "def f(*a, **k): return a, k\ndef kind(x): return type(x).__name__"
    tests = """
values = [1, True, None, -0.0, float("inf"), 2 + 3j, "ä\\n", b"\\x00\\xff", [1, (2, [3])], {1: {2.5: (3,)}}, {4, 5}, frozenset("ab"), 10**40]
for value in values:
    (back,), named = f(value, key=value)
    assert back == value == named["key"] and type(back) is type(value) and kind(value) == type(value).__name__
assert repr(f(-0.0)[0][0]) == "-0.0" and f(float("nan"))[0][0] != f(float("nan"))[0][0]
"""
    assert sandbox.judge(program, tests, ["f", "kind"]).detail == "passed"
    assert "not plain data" in sandbox.judge("def f(x): return lambda: x", TESTS, ["f"]).detail


# {port}: of a listener on loopback; {file}: a file that anyone may write; {mark}: names the process
HOSTILE = {
    "endless loop": "while True: pass",
    "endless loop in a call": "def f(x):\n    while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "endless loop that catches": "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
    "ignores signals": "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\ntime.sleep(1000)",
    "memory": "x = bytearray(1 << 34)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "endless output": "while True: print('x' * 100000)",
    "endless answer": "def f(x): return 'x' * (1 << 26)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.execv('/bin/sh', ['{mark}', '-c', 'sleep 1000; : {mark}'])\n    os._exit(0)\nos.wait()",
    "threads": "import threading, time\nfor _ in range(10000): threading.Thread(target=time.sleep, args=(1000,)).start()",
    "loopback": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).send(b'hello')",
    "abroad": "import socket\nsocket.create_connection(('192.0.2.1', 80), 2)",
    "abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0{mark}')",
    "deletes a file": "import os\nos.remove('{file}')",
    "overwrites a file": "open('{file}', 'w').write('mine')",
    "writes beside": "open('{file}.more', 'w').write('mine')",
    "writes to tmp": "open('/tmp/{mark}', 'w').write('mine')",
    "writes to shared memory": "open('/dev/shm/{mark}', 'w').write('mine')",
    "deletes everything": "import shutil\nshutil.rmtree('/', ignore_errors=True)",
    "reads a file": "open('{file}').read()\ndef f(x): return x + 1\nraise SystemExit",
    "fills the disk": "f = open('/tmp/{mark}', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "exits early": "import sys\nsys.exit(0)",
    "exits early in a call": "import os\ndef f(x): os._exit(0)",
    "kills all": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kills its group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "forges on the standard output": "print('passed', flush=True)\nimport os\nos.write(1, b'passed')\nos._exit(0)",
    "forges on every handle": "import os\nfor n in range(64):\n    try: os.write(n, b'passed')\n    except OSError: pass\nos._exit(0)",
    "forges messages": "import os, json\nfor n in range(3, 64):\n    for text in (b'[\"ready\", null]', b'[\"value\", true]') * 9:\n        try: os.write(n, len(text).to_bytes(8, 'big') + text)\n        except OSError: pass",
    "forges a long message": "import os\nfor n in range(3, 64):\n    try: os.write(n, b'\\xff' * 64)\n    except OSError: pass",
    "answers that are equal to all": "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return A(7)",
    "spoils the builtins": "import builtins\nbuiltins.AssertionError = builtins.Exception = ValueError\nbuiltins.range = lambda n: []\ndef f(x): return 7",
    "spoils the frames": "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_locals.update(tests='', names=[])\n    frame = frame.f_back\ndef f(x): return 7",
    "spoils its own encoder": "import __main__\nclass T:\n    pass\ntry: __main__.encode = lambda v: ['list', [['nothing', 1]]]\nexcept Exception: pass\ndef f(x): return 7",
    "gets more rights": "import ctypes, os\nlibc = ctypes.CDLL(None)\nassert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\ndef f(x): return 7",
}


@needs_namespaces
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, tmp_path):
    mark = f"mark-{os.getpid()}-{abs(hash(name)) % 10**9}"
    file = tmp_path / "precious"
    file.write_text("precious")
    for path in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(path, 0o777)
    os.chmod(file, 0o666)
    heard = []
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("\0" + mark)
        abstract.listen()
        for one in (listener, abstract):
            one.settimeout(0.1)
        program = (
            HOSTILE[name]
            .replace("{port}", str(listener.getsockname()[1]))
            .replace("{file}", str(file))
            .replace("{mark}", mark)
        )
        start = time.monotonic()
        found = sandbox.judge(program, TESTS, ["f"], timeout=1.5)
        assert time.monotonic() - start < 8
        for one in (listener, abstract):
            with contextlib.suppress(TimeoutError):
                heard.append(one.accept())
    assert not found.passed
    assert found.isolation == "namespaces"
    assert not heard
    assert file.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert not [
        path
        for home in ("/tmp", "/dev/shm")
        for path in pathlib.Path(home).iterdir()
        if mark in path.name
    ]
    assert not alive(mark)


def alive(mark):
    """Processes that carry the mark in their command line, or whose command line is that of a sandbox of this process."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if mark.encode() in line or (
                b"shares nothing but a socket" in line and parent in (1, os.getpid())
            ):
                found.append(line)
    return found


@needs_namespaces
def test_what_a_program_sees():
    program = """
import os, socket
def f(): return sorted(os.listdir("/")), os.listdir("/tmp"), [p for p in os.listdir("/proc") if p.isdigit()], dict(os.environ)
def interfaces(): return [name for _, name in socket.if_nameindex()]
def user(): return os.getuid(), open("/proc/self/status").read()
"""
    tests = """
root, tmp, processes, environment = f()
assert tmp == [] and len(processes) <= 3 and set(environment) <= {"PYTHONHASHSEED", "LC_CTYPE"}, (tmp, processes, environment)
assert not {"home", "work", "etc", "var", "mnt", "sys"} & set(root), root
assert interfaces() == ["lo"]
assert "CapEff:\\t0000000000000000" in user()[1] and "NoNewPrivs:\\t1" in user()[1]
"""
    assert sandbox.judge(program, tests, ["f", "interfaces", "user"]).detail == "passed"


def test_the_weaker_isolation_says_so_and_still_ends_loops():
    found = sandbox.judge("while True: pass", TESTS, ["f"], timeout=2.0, isolation="rlimits-only")
    assert found == sandbox.Verdict(False, "timeout", "rlimits-only")
    assert not sandbox.judge(
        "x = bytearray(1 << 34)", TESTS, ["f"], isolation="rlimits-only"
    ).passed
    with pytest.raises(UserError, match="isolation none does not work here"):
        sandbox.judge(RIGHT, TESTS, ["f"], isolation="none")


def humaneval(shared_data):
    with gzip.open(shared_data / "code" / "HumanEval.jsonl.gz", "rt") as file:
        return programs.humaneval([json.loads(line) for line in file])


def test_some_humaneval_references_pass_and_stubs_fail(shared_data):
    for problem in humaneval(shared_data)[::16]:
        assert problem.judge(problem.reference).detail == "passed", problem.id
        assert not problem.judge("    pass\n").passed, problem.id


@pytest.mark.slow
def test_all_humaneval_references_pass_and_stubs_fail(shared_data):
    problems = humaneval(shared_data)
    assert len(problems) == 164
    wrong = [
        problem.id for problem in problems if not problem.judge(problem.reference, 20.0).passed
    ]
    stubs = [problem.id for problem in problems if problem.judge("    pass\n").passed]
    assert (wrong, stubs) == ([], [])
