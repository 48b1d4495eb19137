"""More programs as models write them; see `answers.py`."""

from tests.evaluate.answers import RESULTS, case

ARGUMENTS = {
    "sorts in place": case(
        "def arrange(xs): xs.sort(reverse=$)",
        *("False", "True"),
        "a = [3, 1, 2]\nassert arrange(a) is None\nassert a == [1, 2, 3]",
    ),
    "changes nested arguments": case(
        "def blank(grid):\n    for row in grid: row[0] = $\n    return grid",
        *("0", "1"),
        "g = [[5, 5], [6, 6]]\nfirst = g[0]\nassert blank(g) is g\n"
        "assert g == [[0, 5], [0, 6]] and first == [0, 5] and g[0] is first",
    ),
    "the same argument twice": case(
        "def push(a, b):\n    a.append(1)\n    return len(b)$",
        *("", "+ 1"),
        "x = []\nassert push(x, x) == 1 and x == [1]\nassert push([], x) == 1",
    ),
    "changes dicts, sets and bytes": case(
        "from collections import deque\ndef fill(d, s, b, q):\n"
        "    d['n'] = 1\n    s.add($)\n    b += b'!'\n    q.rotate(1)",
        *("2", "3"),
        "from collections import deque\nd, s, b, q = {}, {1}, bytearray(b'a'), deque([1, 2])\n"
        "fill(d, s, b, q)\nassert (d, s, b, list(q)) == ({'n': 1}, {1, 2}, b'a!', [2, 1])",
    ),
    "keeps its argument": case(
        "kept = []\ndef remember(x): kept.append(x)\ndef recall(): return kept[$]",
        *("0", "-1"),
        "x = [1]\nremember(x)\nremember([9])\nx.append(2)\nassert recall() == [1, 2]\n"
        "assert recall() is x\nrecall().append(3)\nassert x == [1, 2, 3]",
    ),
    "default argument that grows": case(
        "def collect(x, into=[]):\n    into.append(x)\n    return into$",
        *("", "[:]"),
        "assert collect(1) == [1]\nassert collect(2) == [1, 2]\na = collect(3)\na.clear()\n"
        "assert collect(4) == [4]",
    ),
    "swaps": case(
        "def swap(a, i, j): a[i], a[j] = a[$], a[i]",
        *("j", "i"),
        "a = [1, 2, 3]\nswap(a, 0, 2)\nassert a == [3, 2, 1]",
    ),
    "functions as arguments": case(
        "def twice(f, x): return f($)",
        *("f(x)", "x"),
        "assert twice(lambda x: x + 3, 1) == 7\nassert twice(str.upper, 'a') == 'A'\n"
        "def double(x): return 2 * x\nassert twice(double, 3) == 12\nassert twice(abs, -3) == 3",
    ),
    "curried": case(
        "import inspect\ndef curry(f):\n    n = len(inspect.signature(f).parameters)\n"
        "    def step(*a): return f(*a) if len(a) >= $ else lambda *b: step(*a, *b)\n    return step",
        *("n", "n - 1"),
        "assert curry(lambda a, b, c: a + b * c)(1)(2)(3) == 7\n"
        "def join(a, b='-'): return a + b\nassert curry(join)('x')('y') == 'xy'",
    ),
    "keys for sorting": case(
        "def ordered_by(xs, key): return sorted(xs, key=key)[::$]",
        *("1", "-1"),
        "assert ordered_by(['bb', 'a'], len) == ['a', 'bb']\n"
        "assert ordered_by([3, 1, 2], lambda x: -x) == [3, 2, 1]",
    ),
    "callback that collects": case(
        "def visit(xs, see):\n    for x in xs: see($)",
        *("x", "-x"),
        "seen = []\nvisit([1, 2], seen.append)\nassert seen == [1, 2]\n"
        "visit([[1]], lambda x: x.append(7))",
    ),
    "callback that changes what the program holds": case(
        "def edit(change):\n    xs = [1, 2]\n    change(xs)\n    return sum(xs)$",
        *("", "+ 1"),
        "def grow(xs): xs.append(10)\nassert edit(grow) == 13",
    ),
    "callback that fails": case(
        "def attempt(f):\n    try: return f()\n    except $: return 'division'",
        *("ZeroDivisionError", "KeyError"),
        "assert attempt(lambda: 1 / 0) == 'division'\nassert attempt(lambda: 5) == 5",
    ),
    "iterators as arguments": case(
        "def first_two(xs): return next(xs), $",
        *("next(xs)", "2"),
        "it = iter([5, 6, 7])\nassert first_two(it) == (5, 6)\nassert next(it) == 7\n"
        "assert first_two(x * x for x in [1, 3]) == (1, 9)",
    ),
    "objects of the tests": case(
        "def describe(p):\n    p.seen = True\n    return p.name + '$' + p.hello('x') + str(len(p))",
        *(":", ";"),
        "class Person:\n    name = 'Ann'\n    def hello(self, s): return s * 2\n"
        "    def __len__(self): return 3\np = Person()\nassert describe(p) == 'Ann:xx3' and p.seen",
    ),
    "types as arguments": case(
        "def only(xs, kind): return [x for x in xs if $ isinstance(x, kind)]",
        *("", "not"),
        "assert only([1, 'a', 2.0], int) == [1]\nassert only(['b', 3], (str, float)) == ['b']",
    ),
    "keyword arguments": case(
        "def tag(*args, sep='-', **more): return sep.join(args) + str(sorted(more.items()))$",
        *("", "* 2"),
        "assert tag('a', 'b', sep='+', k=[1]) == \"a+b[('k', [1])]\"\n"
        "assert tag(*'ab', **{'z': 1, 'self': 2}) == \"a-b[('self', 2), ('z', 1)]\"",
    ),
}
EXCEPTIONS = {
    "expected exceptions": case(
        "def positive(x):\n    if x < 0: raise $('no')\n    return x",
        *("ValueError", "TypeError"),
        "try:\n    positive(-1)\n    assert False\n"
        "except ValueError as e: assert str(e) == 'no' and e.args == ('no',)\nassert positive(1) == 1",
    ),
    "exceptions of Python": case(
        "def pick(d, k): return $",
        *("d[k]", "d.get(k)"),
        "for d, k, kind in (({}, 1, KeyError), ([], 1, IndexError), (None, 1, TypeError)):\n"
        "    try: pick(d, k)\n    except kind: continue\n    assert False",
    ),
    "own exceptions": case(
        "class Empty($):\n    def __init__(self, n):\n        super().__init__(f'{n} left')\n"
        "        self.n = n\ndef take(n):\n    raise Empty(n)",
        *("LookupError", "OSError"),
        "try: take(3)\nexcept LookupError as e: assert e.n == 3 and str(e) == '3 left'\n"
        "try: take(4)\nexcept Empty as e: assert type(e).__name__ == 'Empty'\n"
        "assert issubclass(Empty, LookupError)",
    ),
    "exceptions with a text of their own": case(
        "class Odd(Exception):\n    def __str__(self): return 'odd$'\ndef odd(): raise Odd(1)",
        *("", "ly"),
        "try: odd()\nexcept Exception as e: assert str(e) == 'odd' and e.args == (1,)",
    ),
    "exceptions of modules": case(
        "import json\ndef load(s): return json.loads(s$)",
        *("", " or '{}'"),
        "import json\ntry: load('')\nexcept json.JSONDecodeError as e: assert e.pos == 0\n"
        "else: assert False\ntry: load('')\nexcept ValueError: pass",
    ),
    "exit": case(
        "import sys\ndef leave(): sys.exit($)",
        *("3", "4"),
        "try: leave()\nexcept SystemExit as e: assert e.code == 3\nelse: assert False",
    ),
    "stop": case(
        "def take_one(it): return next(it$)",
        *("", ", None"),
        "try: take_one(iter([]))\nexcept StopIteration: pass\nelse: assert False",
    ),
    "assertions of the program": case(
        "def checked(x):\n    assert x $ 0, 'negative'\n    return x",
        *(">=", "<"),
        "try: checked(-1)\nexcept AssertionError as e: assert str(e) == 'negative'\n"
        "else: raise ValueError\nassert checked(2) == 2",
    ),
    "recursion": case(
        "def endless(n): return endless(n + 1)$",
        *("", "if n < 9 else 9"),
        "try: endless(0)\nexcept RecursionError: pass\nelse: assert False",
    ),
}
NAMES = {
    "imports of the program": case(
        "import math\nfrom collections import Counter as C\ndef area(r): return math.pi * r ** $",
        *("2", "3"),
        "assert math.isclose(area(2), 4 * math.pi)\nassert C('aa') == {'a': 2}",
    ),
    "imports of the tests": case(
        "def root_of(x): return math.sqrt(x) $",
        *("", "+ 1"),
        "import math\nassert root_of(9) == 3",
    ),
    "global variables": case(
        "LIMIT = 3\ncalls = 0\nlog = []\ndef count():\n    global calls\n    calls += 1\n    log.append($)",
        *("calls", "1"),
        "assert LIMIT == 3 and calls == 0\ncount()\ncount()\nassert calls == 2 and log == [1, 2]",
    ),
    "several functions": case(
        "def encode_text(s): return s[::-1]\ndef decode_text(s): return s[::$]",
        *("-1", "1"),
        "import random, string\nfor _ in range(20):\n"
        "    s = ''.join(random.choice(string.ascii_letters) for _ in range(9))\n"
        "    assert decode_text(encode_text(s)) == s",
    ),
    "class": case(
        "class Stack:\n    size = 0\n    def __init__(self): self.items = []\n"
        "    def push(self, x):\n        self.items.append(x)\n        Stack.size += 1\n"
        "        return self\n    def pop(self): return self.items.pop($)\n"
        "    def __len__(self): return len(self.items)\n"
        "    @property\n    def top(self): return self.items[-1]\n"
        "    @classmethod\n    def of(cls, *xs):\n        s = cls()\n        s.items.extend(xs)\n"
        "        return s",
        *("", "0"),
        "s = Stack()\nassert s.push(1).push(2) is s and len(s) == 2 and Stack.size == 2\n"
        "s.items.append(3)\nassert s.top == 3 and s.pop() == 3 and s.pop() == 2 and s.items == [1]\n"
        "s.items = [7]\nassert s.pop() == 7 and not s and isinstance(s, Stack)\n"
        "assert Stack.of(1, 2).pop() == 2 and Stack.of().__class__ is Stack",
    ),
    "linked nodes": case(
        "class Node:\n    def __init__(self, v, rest=None): self.v, self.rest = v, rest\n"
        "def total(n): return n.v + total(n.rest) if n else $",
        *("0", "1"),
        "n = Node(1, Node(2))\nn.rest.rest = Node(3)\nassert total(n) == 6\n"
        "assert n.rest.v == 2 and n.rest is n.rest and not hasattr(n, 'other')",
    ),
    "equal objects": case(
        "import dataclasses\n@dataclasses.dataclass(frozen=True, order=True)\nclass Dot:\n"
        "    x: int\n    y: int = $\ndef dot(x): return Dot(x)",
        *("0", "1"),
        "assert dot(1) == Dot(1, 0) and dot(1) != Dot(2, 0)\nassert Dot(1, 1) < Dot(1, 2)\n"
        "assert {Dot(1): 'a'}[dot(1)] == 'a' and dot(1) in [Dot(1)] and len({Dot(2), dot(2)}) == 1\n"
        "assert repr(dot(1)) == 'Dot(x=1, y=0)' and sorted([Dot(2), Dot(1)])[0] == dot(1)",
    ),
    "operators": case(
        "class Vec:\n    def __init__(self, *v): self.v = v\n"
        "    def __add__(self, o): return Vec(*(a + b for a, b in zip(self.v, o.v)))\n"
        "    def __eq__(self, o): return self.v == o.v\n"
        "    def __getitem__(self, i): return self.v[i]\n"
        "    def __abs__(self): return sum(a * a for a in self.v) ** $",
        *("0.5", "2"),
        "assert Vec(1, 2) + Vec(3, 4) == Vec(4, 6)\nassert abs(Vec(3, 4)) == 5\n"
        "assert list(Vec(3, 4)) == [3, 4] and Vec(1, 2)[-1] == 2",
    ),
    "iterable objects": case(
        "class Countdown:\n    def __init__(self, n): self.n = n\n"
        "    def __iter__(self): return iter(range(self.n, $, -1))\n"
        "    def __contains__(self, x): return 0 < x <= self.n",
        *("0", "-1"),
        "assert list(Countdown(3)) == [3, 2, 1]\nassert 2 in Countdown(3) and 5 not in Countdown(3)\n"
        "a, *b = Countdown(2)\nassert (a, b) == (2, [1])",
    ),
    "context managers": case(
        "import contextlib\n@contextlib.contextmanager\ndef logged(log):\n    log.append('in')\n"
        "    yield 5\n    log.append('$')",
        *("out", "in"),
        "log = []\nwith logged(log) as x: log.append(x)\nassert log == ['in', 5, 'out']",
    ),
    "decorators": case(
        "import functools\n@functools.lru_cache\ndef fib(n): return n if n < 2 else fib(n - 1) + fib(n - $)\n"
        "def doubles(f):\n    @functools.wraps(f)\n    def g(*a): return 2 * f(*a)\n    return g",
        *("2", "1"),
        "assert fib(50) == 12586269025\nassert fib.cache_info().hits == 48\n"
        "@doubles\ndef three(): return 3\nassert three() == 6 and three.__name__ == 'three'",
    ),
    "named like a function of Python": case(
        "def sum(xs):\n    total = $\n    for x in xs: total += x\n    return total",
        *("0", "1"),
        "assert sum([1, 2]) == 3",
    ),
    "uses a function of Python under its own name": case(
        "def max(a, b): return a if a > b else $\ndef largest(a, b, c): return max(max(a, b), c)",
        *("b", "a"),
        "assert largest(1, 3, 2) == 3",
    ),
    "helpers of the tests": case(
        "def scale(xs, k): return [x * k for x in $]",
        *("xs", "xs[1:]"),
        "def close(a, b): return all(abs(x - y) < 1e-9 for x, y in zip(a, b, strict=True))\n"
        "assert close(scale([0.1, 0.2], 3), [0.3, 0.6])",
    ),
    "tests in a function": case(
        "def clip(x, lo=0, hi=9): return min(max(x, lo), $)",
        *("hi", "lo"),
        "def check(candidate):\n    for x, want in ((-1, 0), (5, 5), (10, 9)):\n"
        "        assert candidate(x) == want\ncheck(clip)",
    ),
    "a module as a result": case(
        "import math\ndef library(): return $",
        *("math", "None"),
        "assert library().sqrt(4) == 2",
    ),
    "dunder name": case(
        "ran = []\nif __name__ == '__main__':\n    import unittest, sys\n    ran.append(input())\n"
        "    unittest.main()\n    sys.exit(1)\ndef fine(): return ran + [$]",
        *("1", "2"),
        "assert fine() == [1]",
    ),
}
OBJECTS = {
    "attributes and causes of exceptions": case(
        "def fail():\n    try: return {}['k']\n    except KeyError as cause:\n"
        "        error = ValueError('bad')\n        error.code = $\n        raise error from cause",
        *("5", "6"),
        "try: fail()\nexcept ValueError as e:\n"
        "    assert e.code == 5 and str(e) == 'bad' and e.__cause__.args == ('k',)\n"
        "else: assert False",
    ),
    "copies": case(
        "class Box:\n    def __init__(self): self.items = [$]",
        *("1", "2"),
        "import copy\na = Box()\nb, c = copy.copy(a), copy.deepcopy(a)\na.items.append(3)\n"
        "assert b.items == [1, 3] and c.items == [1] and b is not a",
    ),
    "abstract classes": case(
        "import abc\nclass Shape(abc.ABC):\n    @abc.abstractmethod\n    def area(self): ...\n"
        "class Square(Shape):\n    def __init__(self, x): self.x = x\n"
        "    def area(self): return self.x ** $",
        *("2", "3"),
        "assert Square(3).area() == 9 and isinstance(Square(1), Shape)\n"
        "assert issubclass(Square, Shape)\ntry: Shape()\nexcept TypeError: pass\nelse: assert False",
    ),
    "subclass of a list": case(
        "class Pile(list):\n    def push(self, x): self.append(x)\n    def peek(self): return self[$]",
        *("-1", "0"),
        "p = Pile()\np.push(1)\np.push(2)\nassert p == [1, 2] and p.peek() == 2 and len(p) == 2\n"
        "assert p.pop() == 2 and p == [1]\np.append(9)\nassert p.peek() == 9",
    ),
    "properties": case(
        "class Warm:\n    def __init__(self): self._t = 0\n    @property\n"
        "    def t(self): return self._t\n    @t.setter\n    def t(self, v):\n"
        "        if v < $: raise ValueError(v)\n        self._t = v",
        *("0", "-9"),
        "w = Warm()\nw.t = 5\nassert w.t == 5\ntry: w.t = -1\nexcept ValueError: pass\n"
        "else: assert False",
    ),
    "containers": case(
        "class Table:\n    def __init__(self): self.d = {}\n"
        "    def __getitem__(self, k): return self.d[k]\n"
        "    def __setitem__(self, k, v): self.d[k] = v\n    def __delitem__(self, k): del self.d[k]\n"
        "    def __iter__(self): return iter(self.d)\n    def __len__(self): return len(self.d) $",
        *("", "+ 1"),
        "t = Table()\nt['a'] = [1]\nt['a'].append(2)\nassert t['a'] == [1, 2] and 'a' in t\n"
        "assert len(t) == 1 and list(t) == ['a']\ndel t['a']\nassert 'a' not in t",
    ),
    "coroutines": case(
        "async def plus(x): return x + $\nasync def later(x): return await plus(x) * 2",
        *("1", "2"),
        "import asyncio\nassert asyncio.run(later(2)) == 6",
    ),
    "signatures": case(
        "def noted(a, b=$, *c, d: int = 3, **e) -> str:\n    'says'\n    return 'x'",
        *("2", "3"),
        "import inspect\n"
        "assert str(inspect.signature(noted)) == '(a, b=2, *c, d: int = 3, **e) -> str'\n"
        "assert noted.__doc__ == 'says' and noted.__name__ == 'noted'\n"
        "assert inspect.isfunction(noted) and noted.__defaults__ == (2,)",
    ),
    "texts and files": case(
        "import io\ndef text(s): return io.StringIO(s)\ndef length(f): return sum(map(len, f)) $",
        *("", "+ 1"),
        "import io\nassert text('a\\nb').read() == 'a\\nb' and list(text('a\\nb')) == ['a\\n', 'b']\n"
        "assert length(io.StringIO('a\\nbc\\n')) == 5",
    ),
    "unittest": case(
        "def next_of(x): return x + $",
        *("1", "2"),
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test_value(self): self.assertEqual(next_of(1), 2)\n"
        "    def test_error(self):\n        with self.assertRaises(TypeError): next_of('a')\n"
        "tests = unittest.defaultTestLoader.loadTestsFromTestCase(T)\n"
        "import io\nassert unittest.TextTestRunner(io.StringIO()).run(tests).wasSuccessful()",
    ),
    "heaps": case(
        "import heapq\ndef put(h, x): heapq.heappush(h, $)",
        *("x", "-x"),
        "h = []\nfor x in (3, 1, 2): put(h, x)\nassert h[0] == 1 and sorted(h) == [1, 2, 3]",
    ),
    "retries": case(
        "def retry(f, n):\n    for _ in range(n):\n        try: return f()\n"
        "        except $: pass\n    raise RuntimeError('gave up')",
        *("ValueError", "KeyError"),
        "runs = [0]\ndef flaky():\n    runs[0] += 1\n    if runs[0] < 3: raise ValueError\n"
        "    return 'ok'\nassert retry(flaky, 5) == 'ok' and runs == [3]\n"
        "try: retry(lambda: int('x'), 2)\nexcept RuntimeError as e: assert str(e) == 'gave up'",
    ),
}
GROUPS = {
    "results": RESULTS,
    "arguments": ARGUMENTS,
    "exceptions": EXCEPTIONS,
    "names": NAMES,
    "objects": OBJECTS,
}
