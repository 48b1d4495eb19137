"""Choices and perplexities under a stand-in model whose log-probabilities are known."""

import math

import numpy as np
import pytest

from jax_ordermerge.config import make_task
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import likelihood
from jax_ordermerge.evaluate.eval_model import EvalModel
from jax_ordermerge.evaluate.prompts import Question
from jax_ordermerge.evaluate.tasks import choices, texts


def letters(text):
    return [ord(letter) for letter in text]


class Letters:
    """A tokenizer with one token per letter."""

    bos_token, bos_token_id = None, 0

    def __call__(self, text, **options):
        return {"input_ids": letters(text)}


def logprob(token):
    return -math.log(2 + token % 7)


def score(pairs):
    """The log-probability of a token does not depend on its context."""
    return [sum(map(logprob, continuation)) for _, continuation in pairs], [False] * len(pairs)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8, 9, 23])
@pytest.mark.parametrize("positions", [1, 3, 4, 8])
def test_windows_hold_every_token_once_and_fit(size, positions):
    tokens = list(range(size))
    pairs = likelihood.windows(tokens, -1, positions)
    assert [token for _, continuation in pairs for token in continuation] == tokens
    for context, continuation in pairs:
        assert len(context) >= 1
        assert len(context) + len(continuation) <= positions + 1
        text = [-1, *tokens]
        start = text.index(continuation[0])
        assert text[start - len(context) : start] == context
    if size > positions:
        assert sum(map(len, pairs[-1])) == positions + 1  # the last context is extended
    logprobs = likelihood.rolling_logprobs(score, [tokens], -1, positions)
    np.testing.assert_allclose(logprobs, [sum(map(logprob, tokens))])


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
    assert likelihood.make_pair(letters, context, continuation, 0) == tuple(map(letters, expected))


def test_a_token_across_the_border_belongs_to_the_continuation():
    vocabulary = {"x": 1, "y": 2, "xy": 3}

    def encode(text):
        return [3] if text == "xy" else [vocabulary[letter] for letter in text]

    # As the harness cuts it: there is nothing left to score.
    assert likelihood.make_pair(encode, "x", "y", 0) == ([3], [])


def test_pairs_that_do_not_fit():
    assert likelihood.truncate_pair(range(10), [1, 2], 5) == ([6, 7, 8, 9], [1, 2])
    assert likelihood.truncate_pair([1], [1, 2, 3], 3) == ([1], [1, 2, 3])
    with pytest.raises(UserError, match="4 tokens does not fit the 3 positions"):
        likelihood.truncate_pair([1], [1, 2, 3, 4], 3)


def make_question(row, task):
    options, right = choices.read_choices(task, row)
    return Question(0, row, row["question"], row["question"], options[right])


def test_choices_by_sum_by_character_and_by_byte():
    task = make_task(name="t", kind="multiple_choice", data="x", delimiter="")
    rows = [
        {"question": "q", "choices": ["b", "aaaaaaa"], "answer": "aaaaaaa"},
        {"question": "q", "choices": ["é" * 3, "bb"], "answer": 0},
    ]
    questions = [make_question(row, task) for row in rows]

    def score(pairs):
        assert [len(context) for context, _ in pairs] == [1] * 4
        return [-2.0, -7.0, -9.0, -4.0], [True, False, True, False]

    summary, items, _ = choices.choose(task, questions, EvalModel(Letters(), None, score, 99))
    # The first: -2 and -1 per letter. The second: -3 and -2 per character, -1.5 and -2 per byte.
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
    pages = ["one two\n three", "é", "a" * 50]
    model = EvalModel(Letters(), None, score, 7)
    summary, items, _ = texts.measure(task, [{"page": page} for page in pages], model)
    logprobs = [sum(logprob(ord(letter)) for letter in page) for page in pages]
    np.testing.assert_allclose([item["logp"] for item in items], logprobs)
    assert [item["words"] for item in items] == [3, 1, 1]
    assert [item["bytes"] for item in items] == [14, 2, 50]
    total = -sum(logprobs)
    assert summary["word_perplexity"] == pytest.approx(math.exp(total / 5))
    assert summary["byte_perplexity"] == pytest.approx(math.exp(total / 66))
    assert summary["token_perplexity"] == pytest.approx(math.exp(total / 65))
    assert summary["bits_per_byte"] == pytest.approx(total / 66 / math.log(2))
    residuals = np.array([-x for x in logprobs]) - total / 66 * np.array([14, 2, 50])
    error = math.sqrt((residuals**2).sum() * 3 / 2) / 66 / math.log(2)
    assert summary["se"] == pytest.approx(error)


def test_a_file_without_text_is_refused():
    task = make_task(name="t", kind="perplexity", data="x")
    with pytest.raises(UserError, match="task t has no text"):
        texts.measure(task, [{"text": ""}], EvalModel(Letters(), None, score, 7))
