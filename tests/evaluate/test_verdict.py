"""Verdicts of judges, as they write them: letters, prose, thoughts and ties."""

import time

import pytest

from jax_ordermerge.evaluate.verdict import parse

REPLIES = [
    ("a", 1),
    ("(b).", 0),
    ("A", 1),
    ("B", 0),
    ("**A**", 1),
    ("[[B]]", 0),
    ("(B)", 0),
    ("B.", 0),
    ("Answer: B", 0),
    ("Answer B", 0),
    ("The answer is A", 1),
    ("The better one is B.", 0),
    ("Answer A is longer, but Answer B hallucinates.", None),
    ("Answer A is fine but B is better.", 0),
    ("I prefer answer A over B.", 1),
    ("A is better than B", 1),
    ("B is not better than A.", None),
    ("Verdict: A", 1),
    ("**Verdict:** B", 0),
    ("Final answer: **A**", 1),
    ("\\boxed{B}", 0),
    ("$\\boxed{\\text{A}}$", 1),
    ("<think>B is good. Verdict: B</think>A", 1),
    ("<think>I think B", None),
    ("reasoning B ... </think>\n\nA", 1),
    ("Neither", 0.5),
    ("neither", 0.5),
    ("It's a tie.", 0.5),
    ("[[C]]", 0.5),
    ("A good answer would be short.", None),
    ("I must choose A or B. I choose B.", 0),
    ("I would not choose A. ", None),
    ("A\n\nBecause it is more helpful.", 1),
    ("### Answer A\nGood.\n### Answer B\nBad.\nSo A wins.", 1),
    ("### Answer A\nGood.\n### Answer B\nBad.", None),
    ("**Answer A**: Good.\n**Answer B**: Bad.\n\n**A**", 1),
    ("Answer B is more helpful.", 0),
    ("I'd go with B.", 0),
    ("I lean towards A.", 1),
    ("Response A is clearly the better response.", 1),
    ("Option B wins!", 0),
    ("The winner is: Answer A", 1),
    ("My vote goes to B", 0),
    ("", None),
    ("I cannot judge this.", None),
    ("Sorry", None),
    ("Apple Banana", None),
    ("At first A seems better. But B is correct. Final verdict: B", 0),
    ("Both answers are good. A is slightly better.", 1),
    ("Verdict: B. A careful reader would agree.", 0),
    ("answer a", None),
    ("The preferred response is 'A'", 1),
    ('{"verdict": "B"}', 0),
    ('{"answer":"A"}', 1),
    ("A.", 1),
    ("Comparing A and B: B is the best.", 0),
    ("A\nB", 0),
    ("Choice: A or B? B", 0),
    ("Between A and B, I'd pick A.", 1),
    ("A > B", None),
    ("B, because A is wrong", None),
    ("People would prefer B", 0),
    ("A is better in style; B is better in content. Overall: B", 0),
]


@pytest.mark.parametrize(("reply", "verdict"), REPLIES)
def test_the_last_stated_verdict_counts(reply, verdict):
    assert parse(reply) == verdict


@pytest.mark.parametrize(("reply", "verdict"), REPLIES)
def test_thoughts_before_a_verdict_do_not_change_it(reply, verdict):
    thoughts = "<think>\nAnswer B is better. Verdict: B? No: A wins.\n</think>\n\n"
    if "</think>" not in reply:
        assert parse(thoughts + reply) == verdict


def test_a_reply_that_was_cut_states_a_verdict_or_none():
    assert parse("Answer A is more", cut=True) is None
    assert parse("A", cut=True) == 1.0
    assert parse("Verdict: B, since", cut=True) == 0.0
    assert parse("<think>B is better", cut=True) is None


@pytest.mark.parametrize(
    "text", ["A ", "answer ", "*", "better is the ", "<think>", "A is the a the a ", " "]
)
def test_a_judge_that_repeats_itself_takes_no_time(text):
    start = time.perf_counter()
    parse(text * (50_000 // len(text)))
    assert time.perf_counter() - start < 5
