"""Right and wrong programs: the verdicts are those of plain Python.

Those that attack the machine or the verdict are in `test_hostile.py`.
"""

import builtins
import concurrent.futures
import gzip
import json
import os
import sys

import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import sandbox
from jax_ordermerge.evaluate.tasks import programs
from tests.evaluate.answers_calls import GROUPS

TESTS = "for i in range(3): assert f(i) == i + 1"
RIGHT = "def f(x): return x + 1"
needs_namespaces = pytest.mark.skipif(
    "namespaces" not in sandbox.available(), reason="this kernel or user may not make namespaces"
)


@pytest.mark.parametrize("isolation", sandbox.available())
def test_right_and_wrong(isolation):
    verdict = sandbox.judge(RIGHT, TESTS, ["f"], isolation=isolation)
    assert verdict == sandbox.Verdict(True, "passed", isolation)
    for program, message in (
        ("def f(x): return x", "AssertionError"),
        ("def f(x): return x +", "SyntaxError"),
        ("def g(x): return x + 1", "NameError: name 'f' is not defined"),
        ("def f(x): raise ValueError('no')", "ValueError: no"),
        ("", "NameError: name 'f' is not defined"),
    ):
        wrong = sandbox.judge(program, TESTS, ["f"], isolation=isolation)
        assert not wrong.passed
        assert message in wrong.detail


def plain(program, tests):
    """Return whether tests pass after a program in one namespace, as in published evaluations."""
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        exec(compile(f"{program}\n{tests}", "<plain>", "exec"), {})
    except BaseException:
        return False
    finally:
        sys.set_int_max_str_digits(digits)
    return True


def judge_cases(cases, version):
    """Return the details of verdicts that are not right, by case. Programs run in parallel."""

    def judge(name):
        program = getattr(cases[name], version)
        names = sandbox.free_names(cases[name].tests) - set(dir(builtins)) | {"sum", "max"}
        return sandbox.judge(
            program, cases[name].tests, sorted(names), reference=cases[name].right, timeout=60.0
        )

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = dict(zip(cases, pool.map(judge, cases), strict=True))
    return {
        name: verdict.detail
        for name, verdict in verdicts.items()
        if verdict.passed != (version == "right")
    }


@pytest.mark.parametrize("group", GROUPS)
def test_plain_python_tells_right_from_wrong(group):
    for name, case in GROUPS[group].items():
        assert plain(case.right, case.tests), name
        assert not plain(case.wrong, case.tests), name


@pytest.mark.parametrize("group", GROUPS)
def test_right_answers_pass(group):
    assert judge_cases(GROUPS[group], "right") == {}


@pytest.mark.parametrize("group", GROUPS)
def test_some_wrong_answers_fail(group):
    assert judge_cases(dict(list(GROUPS[group].items())[::5]), "wrong") == {}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_wrong_answers_fail(group):
    assert judge_cases(GROUPS[group], "wrong") == {}


def test_there_are_enough_answers():
    assert sum(map(len, GROUPS.values())) >= 60


def test_values_keep_type_and_value():
    program = "def f(*a, **k): return a, k\ndef kind(x): return type(x).__name__"
    tests = """
values = [1, True, None, -0.0, float("inf"), 2 + 3j, "ä\\n", b"\\x00\\xff", 10**40, "\\ud800"]
values += [[1, (2, [3])], {1: {2.5: (3,)}}, {4, 5}, frozenset("ab"), range(3), -(2**64), 2**64]
for value in values:
    (back,), kwargs = f(value, key=value)
    assert back == value == kwargs["key"] and type(back) is type(value)
    assert kind(value) == type(value).__name__
assert repr(f(-0.0)[0][0]) == "-0.0" and f(float("nan"))[0][0] != f(float("nan"))[0][0]
"""
    assert sandbox.judge(program, tests, ["f", "kind"]).detail == "passed"


def test_numpy_where_it_is_installed():
    program = """
import numpy as np
def f(a):
    a[0] = 5
    a *= 2
    return a.mean(), np.int64(3), np.arange(6, dtype=np.float32).reshape(2, 3), a > 5
def g(x): return np.array(["a", "bc"]), np.array([x, None], dtype=object), np.float32
"""
    tests = """
import numpy as np
x = np.ones(2)
mean, three, table, mask = f(x)
assert x.tolist() == [10.0, 2.0] and mean == 6.0 and isinstance(mean, np.float64)
assert three == 3 and isinstance(three, np.int64) and mask.tolist() == [True, False]
assert table.shape == (2, 3) and table.dtype == np.float32 and np.allclose(table[1], [3, 4, 5])
texts, objects, kind = g([1])
assert texts.tolist() == ["a", "bc"] and objects.tolist() == [[1], None] and kind is np.float32
assert np.linalg.norm(x) > 10
"""
    assert sandbox.judge(program, tests, ["f", "g"], timeout=60.0).detail == "passed"
    wrong = sandbox.judge(
        "import numpy\ndef f(x): return numpy.ones(x)", "assert (f(2) == 0).all()", ["f"]
    )
    assert wrong.detail.startswith("failed: AssertionError")


def test_no_other_package_is_seen():
    verdict = sandbox.judge("import jax\ndef f(x): return x + 1", TESTS, ["f"])
    assert verdict.detail == "failed: ModuleNotFoundError: No module named 'jax'"


@pytest.mark.parametrize(
    ("program", "tests", "passes"),
    [
        # a name of Python is the program's where it is tested, and Python's where it is not
        ("def sum(l): return 'wrong'", "assert sum([1, 2]) == 3", False),
        ("def sum(l): return l[0] + l[1]", "assert sum([1, 2]) == 3", True),
        ("def total(l): return sum(l)", "assert sum([1, 2]) == 3", True),
        ("def sum(l): return l[0] + l[1]", "assert sum([1, 2]) == len([0, 0, 0])", True),
        ("def len(l): return 3\ndef sum(l): return 3", "assert sum([1, 1]) == len([1, 1])", False),
    ],
)
def test_functions_named_like_those_of_python(program, tests, passes):
    assert sandbox.judge(program, tests, ["sum"]).passed == passes


def test_the_setup_sees_classes_of_the_program():
    program = "class Node:\n    def __init__(self, v): self.v, self.next = v, None\n"
    program += "def length(n): return 1 + length(n.next) if n else 0"
    setup = "root = Node(1)\nroot.next = Node(2)"
    assert sandbox.judge(program, "assert length(root) == 2", ["length"], setup=setup).passed
    # of a setup that has the function itself, as HumanEval's prompts do, the program's is tested
    stub = "def helper(x): return x\ndef f(x): return helper(x) + 1"
    assert not sandbox.judge("def f(x): return 0", "assert f(1) == 2", ["f"], setup=stub).passed
    assert sandbox.judge(RIGHT, "assert f(helper(1)) == 2", ["f"], setup=stub).passed
    assert not sandbox.judge("", "assert f(1) == 2", ["f"], setup=stub).passed


def test_objects_with_arithmetic_of_their_own():
    program = (
        "class V:\n    def __init__(s, x): s.x = x\n    def __mul__(s, k): return V(s.x * k)\n"
    )
    program += "    __rmul__ = __mul__\n    def __eq__(s, o): return s.x == o.x"
    tests = "assert V(2) * 3 == V(6) == 3 * V(2)"
    assert sandbox.judge(program, tests, ["V"], reference=program).passed
    # without a right program nothing says that V is a class and not a function with a forged answer
    assert not sandbox.judge(program, tests, ["V"]).passed


@needs_namespaces
def test_a_program_sees_neither_files_nor_processes():
    program = """
import os, socket
def f():
    processes = [name for name in os.listdir("/proc") if name.isdigit()]
    return sorted(os.listdir("/")), os.listdir("/tmp"), processes, dict(os.environ)
def interfaces(): return [name for _, name in socket.if_nameindex()]
def user(): return os.getuid(), open("/proc/self/status").read()
"""
    tests = """
root, tmp, processes, environment = f()
assert tmp == [] and len(processes) <= 3, (tmp, processes)
assert set(environment) <= {"PYTHONHASHSEED", "LC_CTYPE"}, environment
assert not {"home", "work", "etc", "var", "mnt", "sys"} & set(root), root
assert interfaces() == ["lo"]
assert "CapEff:\\t0000000000000000" in user()[1] and "NoNewPrivs:\\t1" in user()[1]
"""
    assert sandbox.judge(program, tests, ["f", "interfaces", "user"]).detail == "passed"


def test_the_weaker_isolation_is_named_and_ends_loops():
    verdict = sandbox.judge("while True: pass", TESTS, ["f"], timeout=2.0, isolation="rlimits-only")
    assert verdict == sandbox.Verdict(False, "timeout", "rlimits-only")
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
