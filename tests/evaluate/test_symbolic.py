"""Answers of MATH, by writing and by value: pairs with both verdicts."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_ordermerge.commands.evaluate import format_summary
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import matching, symbolic
from jax_ordermerge.evaluate.eval_model import EvalModel
from jax_ordermerge.evaluate.prompts import Prompt
from jax_ordermerge.evaluate.tasks import answers

# answer, reference, whether they are written alike, whether they have one value
PAIRS = [
    (r"\frac{1}{2}", r"\dfrac12", True, True),
    (r"1/2", r"\frac{1}{2}", True, True),
    (r"0.25", r"\frac{1}{4}", False, True),
    (r"0.5", r"\frac{1}{2}", True, True),
    (r".5", r"0.5", True, True),
    (r"x^{2}", r"x^2", False, True),
    (r"x^2+1", r"x^2 + 1", True, True),
    (r"2x+1", r"1+2x", False, True),
    (r"(x+1)^2", r"x^2+2x+1", False, True),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", False, True),
    (r"\sqrt2", r"\sqrt{2}", True, True),
    (r"2\sqrt{2}", r"\sqrt{8}", False, True),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        True,
        True,
    ),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}",
        False,
        False,
    ),
    (r"\begin{pmatrix} -1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}-1\\2\end{pmatrix}", True, True),
    (
        r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        False,
        True,
    ),
    (
        r"\begin{pmatrix} \frac12 \\ 2 \end{pmatrix}",
        r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}",
        False,
        True,
    ),
    (r"5\text{ cm}^2", r"5", True, True),
    (r"5\text{ cm}^{2}", r"5\text{ cm}^2", True, True),
    (r"5\text{ cm}^2", r"5\text{ m}^2", True, True),
    (r"10\text{ inches}", r"10", True, True),
    (r"5 \mbox{ cm}^3", r"5", True, True),
    (r"5\text{ square units}", r"6", False, False),
    (r"\left\{1, 2\right\}", r"\{1,2\}", True, True),
    (r"\{1,2\}", r"\{2,1\}", False, True),
    (r"\{1,2\}", r"\{1,3\}", False, False),
    (r"(1,2)", r"(2,1)", False, False),
    (r"(1,2)", r"(1, 2)", True, True),
    (r"[0,1)", r"[0, 1)", True, True),
    (r"[0,1)", r"[0,1]", False, False),
    (r"(-\infty, 2)", r"(-\infty,2)", True, True),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)", True, True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True, True),
    (r"(3, \pi/2)", r"\left(3,\frac{\pi}{2}\right)", False, True),
    (r"32,500", r"32500", True, True),
    (r"\$32,500", r"32500", True, True),
    (r"90^\circ", r"90", True, True),
    (r"50\%", r"50", True, True),
    (r"x = 7", r"7", True, True),
    (r"y=2x+1", r"y=1+2x", False, True),
    (r"7", r"-7", False, False),
    (r"-\frac{3}{4}", r"\frac{-3}{4}", False, True),
    (r"-\frac{3}{4}", r"-3/4", True, True),
    (r"\frac{2}{1}", r"\frac{1}{2}", False, False),
    (r"1\frac12", r"\frac{3}{2}", False, True),
    (r"3\frac{1}{2}", r"3.5", False, True),
    (r"\frac{9}{4}", r"2.25", False, True),
    (r"\frac{1}{3}", r"0.333", False, False),
    (r"\frac{1}{3}", r"0.3333333", False, False),
    (r"\pi", r"3.14159", False, False),
    (r"2^{10}", r"1024", False, True),
    (r"10^{-3}", r"0.001", False, True),
    (r"\binom{5}{2}", r"10", False, True),
    (r"5!", r"120", False, True),
    (r"\log_2 8", r"3", False, True),
    (r"e^{i\pi}", r"-1", False, True),
    (r"\frac{\pi}{4}", r"\arctan 1", False, True),
    (r"6+9i", r"9i+6", False, True),
    (r"(2+i)(2-i)", r"5", False, True),
    (r"a+b", r"b+a", False, True),
    (r"ab", r"ba", False, True),
    (r"x-y", r"y-x", False, False),
    (r"\text{Evelyn}", r"\text{Evelyn}", True, True),
    (r"\text{Evelyn}", r"Evelyn", False, True),
    (r"\text{even}", r"\text{odd}", False, False),
    (r"\text{(A)}", r"\text{(B)}", False, False),
    (r"\text{(A)}", r"A", False, True),
    (r"1,2,3", r"1, 2, 3", True, True),
    (r"1,-2", r"-2,1", False, True),
    (r"1", r"1,-2", False, False),
    (r"1,2", r"12", False, False),
    (r"x>2", r"x > 2", True, True),
    (r"x \ge 2", r"x \geq 2", False, True),
    (r"x \le 2", r"x \ge 2", False, False),
    (r"11,111,111,100", r"11111111100", True, True),
    (r"0", r"0.0000001", False, False),
    (r"1000001", r"1000000", False, False),
    (r"12_8", r"12_8", True, True),
    (r"12_8", r"12_9", False, False),
    (r"\tfrac{7}{8}", r"\frac78", True, True),
    (r"5.", r"5", True, True),
    (r"\sqrt[3]{8}", r"2", False, True),
    (r"\frac{x^2-1}{x-1}", r"x+1", False, True),
    (r"\sin^2 x + \cos^2 x", r"1", False, True),
    (r"\infty", r"-\infty", False, False),
    (r"5\text{ m}^2, 3", r"5", False, False),
    (r"\left\{ 1 \right.", r"\left\{1\right.", True, True),
    (r"[2,5\}", r"[2, 5\}", True, True),
    (r"\begin{pmatrix} 1\\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\2\end{pmatrix}", True, True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", False, False),
    (r"2 \text{ and } 3", r"2", False, False),
    (r"\text{Monday}", r"\text{Tuesday}", False, False),
    (r"1\,000", r"1000", True, True),
    (r"1{,}000", r"1000", False, True),
    (r"12_8", r"12", False, False),
    (r"0.3\ldots", r"0.3", False, False),
    (r"\pm 2", r"2", False, False),
    (r"\pm 2", r"-2, 2", False, True),
    (r"3:4", r"\frac{3}{4}", False, True),
    (r"x^2=4", r"x=2", False, False),
    (r"\sqrt{-1}", r"i", False, True),
    (r"5\text{cm}", r"5", False, True),
    (r"0.\overline{3}", r"\frac13", False, True),
    (r"0.1\bar{6}", r"\frac16", False, True),
    (r"0.\dot3", r"\frac{1}{3}", False, True),
    (r".\overline{142857}", r"\frac17", False, True),
    (r"-2.\overline{45}", r"-\frac{27}{11}", False, True),
    (r"33.\overline{3}\%", r"\frac{100}{3}\%", False, True),
    (r"33\frac13\%", r"33.\overline{3}", False, True),
    (r"\frac{100}{3}\%", r"\frac{100}{7}\%", False, False),
    (r"0.\overline{3}", r"0.3", False, False),
    (r"0.\overline{3}", r"0.\overline{6}", False, False),
    (r"0.\overline{12}", r"0.\overline{1}", False, False),
    (r"\overline{AB}", r"AC", False, False),
    (r"\tan 45^\circ", r"1", False, True),
    (r"\sin(30^{\circ})", r"\frac12", False, True),
    (r"\cos\left(120^\circ\right)", r"-0.5", False, True),
    (r"2\sin^2 45°", r"1", False, True),
    (r"\tan 45^\circ", r"45", False, False),
    (r"\tan 45", r"1", False, False),
    (r"\tan 4.5^\circ", r"1", False, False),
    (r"\$5.00", r"5", False, True),
    (r"-\$5", r"-5.0", False, True),
    (r"\$1,250.50", r"1250.5", False, True),
    (r"\$5.00", r"\$5.10", False, False),
    (r"\text{6 hours}", r"6", False, True),
    (r"\mbox{2.5 m}", r"\frac52", False, True),
    (r"\text{2,500 people}", r"2500", False, True),
    (r"\text{6 hours}", r"6\text{ hours}", False, True),
    (r"\text{6 hours}", r"7", False, False),
    (r"\text{6 hours}", r"\text{6 minutes}", False, False),
    (r"\text{2 or 3}", r"2", False, False),
    (r"\text{2 and up}", r"2", False, False),
    (r"\text{-6 degrees}", r"-6", False, True),
    (r"\emptyset", r"\varnothing", False, True),
    (r"\varnothing", r"\{\}", False, True),
    (r"∅", r"\varnothing", False, True),
    (r"\varnothing", r"0", False, False),
    (r"\varnothing", r"\{0\}", False, False),
    (r"\emptyset", r"\{\emptyset\}", False, False),
    (r"100\%", r"1", False, True),
    (r"5\%", r"0.05", False, True),
    (r"100\%", r"100", True, True),
    (r"100\%", r"10", False, False),
    (r"2√3", r"\sqrt{12}", False, True),
    (r"√2", r"2", False, False),
]
needs_library = pytest.mark.skipif(
    not symbolic.is_available(), reason="needs math-verify: pip install 'jax_ordermerge[math]'"
)


def box(text: str) -> str:
    return f"So $\\boxed{{0}}$? No, it is $\\boxed{{{text}}}$."


def test_there_are_sixty_pairs():
    assert len(set(PAIRS)) == len(PAIRS) >= 60


@pytest.mark.parametrize(("answer", "reference", "alike", "_"), PAIRS)
def test_by_writing(answer, reference, alike, _):
    assert matching.math(box(answer), box(reference)) is alike


@needs_library
@pytest.mark.parametrize(("answer", "reference", "_", "same"), PAIRS)
def test_by_value(answer, reference, _, same):
    assert symbolic.equal(box(answer), box(reference)) is same


@pytest.mark.parametrize("text", sorted({text for pair in PAIRS for text in pair[:2]}))
def test_every_answer_agrees_with_itself(text):
    assert matching.math(box(text), box(text))
    assert symbolic.equal(box(text), box(text)) is True


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"$\boxed{\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"$\boxed{\frac{1}{2$.", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{2}", r"\frac{1}{2}"),
        ("\\boxed{12\nSo it is.", "12"),
        (r"\boxed{12", None),  # perhaps 123
        (r"\boxed{", None),
        (r"\boxed{5}", "5"),
        (r"\boxed{5}}", "5"),
        ("5", None),
    ],
)
def test_a_box_that_is_not_closed(text, content):
    assert matching.open_boxed(text) == content


def test_an_answer_too_long_to_be_parsed_is_wrong():
    assert symbolic.equal(box(r"0.\overline{" + "3" * 20_000 + "}"), box(r"\frac13")) is False


@needs_library
def test_a_box_that_is_not_closed_counts_by_value_alone():
    answer, reference = r"It is $\boxed{\frac{1}{2}$.", r"$\boxed{0.5}$"
    assert not matching.math(answer, reference)
    assert symbolic.equal(answer, reference) is True


@needs_library
@pytest.mark.parametrize("text", [r"9^{9^{9^9}}", r"(10^{9})!"])
def test_huge_powers_are_undecided_in_time(text, monkeypatch):
    monkeypatch.setattr(symbolic, "TIMEOUT", 1.0)
    symbolic.equal(r"\boxed{0.5}", r"\boxed{\frac12+0}")  # the process runs
    start = time.perf_counter()
    assert symbolic.equal(box(text), box("7")) is None
    assert time.perf_counter() - start < 10
    # The next pair gets a new process.
    monkeypatch.setattr(symbolic, "TIMEOUT", 60.0)
    assert symbolic.equal(r"\boxed{0.25}", r"\boxed{\frac14}") is True


def ask(*texts):
    model = EvalModel(None, lambda prompts, n: list(texts), None, 8)
    prompts = [Prompt(i, "q", [1], r"\boxed{\frac14}") for i in range(len(texts))]
    return answers.answer(answers.AnswerTask(name="t", kind="math"), prompts, model)


@needs_library
def test_a_task_tells_both_comparisons(monkeypatch):
    monkeypatch.setattr(symbolic, "TIMEOUT", 2.0)
    # The first pair starts the process, whose start does not count.
    result = ask(r"\boxed{0.25}", r"\boxed{1/4}", r"\boxed{4}", "no box", r"\boxed{9^{9^{9^9}}}")
    summary = result.summary
    assert [summary["accuracy"], summary["symbolic"], summary["symbolic_undecided"]] == [
        0.2,
        0.4,
        1,
    ]
    verdicts = [item["correct_symbolic"] for item in result.items]
    assert verdicts == [True, True, False, False, None]
    assert "symbolic 40.0 %" in format_summary(summary)
    assert "symbolic_undecided 1" in format_summary(summary)


def test_without_the_library_the_summary_says_so(monkeypatch):
    monkeypatch.setitem(answers.EXTRA_MATCHES, "math", {})
    monkeypatch.setattr(answers, "NOTES", {"math": symbolic.MISSING})
    summary = ask(r"\boxed{0.25}", r"\boxed{1/4}").summary
    assert summary["accuracy"] == 0.5
    assert "symbolic" not in summary
    assert "pip install 'jax_ordermerge[math]'" in format_summary(summary)


@pytest.mark.parametrize("script", ["raise ImportError('no antlr')", "import os; os._exit(3)"])
def test_a_library_that_does_not_start_is_an_error(script, monkeypatch, tmp_path):
    broken = tmp_path / "symbolic_worker.py"
    broken.write_text(script)
    worker = symbolic._Worker()
    monkeypatch.setattr(symbolic, "__file__", str(tmp_path / "symbolic.py"))
    with pytest.raises(UserError, match="math-verify is installed and does not start"):
        worker.ask(["1", "2"])


@needs_library
def test_what_the_library_prints_is_no_verdict():
    script = Path(symbolic.__file__).with_name("symbolic_worker.py")
    pairs = [["2+2", "4"], ["((((", "1"], ["x", "y"]]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    result = subprocess.run(
        [sys.executable, script], input=lines, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["ready", "true", "false", "false"]
