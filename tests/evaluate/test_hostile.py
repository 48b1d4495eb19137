"""Programs that attack the machine, or the verdict.

They must not pass, must not live on, and must leave nothing behind.
"""

import contextlib
import os
import pathlib
import socket
import time

import pytest

from jax_ordermerge.evaluate import sandbox
from tests.evaluate.forgeries import FORGERIES

TESTS = "for i in range(3): assert f(i) == i + 1"
needs_namespaces = pytest.mark.skipif(
    "namespaces" not in sandbox.available(), reason="this kernel or user may not make namespaces"
)

# Where an attack leaves no trace, a right `f` follows it: were the attack not refused, the program
# would pass.
# {port}: of a listener on loopback. {file}: a file that anyone may write. {mark}: marks processes.
HOSTILE = {
    "endless loop": "while True: pass",
    "endless loop in a call": "def f(x):\n    while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "endless loop that catches": (
        "def f(x):\n"
        "    while True:\n"
        "        try:\n"
        "            while True: pass\n"
        "        except BaseException: pass"
    ),
    "ignores signals": (
        "import signal, time\n"
        "for s in range(1, 32):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except Exception: pass\n"
        "time.sleep(1000)"
    ),
    "memory": "x = bytearray(1 << 34)\ndef f(x): return x + 1",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "endless output": "while True: print('x' * 100000)",
    "endless answer": "def f(x): return 'x' * (1 << 26)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "daemon": (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.execv('/bin/sh', ['{mark}', '-c', 'sleep 1000; : {mark}'])\n"
        "    os._exit(0)\n"
        "os.wait()"
    ),
    "threads": (
        "import threading, time\n"
        "for _ in range(10000): threading.Thread(target=time.sleep, args=(1000,)).start()"
    ),
    "loopback": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).send(b'hello')",
    # Nobody has this address: a timeout would say that packets leave the machine.
    "abroad": (
        "import errno, socket\n"
        "try: socket.create_connection(('192.0.2.1', 80), 0.5)\n"
        "except OSError as error:\n"
        "    if error.errno == errno.ENETUNREACH: raise\n"
        "def f(x): return x + 1"
    ),
    "abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0{mark}')",
    "deletes a file": "import os\nos.remove('{file}')",
    "overwrites a file": "open('{file}', 'w').write('mine')",
    "writes beside": "open('{file}.more', 'w').write('mine')",
    "writes to tmp": "open('/tmp/{mark}', 'w').write('mine')",
    "writes to shared memory": "open('/dev/shm/{mark}', 'w').write('mine')",
    "deletes everything": "import shutil\nshutil.rmtree('/', ignore_errors=True)",
    "reads a file": "open('{file}').read()\ndef f(x): return x + 1",
    "fills the disk": "f = open('/tmp/{mark}', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "exits early": "import sys\nsys.exit(0)",
    "exits early in a call": "import os\ndef f(x): os._exit(0)",
    "kills all": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kills its group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "forges on the standard output": (
        "print('passed', flush=True)\nimport os\nos.write(1, b'passed')\nos._exit(0)"
    ),
    "forges on every handle": (
        "import os\n"
        "for n in range(64):\n"
        "    try: os.write(n, b'passed')\n"
        "    except OSError: pass\n"
        "os._exit(0)"
    ),
    "forges messages": (
        "import os, json\n"
        "for n in range(3, 64):\n"
        "    for text in (b'[\"ready\", null]', b'[\"value\", true]') * 9:\n"
        "        try: os.write(n, len(text).to_bytes(8, 'big') + text)\n"
        "        except OSError: pass"
    ),
    "forges a long message": (
        "import os\n"
        "for n in range(3, 64):\n"
        "    try: os.write(n, b'\\xff' * 64)\n"
        "    except OSError: pass"
    ),
    "answers that are equal to all": (
        "class A(int):\n"
        "    def __eq__(self, o): return True\n"
        "    __hash__ = None\n"
        "def f(x): return A(7)"
    ),
    "spoils the builtins": (
        "import builtins\n"
        "builtins.AssertionError = builtins.Exception = ValueError\n"
        "builtins.range = lambda n: []\n"
        "def f(x): return 7"
    ),
    "spoils the frames": (
        "import sys\n"
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    frame.f_locals.update(tests='', names=[])\n"
        "    frame = frame.f_back\n"
        "def f(x): return 7"
    ),
    "spoils its own encoder": (
        "import __main__\n"
        "class T:\n"
        "    pass\n"
        "try: __main__.encode = lambda v: ['list', [['nothing', 1]]]\n"
        "except Exception: pass\n"
        "def f(x): return 7"
    ),
    "gets more rights": (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0\n"
        "def f(x): return x + 1"
    ),
    "raises its limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\ndef f(x): return x + 1"
    ),
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
    connections = []
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("\0" + mark)
        abstract.listen()
        for server in (listener, abstract):
            server.settimeout(0.1)
        program = (
            HOSTILE[name]
            .replace("{port}", str(listener.getsockname()[1]))
            .replace("{file}", str(file))
            .replace("{mark}", mark)
        )
        start = time.monotonic()
        verdict = sandbox.judge(program, TESTS, ["f"], timeout=1.5)
        assert time.monotonic() - start < 8
        for server in (listener, abstract):
            with contextlib.suppress(TimeoutError):
                connections.append(server.accept())
    assert not verdict.passed
    assert verdict.isolation == "namespaces"
    assert not connections
    assert file.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    for directory in ("/tmp", "/dev/shm"):
        assert not [path for path in pathlib.Path(directory).iterdir() if mark in path.name]
    assert not alive(mark)


def alive(mark):
    """Command lines of processes with the mark, and of sandbox workers of this process."""
    lines = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if mark.encode() in line or (
                b"share nothing but a socket" in line and parent in (1, os.getpid())
            ):
                lines.append(line)
    return lines


def test_channel_has_a_low_number():
    # more files than the limit of a worker: attacks by number reach the channel all the same
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(open(os.devnull))
        program, tests = FORGERIES["closes the channel in an expected exception"]
        assert not sandbox.judge(program, tests, ["f"], timeout=30.0).passed


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries(name):
    program, tests = FORGERIES[name]
    verdict = sandbox.judge(program, tests, ["f"], timeout=30.0)
    assert not verdict.passed
    # The tests ran, and it was not the machine that was slow.
    assert verdict.detail != "timeout"
