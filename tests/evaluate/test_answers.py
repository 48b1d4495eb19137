"""Scoring, on strings met in practice."""

import json

import numpy as np
import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import answers


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [("12", "12", True), ("\t12 \n", "12", True), ("12 .", "12", False), ("a  b", "a b", False), ("", "", True), ("A", "a", False)],
)
def test_exact(answer, reference, right):
    assert answers.exact(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("x\n#### 18", "y\n#### 18", True),
        ("#### 1,234,567", "#### 1234567", True),
        ("#### -3", "#### -3", True),
        ("#### 3", "#### -3", False),
        ("#### 4\nno, wait\n#### 5", "#### 5", True),
        ("#### 5\nno, wait\n#### 4", "#### 5", False),
        ("####5", "#### 5", False),
        ("#### five", "#### 5", False),
        ("#### $5", "#### 5", False),
        ("5", "#### 5", False),
        ("", "#### 5", False),
        ("#### 0.5", "#### 0.5", True),
    ],
)
def test_gsm8k(answer, reference, right):
    assert answers.gsm8k(answer, reference) is right


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(UserError, match="expected '#### number'"):
        answers.gsm8k("#### 5", "five")


def test_every_published_reference_has_a_number_and_agrees_with_itself(shared_data):
    for name in ("train", "test"):
        for line in (shared_data / "gsm8k" / f"{name}.jsonl").read_text().splitlines():
            text = json.loads(line)["answer"]
            assert answers.gsm8k(text, text)
            float(answers.gsm8k_number(text))


def test_accuracy_and_its_error():
    correct = [True] * 30 + [False] * 70
    share, error = answers.accuracy(correct)
    assert share == 0.3
    assert error == pytest.approx(np.sqrt(0.3 * 0.7 / 100))
    simulated = np.random.default_rng(0).binomial(100, 0.3, 20000) / 100
    assert error == pytest.approx(simulated.std(), rel=0.03)
    with pytest.raises(UserError, match="no answers"):
        answers.accuracy([])
