"""Comparisons of answers with references, on strings met in practice."""

import json
import statistics

import numpy as np
import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import matching, metrics


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("12", "12", True),
        ("\t12 \n", "12", True),
        ("12 .", "12", False),
        ("a  b", "a b", False),
        ("", "", True),
        ("A", "a", False),
    ],
)
def test_exact(answer, reference, right):
    assert matching.exact(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("x\n#### 18", "y\n#### 18", True),
        ("#### 1,234,567", "#### 1234567", True),
        ("#### -3", "#### -3", True),
        ("#### 3", "#### -3", False),
        ("#### 4\nno, wait\n#### 5", "#### 5", False),
        ("#### 5\nno, wait\n#### 4", "#### 5", True),
        ("#### 5.", "#### 5", True),
        ("####5", "#### 5", False),
        ("#### five", "#### 5", False),
        ("#### $5", "#### 5", False),
        ("5", "#### 5", False),
        ("", "#### 5", False),
        ("#### 0.5", "#### 0.5", True),
    ],
)
def test_gsm8k(answer, reference, right):
    assert matching.gsm8k(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("2 + 3 = 5. The answer is 1,005.", True),
        ("The answer is 1005.\nThe answer is 6.", True),
        ("The answer is 6. The answer is 1005.", False),
        ("The answer is $1005.", False),
        ("The answer is 1005", False),
        ("#### 1005", False),
    ],
)
def test_gsm8k_cot(answer, right):
    assert matching.gsm8k_cot(answer, "it is\n#### 1,005") is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("#### 1,005", True),
        ("so $1005", True),
        ("1005.", True),
        ("1005 and then 3", False),
        ("-1005", False),
        ("none", False),
        ("", False),
    ],
)
def test_gsm8k_flexible(answer, right):
    assert matching.gsm8k_flexible(answer, "it is\n#### 1,005") is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("8 - 3 = 5 apples", "5.0", True),
        ("he has -2.5.", "-2.5", True),
        ("10,000", "10000", True),
        ("5 of 7", "5", False),
        ("five", "5", False),
        (".5", "0.5 (pounds)", True),
    ],
)
def test_number(answer, reference, right):
    assert matching.number(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (r"\frac{1}{2}", r"\dfrac12", True),
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac12", True),
        (".5", "0.5", True),
        (r"-\frac{3}{4}", "-3/4", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"10\text{ inches}", "10", True),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        (r"90^\circ", "90", True),
        (r"\$32,500", "32500", True),
        ("x = 7", "7", True),
        (r"\sqrt2", r"\sqrt{2}", True),
        (r"50\%", "50", True),
        ("(1,2)", "(2,1)", False),
        ("7", "-7", False),
        ("x^2+1", "x^2 + 1", True),
        (r"\frac{2}{1}", r"\frac{1}{2}", False),
    ],
)
def test_math(answer, reference, right):
    assert (
        matching.math(f"so \\boxed{{0}}, no, \\boxed{{{answer}}}", f"\\boxed{{{reference}}}")
        is right
    )


def test_a_math_answer_that_is_not_boxed_is_wrong():
    assert not matching.math("7", r"\boxed{7}")
    with pytest.raises(UserError, match=r"expected .boxed"):
        matching.math(r"\boxed{7}", "7")


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(UserError, match="expected '#### number'"):
        matching.gsm8k("#### 5", "five")
    with pytest.raises(UserError, match="expected '#### number'"):
        matching.gsm8k_flexible("#### 5", "five")


def test_every_published_reference_has_a_number_and_agrees_with_itself(shared_data):
    for name in ("train", "test"):
        for line in (shared_data / "gsm8k" / f"{name}.jsonl").read_text().splitlines():
            text = json.loads(line)["answer"]
            assert matching.gsm8k(text, text)
            assert matching.gsm8k_value(text, text)
            float(matching.gsm8k_number(text))


def test_accuracy_and_its_standard_error():
    correct = [True] * 30 + [False] * 70
    share, error = metrics.accuracy(correct)
    assert share == 0.3
    assert error == pytest.approx(np.sqrt(0.3 * 0.7 / 100))
    simulated = np.random.default_rng(0).binomial(100, 0.3, 20000) / 100
    assert error == pytest.approx(simulated.std(), rel=0.03)
    with pytest.raises(UserError, match="no answers"):
        metrics.accuracy([])


def test_the_error_of_one_item_is_undefined():
    # statistics.stdev of one value is an error as well
    assert metrics.accuracy([True]) == (1.0, None)
    assert metrics.mean_and_error([0.25]) == (0.25, None)
    assert metrics.ratio_and_error([3.0], [2]) == (1.5, None)
    values = [1.0, 4.0, 2.5]
    mean, error = metrics.mean_and_error(values)
    assert (mean, error) == (2.5, pytest.approx(statistics.stdev(values) / 3**0.5))
    assert metrics.percent_and_error(1.0, None) == "100.0 % +- undefined"
