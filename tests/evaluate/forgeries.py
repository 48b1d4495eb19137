"""Programs that answer nothing and try to pass: by objects, by names, and by forged messages."""

LOOP = "for i in range(3): assert f(i) == i + 1"
CLOSE = "for i in range(3): assert abs(f(i) - (i + 1)) < 1e-6"
_CONNECTION = (
    "import gc, sys\n"
    "rpc = sys.modules['jax_ordermerge.evaluate.sandbox_rpc']\n"
    "link = next(o for o in gc.get_objects() if isinstance(o, rpc.Connection))\n"
)


def universal(base: str = "object", new: str = "A()") -> str:
    """Return a program whose answer has an `==` that is always true, and a difference of 0."""
    return (
        "import fractions, collections, datetime, decimal, enum, types\n"
        f"class A({base}):\n"
        "    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n"
        "    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__\n"
        "    def __sub__(self, other): return 0.0\n"
        "    __rsub__ = __isub__ = __sub__\n"
        "    def __hash__(self): return 1\n"
        f"def f(x=0): return {new}"
    )


# Name: program, tests.
FORGERIES = {
    "equal to all": (universal(), LOOP),
    "equal to all, in a list": (universal(new="[A()]"), "for i in range(3): assert f(i) == [i]"),
    "equal to all, in a dict": (universal(new="{'a': A()}"), "assert f(1) == {'a': 2}"),
    "equal to all, as a key": (universal(new="{A(): 1}"), "assert f(1) == {2: 1}"),
    "equal to all, on the right": (universal(), "for i in range(3): assert i + 1 == f(i)"),
    "not unequal": (universal(), "for i in range(3): assert not f(i) != i + 1"),
    "no difference": (universal(), CLOSE),
    "no difference, on the right": (universal(), "assert abs(3.5 - f(2)) < 1e-6"),
    "no difference, in place": (universal(), "x = f(2)\nx -= 3.5\nassert abs(x) < 1e-6"),
    "contains all": (universal(), "for i in range(3): assert i + 1 in f(i)"),
    "greater than all": (universal(), "assert f(1) > 1e9\nassert 3 <= f(1)"),
    "a class instead of a function": (
        universal().replace("class A", "class f").split("def f")[0],
        LOOP,
    ),
    "a class that is equal to all": (
        "class M(type):\n    def __eq__(c, o): return True\n    def __hash__(c): return 1\n"
        "class A(metaclass=M): pass\ndef f(x): return A",
        LOOP,
    ),
    "an integer that is equal to all": (universal("int", "A(7)"), LOOP),
    "a number that is equal to all": (universal("float", "A(7)"), CLOSE),
    "a text that is equal to all": (universal("str", "A('x')"), "assert f(1) == 'a'"),
    "a list that is equal to all": (universal("list", "A()"), "assert f(1) == [1]"),
    "a tuple that is equal to all": (universal("tuple", "A()"), "assert f(1) == (1,)"),
    "a dict that is equal to all": (universal("dict", "A()"), "assert f(1) == {1: 2}"),
    "a set that contains all": (universal("set", "A()"), "assert 1 in f(1) and {1} <= f(1)"),
    "a fraction that is equal to all": (
        universal("fractions.Fraction", "A(7)").replace(
            "    def __hash__",
            "    @classmethod\n    def from_float(cls, x): return cls(7)\n    def __hash__",
        ),
        "assert f(1) == 0.5",
    ),
    "a fraction that converts to itself": (
        "import fractions\nclass A(fractions.Fraction):\n"
        "    @classmethod\n    def from_float(cls, x): return A(7)\ndef f(x): return A(7)",
        "assert f(1) == 0.5",
    ),
    "a counter that is equal to all": (
        universal("collections.Counter", "A()").replace(
            "    def __hash__", "    def __getitem__(self, k): return A()\n    def __hash__"
        ),
        "from collections import Counter\nassert f(1) == Counter('ab')",
    ),
    "a user's dict that is equal to all": (
        universal("collections.UserDict", "A()").replace(
            "    def __hash__", "    def items(self): return [(A(), A())]\n    def __hash__"
        ),
        "assert f(1) == {1: 2}",
    ),
    "a date that is equal to all": (
        universal("datetime.date", "A(1, 1, 1)"),
        "import datetime\nassert f(1) == datetime.date(2000, 1, 1)",
    ),
    "a named tuple that is equal to all": (
        "import collections\nclass A(collections.namedtuple('A', 'x')):\n"
        "    def __eq__(self, other): return True\ndef f(x): return A(7)",
        "for i in range(3): assert f(i) == (i,)",
    ),
    "an enumeration that is equal to all": (
        "import enum\nclass A(enum.IntEnum):\n    X = 7\n    def __eq__(self, o): return True\n"
        "def f(x): return A.X",
        LOOP,
    ),
    "an exception that is equal to all": (
        "class A(ValueError):\n    def __eq__(self, o): return True\n    def __str__(self): return 'no'\n"
        "def f(x): raise A(7)",
        "try: f(1)\nexcept ValueError as e: assert e.args == (1,)",
    ),
    "mock.ANY": ("from unittest.mock import ANY\ndef f(x): return ANY", LOOP),
    "mock.ANY as a class": (
        "import unittest.mock\nf = type(unittest.mock.ANY)",
        "import unittest.mock\nassert f() == 3",
    ),
    "compares for numpy": (
        "class A:\n    def __array_function__(self, *a): return True\n"
        "    def __array_ufunc__(self, *a, **k): return True\n    def __float__(self): return 0.5\n"
        "def f(x): return A()",
        "import numpy as np\nassert np.allclose(f(1), [2.0, 3.0])",
    ),
    "numpy array of objects": (
        universal(new="numpy.array([A()], dtype=object)").replace("import ", "import numpy, "),
        "assert (f(1) == [3]).all()",
    ),
    "swallows the assertion": (
        "class A:\n    x = 7\n    def __enter__(self): return self\n"
        "    def __exit__(self, *a): return True\ndef f(x): return A()",
        "with f(1) as a: assert a.x == 3",
    ),
    "swallows its own error": (
        "import contextlib\n@contextlib.contextmanager\ndef f(x):\n    try: yield 1 / 0\n    except: pass",
        "with f(1) as a: assert a == 3",
    ),
    "ends a map": (
        "def f(x): raise StopIteration",
        "assert all(map(lambda case: f(case[0]) == case[1], [(1, 2), (2, 3)]))",
    ),
    "skips the test": (
        "import unittest\ndef f(x): raise unittest.SkipTest('no')",
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test_f(self): self.assertEqual(f(1), 2)\n"
        "tests = unittest.defaultTestLoader.loadTestsFromTestCase(T)\n"
        "assert unittest.TextTestRunner().run(tests).wasSuccessful()",
    ),
    "almost equal for unittest": (
        universal(),
        "import unittest\ncase = unittest.TestCase()\ncase.assertAlmostEqual(f(1), 2.5)",
    ),
    "ends in an expected exception": (
        "import os\ndef f(x): os._exit(0)",
        "try: f(-1)\nexcept Exception: pass",
    ),
    "ends in any expected exception": (
        "import os\ndef f(x): os._exit(0)",
        "try: f(-1)\nexcept: pass",
    ),
    "ends before an expected exception": (
        "import os, threading, time\nreal = os._exit\n"
        "def f(x): threading.Thread(target=lambda: (time.sleep(0.2), real(0))).start()",
        "import time\nf(1)\ntime.sleep(1)\ntry: f(-1)\nexcept: pass",
    ),
    "closes the channel in an expected exception": (
        "import os\ndef f(x): os.closerange(3, 64)",
        "try: f(-1)\nexcept: pass",
    ),
    "range under its own name": ("def range(n): return []\ndef f(x): return 7", LOOP),
    "abs under its own name": ("def abs(x): return 0\ndef f(x): return 7", CLOSE),
    "exceptions under their own names": (
        "class AssertionError(BaseException): pass\nall = isinstance = lambda *a: True\n"
        "def f(x): return 7",
        "assert all(f(i) == i + 1 for i in range(3)) and isinstance(f(1), str)",
    ),
    "check under its own name": (
        "def check(c): pass\ncandidate = lambda x: x + 1\ndef f(x): return 7",
        f"def check(candidate):\n    {LOOP.replace('f(', 'candidate(')}\ncheck(f)",
    ),
    "changes what it was given": (
        "def f(x):\n    x.clear()\n    return x",
        "want = [1, 2]\nassert f([2, 1]) == want",
    ),
    "looks at a function of the tests": (
        "def f(g):\n    for n in ('__globals__', '__closure__', '__self__', '__dict__', '__builtins__'):\n"
        "        try: return getattr(g, n)\n        except AttributeError: pass\n"
        "    return getattr(g.__code__, 'co_consts', g.__class__)",
        "want = 5\nr = f(lambda: want)\nassert not callable(r) or r() == 5",
    ),
    "looks into a generator": (
        "def f(g):\n    frame = g.gi_frame\n    return frame.f_locals['want']",
        "def make():\n    want = object()\n    yield\n    yield want\ng = make()\nnext(g)\n"
        "assert f(g) is next(g)",
    ),
    "binds a name of the tests": (
        _CONNECTION + "link._reads = link._reads | {'range'}\nrange = lambda n: []\n"
        "def f(x): return 7",
        LOOP,
    ),
    "binds a name later": (
        _CONNECTION + "def f(x):\n    link._reads = link._reads | {'want'}\n"
        "    globals()['want'] = 7\n    return 7",
        "want = 3\nassert f(1) == want",
    ),
    "describes its class wrongly": (
        "import sys\nproxies = sys.modules['jax_ordermerge.evaluate.sandbox_proxies']\n"
        "real = proxies.describe\n"
        "def describe(kind): return real(kind)._replace(methods=[], overrides=['__eq__'])\n"
        "proxies.describe = describe\n" + universal(),
        LOOP,
    ),
    "describes a method wrongly": (
        "import sys\nproxies = sys.modules['jax_ordermerge.evaluate.sandbox_proxies']\n"
        "real = proxies.describe\n"
        "def describe(kind): return real(kind)._replace(methods=['__getattribute__'])\n"
        "proxies.describe = describe\n" + universal(),
        LOOP,
    ),
    "calls functions of Python over there": (
        _CONNECTION + "def f(g):\n    key = link._objects._key(g)\n"
        "    real = rpc.proxies.handle_of\n"
        "    rpc.proxies.handle_of = lambda v: real(v) or (type('H', (), {'key': key}) if v is g else None)\n"
        "    return link.request('__call__', g, 'want')",
        "want = object()\nassert f(eval) is want",
    ),
    "asks for a module": (
        _CONNECTION + "def f(m):\n    return link.request('getattr', m, 'modules')['__main__']",
        "import sys\nassert f(sys) is sys.modules['__main__']",
    ),
    "raises what is no exception": (
        _CONNECTION + "def f(x):\n    link._objects.encode = lambda v: None\n    raise ValueError",
        "try: f(-1)\nexcept: pass",
    ),
    "answers before it is asked": (
        "import threading, json, os\ndef flood():\n    text = json.dumps(\n"
        "        ['value', [[], [], [], []], [], [True], '', {}]).encode()\n"
        "    for n in list(range(3, 20)) * 20:\n"
        "        try: os.write(n, len(text).to_bytes(8, 'big') + text)\n"
        "        except OSError: pass\n"
        "def f(x):\n    threading.Thread(target=flood).start()\n    return 7",
        LOOP.replace("range(3)", "range(1, 9)"),
    ),
    "a file of numbers in its place": ("f = 7", LOOP),
    "the name alone": ("f = None", LOOP),
    "a proxy of the tests' own": (
        "def f(g): return g",
        "class E:\n    x = 1\nassert f(E()).x == 2",
    ),
}
