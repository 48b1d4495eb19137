"""Programs as models write them: each with a right and a wrong version, and the tests of both.

What plain Python says of them is the right verdict. Names are unique, so that all programs of a
group can run as one.
"""

from typing import NamedTuple


class Case(NamedTuple):
    """Two versions of a program, and tests that tell them apart."""

    right: str
    wrong: str
    tests: str


def case(program: str, right: str, wrong: str, tests: str) -> Case:
    """Return a case whose versions differ in one place, `$` of the program."""
    assert program.count("$") == 1
    return Case(program.replace("$", right), program.replace("$", wrong), tests)


RESULTS = {
    "match": case(
        "import re\ndef begins(s): return re.match($, s)",
        *("'ab+'", "'x'"),
        "assert begins('abbc')\nassert not begins('cab')\nassert begins('abbc').group() == 'abb'\n"
        "assert begins('abbc').span() == (0, 3) and begins('abbc')[0] == 'abb'",
    ),
    "match or none": case(
        "import re\ndef year(s): return re.search(r'(?P<y>\\d{$})', s)",
        *("4", "3"),
        "assert year('in 1999').groupdict() == {'y': '1999'}\nassert year('no') is None\n"
        "import re\nassert isinstance(year('1999'), re.Match)",
    ),
    "pattern": case(
        "import re\ndef pattern(): return re.compile('a$')",
        *("+", "?"),
        "assert pattern().fullmatch('aaa') is not None\nassert pattern().pattern == 'a+'",
    ),
    "generator": case(
        "def upto(n):\n    for i in range($): yield i",
        *("n", "n - 1"),
        "assert list(upto(3)) == [0, 1, 2]\nassert sum(upto(4)) == 6\nassert next(upto(9)) == 0\n"
        "import types\nassert isinstance(upto(1), types.GeneratorType)",
    ),
    "endless generator": case(
        "def naturals():\n    i = 0\n    while True:\n        yield i\n        i += $",
        *("1", "2"),
        "import itertools\nassert list(itertools.islice(naturals(), 4)) == [0, 1, 2, 3]",
    ),
    "generator that receives": case(
        "def adder():\n    total = 0\n    while True: total $ yield total",
        *("+=", "="),
        "g = adder()\nnext(g)\nassert g.send(5) == 5 and g.send(6) == 11\ng.close()",
    ),
    "exhausted generator": case(
        "def pair():\n    yield 1\n    $",
        *("yield 2", "return"),
        "g = pair()\nassert next(g) == 1 and next(g) == 2 and next(g, None) is None",
    ),
    "range": case(
        "def evens(n): return range(0, n, $)",
        *("2", "1"),
        "assert evens(6) == range(0, 6, 2)\nassert len(evens(6)) == 3 and 4 in evens(6)\n"
        "assert evens(9)[-1] == 8",
    ),
    "map and filter": case(
        "def squares(xs): return map(lambda x: x ** 2, filter($, xs))",
        *("None", "lambda x: x != 3"),
        "assert list(squares([0, 2, 3])) == [4, 9]\nassert tuple(squares([3])) == (9,)",
    ),
    "zip": case(
        "def pairs(a, b): return zip(a, $)",
        *("b", "a"),
        "assert dict(pairs('xy', [1, 2])) == {'x': 1, 'y': 2}",
    ),
    "keys": case(
        "def names_of(d): return d.$()",
        *("keys", "values"),
        "assert names_of({'a': 1}) == {'a'}\nassert set(names_of({'a': 1, 'b': 2})) == {'a', 'b'}",
    ),
    "values and items": case(
        "def parts(d): return d.values(), d.$()",
        *("items", "keys"),
        "v, i = parts({'a': [1]})\nassert list(v) == [[1]]\nassert list(i) == [('a', [1])]",
    ),
    "ordered views": case(
        "import collections\ndef keys_in_order(s): return collections.OrderedDict.fromkeys(s).$()",
        *("keys", "items"),
        "assert list(keys_in_order('abca')) == ['a', 'b', 'c']",
    ),
    "fraction": case(
        "from fractions import Fraction\ndef half(n): return Fraction(n, $)",
        *("2", "3"),
        "assert half(1) == 0.5\nassert half(3).numerator == 3\nassert str(half(1)) == '1/2'\n"
        "from fractions import Fraction\nassert half(1) + 1 == Fraction(3, 2)",
    ),
    "decimal": case(
        "from decimal import Decimal\ndef cents(s): return Decimal(s).quantize(Decimal('$'))",
        *("0.01", "0.1"),
        "from decimal import Decimal\nassert cents('1.005') == Decimal('1.00')\n"
        "assert str(cents('2')) == '2.00'",
    ),
    "date": case(
        "import datetime\n"
        "def next_day(y, m, d): return datetime.date(y, m, d) + datetime.timedelta(days=$)",
        *("1", "2"),
        "import datetime\nassert next_day(2024, 2, 28) == datetime.date(2024, 2, 29)\n"
        "assert next_day(1999, 12, 31).isoformat() == '2000-01-01'",
    ),
    "moment with a zone": case(
        "from datetime import datetime, timezone, timedelta\n"
        "def moment(h): return datetime(2020, 1, 1, tzinfo=timezone(timedelta(hours=$)))",
        *("h", "-h"),
        "from datetime import datetime, timezone\n"
        "assert moment(1) == datetime(2019, 12, 31, 23, tzinfo=timezone.utc)\n"
        "assert moment(2).utcoffset().total_seconds() == 7200",
    ),
    "duration": case(
        "from datetime import timedelta\ndef span(a): return timedelta(minutes=$)",
        *("a", "a + 1"),
        "assert span(90).total_seconds() == 5400\nassert str(span(90)) == '1:30:00'",
    ),
    "named tuple": case(
        "from collections import namedtuple\nSpot = namedtuple('Spot', 'x y')\n"
        "def spot(): return Spot(1, $)",
        *("2", "3"),
        "assert spot() == (1, 2)\nassert spot().y == 2\nassert spot()._replace(x=5) == (5, 2)\n"
        "assert spot()._asdict() == {'x': 1, 'y': 2}\nassert repr(spot()) == 'Spot(x=1, y=2)'\n"
        "assert isinstance(spot(), tuple) and spot() == Spot(1, 2)",
    ),
    "typed named tuple": case(
        "import typing\nclass Ticket(typing.NamedTuple):\n    name: str\n    price: int = $\n"
        "def ticket(n): return Ticket(n)",
        *("3", "4"),
        "assert ticket('a') == ('a', 3) and ticket('a').price == 3",
    ),
    "counter": case(
        "from collections import Counter\ndef letters(s): return Counter(s$)",
        *("", ".upper()"),
        "assert letters('aab').most_common(1) == [('a', 2)]\nassert letters('aab') == {'a': 2, 'b': 1}\n"
        "assert letters('ab')['z'] == 0\nassert sorted(letters('aab').elements()) == ['a', 'a', 'b']\n"
        "from collections import Counter\nassert letters('a') + letters('b') == Counter('ab')",
    ),
    "default dict": case(
        "from collections import defaultdict\ndef groups(xs):\n    d = defaultdict($)\n"
        "    for x in xs: d[x % 2].append(x)\n    return d",
        *("list", "lambda: [0]"),
        "assert groups([1, 2, 3]) == {1: [1, 3], 0: [2]}\nassert groups([])[5] == []",
    ),
    "deque": case(
        "from collections import deque\ndef last(xs, n): return deque(xs, $)",
        *("n", "n + 1"),
        "assert list(last([1, 2, 3], 2)) == [2, 3]\nd = last([1, 2], 2)\nd.append(3)\n"
        "assert d.popleft() == 2 and d.maxlen == 2",
    ),
    "ordered dict": case(
        "from collections import OrderedDict\ndef ordered(a, b): return OrderedDict($)",
        *("[(a, 1), (b, 2)]", "[(b, 2), (a, 1)]"),
        "from collections import OrderedDict\n"
        "assert ordered('x', 'y') == OrderedDict([('x', 1), ('y', 2)])",
    ),
    "chained maps": case(
        "from collections import ChainMap\ndef layers(a, b): return ChainMap($)",
        *("a, b", "b, a"),
        "assert layers({'k': 1}, {'k': 2, 'l': 3}) == {'k': 1, 'l': 3}\n"
        "assert layers({'k': 1}, {'k': 2})['k'] == 1",
    ),
    "sets": case(
        "def common(a, b): return frozenset(a) $ set(b)",
        *("&", "|"),
        "assert common([1, 2], [2, 3]) == {2}\nassert type(common([], [])) is frozenset",
    ),
    "bytes": case(
        "def packed(s): return bytearray(s, 'ascii'), s.encode('$')",
        *("utf-16-le", "utf-16-be"),
        "a, b = packed('a')\nassert a == b'a' and b == b'a\\x00'\na.append(1)\nassert a == b'a\\x01'",
    ),
    "complex": case(
        "def root(x): return complex(x) ** 0.5 * $",
        *("1", "2"),
        "assert abs(root(-4) - 2j) < 1e-9",
    ),
    "types": case(
        "def kind(x): return type($)",
        *("x", "[x]"),
        "assert kind(3) is int and kind('') == str\nassert kind(2.0)('1.5') == 1.5",
    ),
    "array": case(
        "from array import array\ndef numbers(xs): return array('$', xs)",
        *("i", "d"),
        "from array import array\nassert numbers([1, 2]).tolist() == [1, 2]\n"
        "assert numbers([1]).typecode == 'i' and numbers([1]) == array('i', [1])",
    ),
    "enumeration": case(
        "import enum\nclass Tone(enum.Enum):\n    LOW = 1\n    HIGH = 2\n"
        "def tone(n): return Tone.$ if n < 5 else Tone.HIGH",
        *("LOW", "HIGH"),
        "assert tone(1) is Tone.LOW and tone(1) == Tone.LOW != Tone.HIGH\nassert tone(1).name == 'LOW'\n"
        "assert Tone(2) is Tone.HIGH and Tone['LOW'].value == 1\n"
        "assert [t.name for t in Tone] == ['LOW', 'HIGH'] and len(Tone) == 2 and tone(1) in Tone",
    ),
    "numbered enumeration": case(
        "import enum\nclass Level(enum.IntEnum):\n    LOW = 1\n    HIGH = $\n"
        "def level(n): return Level(n)",
        *("2", "3"),
        "assert level(1) == 1\nassert level(2) is Level.HIGH\nassert level(2) > 1 and level(1).name == 'LOW'",
    ),
    "huge integers": case(
        "import math\ndef product(n): return math.factorial(n) $",
        *("", "+ 1"),
        "import math\nassert product(3000) == math.factorial(3000)\nassert len(str(product(3000))) == 9131\n"
        "assert [product(2000)][0] % 10 == 0",
    ),
    "digits of huge integers": case(
        "def digits(n): return len(str(10 ** n))$",
        *("", "- 1"),
        "assert digits(5000) == 5001",
    ),
    "functions": case(
        "def adds(n): return lambda x: x $ n",
        *("+", "-"),
        "assert adds(2)(3) == 5\nassert list(map(adds(1), [1, 2])) == [2, 3]\nassert callable(adds(1))",
    ),
    "namespace": case(
        "from types import SimpleNamespace\ndef person(n): return SimpleNamespace(name=$)",
        *("n", "n * 2"),
        "from types import SimpleNamespace\nassert person('a') == SimpleNamespace(name='a')\n"
        "assert person('a').name == 'a'",
    ),
    "addresses": case(
        "import ipaddress, uuid, pathlib\ndef parsed(a):\n"
        "    return ipaddress.ip_address(a), uuid.UUID(int=$), pathlib.PurePosixPath('/a/b').parent",
        *("7", "8"),
        "import ipaddress, uuid, pathlib\n"
        "assert parsed('10.0.0.1') == (ipaddress.ip_address('10.0.0.1'), uuid.UUID(int=7),"
        " pathlib.PurePosixPath('/a'))",
    ),
    "nothing and special values": case(
        "def special(): return None, ..., NotImplemented, True, -0.0, float('$')",
        *("nan", "inf"),
        "a = special()\nassert a[:4] == (None, ..., NotImplemented, True)\nassert str(a[4]) == '-0.0'\n"
        "assert a[5] != a[5]",
    ),
    "result that contains itself": case(
        "def ring():\n    a = [1]\n    a.append($)\n    return a",
        *("a", "[1]"),
        "r = ring()\nassert r[1] is r and r[1][1][0] == 1",
    ),
    "deep result": case(
        "def nested(n):\n    a = []\n    for _ in range(n): a = [a]\n    return $",
        *("a", "[a]"),
        "a = nested(5000)\nn = 0\nwhile a: a, n = a[0], n + 1\nassert n == 5000",
    ),
    "subclass of a dict": case(
        "class Default(dict):\n    def __missing__(self, key): return key * $\n"
        "def defaults(): return Default(a=1)",
        *("2", "3"),
        "d = defaults()\nassert d == {'a': 1} and d['b'] == 'bb' and len(d) == 1\nd['c'] = 4\n"
        "assert d['c'] == 4 and sorted(d) == ['a', 'c']",
    ),
    "subclass of a string": case(
        "class Loud(str):\n    def shout(self): return self.upper() + '$'\ndef loud(s): return Loud(s)",
        *("!", "?"),
        "assert loud('a') == 'a' and loud('a').shout() == 'A!'\nassert loud('a') + 'b' == 'ab'",
    ),
}
