"""Choices and perplexities with a stand-in for the model whose log-probabilities are known."""

import math

import numpy as np
import pytest

from jax_ordermerge.config import make_task
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import likelihood
from jax_ordermerge.evaluate.prompts import Question


def letters(text):
    return [ord(letter) for letter in text]


def worth(token):
    return -math.log(2 + token % 7)


def score(pairs):
    """A token's log-probability is its own, whatever stands before it."""
    return [sum(map(worth, continuation)) for _, continuation in pairs], [False] * len(pairs)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8, 9, 23])
@pytest.mark.parametrize("positions", [1, 3, 4, 8])
def test_windows_hold_every_token_once_and_fit(size, positions):
    tokens = list(range(size))
    cut = likelihood.windows(tokens, -1, positions)
    assert [token for _, continuation in cut for token in continuation] == tokens
    for context, continuation in cut:
        assert len(context) >= 1
        assert len(context) + len(continuation) <= positions + 1
        whole = [-1, *tokens]
        at = whole.index(continuation[0])
        assert whole[at - len(context) : at] == context  # what really stands before it
    if size > positions:
        assert (
            sum(map(len, cut[-1])) == positions + 1
        )  # the last one reads as much as the model holds
    np.testing.assert_allclose(
        likelihood.rolling(score, [tokens], -1, positions), [sum(map(worth, tokens))]
    )


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("ab", " c", ("ab", " c")),
        ("ab  ", "c", ("ab", "  c")),
        ("a\n", "c", ("a", "\nc")),
        ("", "c", ("\0", "c")),
        ("  ", "c", ("\0", "  c")),
    ],
)
def test_pairs(context, continuation, expected):
    assert likelihood.pair(letters, context, continuation, 0) == tuple(map(letters, expected))


def test_a_token_across_the_border_belongs_to_the_continuation():
    vocabulary = {"x": 1, "y": 2, "xy": 3}

    def joined(text):
        return [3] if text == "xy" else [vocabulary[letter] for letter in text]

    assert likelihood.pair(joined, "x", "y", 0) == (
        [3],
        [],
    )  # as the harness cuts it: there is nothing left to score


def test_pairs_that_do_not_fit():
    assert likelihood.fitted(range(10), [1, 2], 5) == ([6, 7, 8, 9], [1, 2])
    assert likelihood.fitted([1], [1, 2, 3], 3) == ([1], [1, 2, 3])
    with pytest.raises(UserError, match="4 tokens does not fit the 3 positions"):
        likelihood.fitted([1], [1, 2, 3, 4], 3)


def ask(row, task):
    choices, right = likelihood.chosen(task, row)
    return Question(0, row, row["question"], row["question"], choices[right])


def test_choices_by_sum_by_character_and_by_byte():
    task = make_task(name="t", kind="multiple_choice", data="x", delimiter="")
    rows = [
        {"question": "q", "choices": ["b", "aaaaaaa"], "answer": "aaaaaaa"},
        {"question": "q", "choices": ["é" * 3, "bb"], "answer": 0},
    ]
    asked = [ask(row, task) for row in rows]

    def score(pairs):
        assert [len(context) for context, _ in pairs] == [1] * 4
        return [-2.0, -7.0, -9.0, -4.0], [True, False, True, False]

    summary, items = likelihood.run_choices(task, asked, letters, score, start=0, positions=99)
    # of the first, -2 and -1 a letter; of the second, -3 and -2 a character, -1.5 and -2 a byte
    assert [(item["correct"], item["correct_norm"], item["correct_bytes"]) for item in items] == [
        (False, True, True),
        (False, False, True),
    ]
    assert (summary["accuracy"], summary["acc_norm"], summary["acc_bytes"], summary["n"]) == (
        0.0,
        0.5,
        1.0,
        2,
    )
    assert [item["greedy"] for item in items] == [[True, False], [True, False]]
    assert items[0]["answer"] == "b"
    assert items[0]["logps"] == [-2.0, -7.0]


def test_perplexity_of_texts():
    task = make_task(name="t", kind="perplexity", data="x", text="{{page}}")
    texts = ["one two\n three", "é", "a" * 50]
    found, items = likelihood.run_perplexity(
        task, [{"page": text} for text in texts], letters, score, start=0, positions=7
    )
    logps = [sum(worth(ord(letter)) for letter in text) for text in texts]
    np.testing.assert_allclose([item["logp"] for item in items], logps)
    assert [item["words"] for item in items] == [3, 1, 1]
    assert [item["bytes"] for item in items] == [14, 2, 50]
    total = -sum(logps)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / 5))
    assert found["byte_perplexity"] == pytest.approx(math.exp(total / 66))
    assert found["token_perplexity"] == pytest.approx(math.exp(total / 65))
    assert found["bits_per_byte"] == pytest.approx(total / 66 / math.log(2))
    left = np.array([-x for x in logps]) - total / 66 * np.array([14, 2, 50])
    assert found["se"] == pytest.approx(math.sqrt((left**2).sum() * 3 / 2) / 66 / math.log(2))


def test_no_text():
    with pytest.raises(UserError, match="task t has no text"):
        likelihood.run_perplexity(
            make_task(name="t", kind="perplexity", data="x"),
            [{"text": ""}],
            letters,
            score,
            start=0,
            positions=7,
        )
