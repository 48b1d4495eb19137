"""Numbers in answers: more than a hundred forms, right against themselves and no other."""

import itertools
import time

import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import quantities
from jax_ordermerge.evaluate.eval_model import EvalModel
from jax_ordermerge.evaluate.matching import number
from jax_ordermerge.evaluate.prompts import Prompt
from jax_ordermerge.evaluate.tasks import answers

# Forms of one value in a line: each is right against each of its line, and wrong against each of
# the other lines.
VALUES = [
    ["5", "5.0", "5.00", "$5", "$5.00", "5 (apples)", "5  (boxes of nails)", "5 apples", "5 %"],
    [
        "+5 years",
        "５",
        "٥",
        "5 m²",
        "5 cm^2",
        "5 m^{3}",
        "(5)",
        "05",
        "$5$",
        r"\boxed{5}",
        r"\(5\)",
    ],
    ["-5", "−5", "–5", "- 5", "-$5", "$-5", "-5 (degrees)", "negative 5", "x = -5", "x=−5"],
    ["1,000", "1000", "1000.0", "1\u00a0000", "1\u202f000", "1e3", "10^3", "10³", "1{,}000"],
    ["1,234,567", "1234567", "1 234 567".replace(" ", "\u2009")],
    ["23", "23 (years old)"],
    ["2,3", "2, 3", "2; 3", "2;3", "2 and 3", "2 (cm); 3 (sq. cm)", "x = 2, y = 3", "2 & 3"],
    ["3; 2", "3 (years old); 2 (years old)"],
    ["9; 11; 13", "9, 11, and 13", "9 (cm), 11 (cm), 13 (cm)"],
    ["11; 13"],
    ["13"],
    ["3:4", "3 : 4", "3 to 4", "3∶4"],
    ["4:3"],
    ["12:30", "12：30"],
    ["2:5"],
    ["6:1"],
    ["6:01:00 p.m.", "18:01:00", "6:01 PM"],
    ["9:03:36 a.m.", "9:03:36"],
    ["3:30 p.m.", "15:30", "3:30 PM", "3:30pm"],
    ["3:30 a.m."],
    ["10 (am)", "10 a.m.", "10 (a.m.)", "10:00 a.m."],
    ["10 (pm)", "10 p.m.", "22:00"],
    ["1/6", "1 / 6", "1⁄6", r"\frac{1}{6}", r"\dfrac16", "2/12", "⅙"],
    ["-(1/3)", "-1/3", "−(1/3)", r"-\frac{1}{3}", "-⅓"],
    ["1/3", "⅓"],
    ["1 1/2", "1½", "1.5", "3/2", r"1\frac{1}{2}", "1-1/2", "1 and 1/2", "1.50 (dollars)"],
    ["1/2", "0.5", ".5", "½", "50/100"],
    ["-1 1/2", "−1½", "-1.5"],
    ["25/3", "8 1/3"],
    ["3.333 (minutes)"],
    ["0.0000001", "1e-7"],
    ["0", "-0", "0.0", "0 (dollars)"],
    ["300000", "3 × 10^5", "3x10^5", "3e5", r"3 \times 10^{5}", "3 × 10⁵", "300,000"],
    ["1024", "2^10", "1,024"],
    ["1000001"],
    ["1000000"],
    ["6th", "6 (th)", "6"],
    ["The 60th caller.", "60th"],
    ["2014-12-24"],
    ["24-12-2014"],
    ["3/4/2015"],
    ["5-6", "5–6"],
    ["1/0"],
    ["100 (km/hour)", "100 km/h"],
    ["120", "5!", "= 5!", "5！", "5!.", r"\boxed{5!}", "6!/3!"],
    ["5!!"],
    ["101!"],
    [
        "8",
        "√64",
        "√ 64",
        "√(64)",
        r"\sqrt{64}",
        r"\sqrt64",
        "sqrt(64)",
        "square root of 64",
        "√(57+7)",
    ],
    ["√3", r"\sqrt{3}", "sqrt(3)"],
    ["2√3", "2 √3", r"2\sqrt{3}", "2 × √3"],
    ["∛27", r"\sqrt[3]{27}", "cube root of 27"],
    ["0.001", "10⁻³", "10^-3", "10^{-3}", "10^(-3)", "10**-3", "1e-3", "1 × 10⁻³", "1/1000"],
    ["-0.5", r"\frac{-1}{2}", r"\frac{1}{-2}", r"-\frac12", "(-1)/2", "1/(-2)", "-1/2", "(−1)/2"],
    ["0.125", "2^-3", "2⁻³", "2^{-3}", "2 ** -3", r"\frac{-1}{-8}", r"-\frac{-1}{8}", "1 ÷ 8"],
    ["0^-1"],
    [
        "2000",
        "2'000",
        "2’000",
        "2_000",
        "2 000",
        "2\u2007000",
        "2 000 apples",
        "$2 000",
        "2k",
        r"2\,000",
    ],
    ["-2 000", "-2'000", "−2 000"],
    ["12 345 678.5", "12'345'678.5", "12_345_678.5", "12345678.5", "12,345,678.5"],
    ["12345", "12 345", "12 345 apples", "= 12 345", "12\u00a0345"],
    ["5 million", "5000000", "5 000 000", "5-million", "5 Million (people)", "$5M", "5 × 10^6"],
    [
        "2.5 million",
        "2500000",
        "2 1/2 million",
        "$2.5 million",
        r"2.5\text{ million}",
        "2,500 thousand",
    ],
    ["700 thousand", "7 hundred thousand", "700k", "700 000"],
    ["2 billion", "$2bn", "2 000 000 000"],
    ["2 × 3", "2x3", "2 x 3", "2*3", "2 * 3", r"2 \times 3", r"2\cdot 3", "2 X 3", "2·3 m"],
    ["3 × 2"],
    ["7", "7 (5 + 2)", "$7 ($5 + $2)", "7 (14 / 2)", "7 (1 × 7)", "7 (10 − 2 - 1)"],
    ["Yes", "yes.", "YES"],
    ["No", "no"],
    ["Mrs. Hilt", "mrs hilt"],
    ["Rug A"],
    ["Rug B", "the rug B"],
    ["They are equal", "They are equal."],
    ["The first rest stop", "first rest stop"],
    ["Ezra's class", "Ezra’s class"],
]
VALUES[0] += VALUES.pop(1)


def test_there_are_a_hundred_forms():
    assert len(set(itertools.chain(*VALUES))) >= 100


@pytest.mark.parametrize("forms", VALUES, ids=lambda forms: forms[0])
def test_forms_of_one_value_are_right_against_each_other(forms):
    for answer, reference in itertools.product(forms, forms):
        assert number(answer, reference), (answer, reference)


@pytest.mark.parametrize("index", range(len(VALUES)), ids=lambda index: VALUES[index][0])
def test_forms_of_one_value_are_wrong_against_every_other(index):
    for other in VALUES[:index] + VALUES[index + 1 :]:
        for answer, reference in itertools.product(VALUES[index], other):
            assert not number(answer, reference), (answer, reference)


@pytest.mark.parametrize("frame", ["The answer is {}.", "2 + 3 = 5.\n#### {}", "so:\n{}", "= {}"])
def test_forms_at_the_end_of_an_answer(frame):
    for form in (forms[0] for forms in VALUES):
        assert number(frame.format(form), form), form


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("8 - 3 = 5 apples", "5.0", True),
        ("He has 12 - 7 left", "7", True),
        ("8-3", "-3", False),
        ("8 - 3", "-3", False),
        ("It is $1,005.", "1005", True),
        ("**-5**", "-5", True),
        ("-5.", "-5", True),
        ("15 (5 x 3 = 15)", "15", True),
        ("(The answer is 5)", "5", True),
        ("The area is 25 cm^2", "25", True),
        ("The area is 25 cm^2", "2", False),
        ("There are 12 apples", "There are 12 apples", True),
        ("12", "There are 12 apples", True),
        ("12", "Answer: 12", True),
        ("12", "3 * 4 = 12", True),
        ("Rs. 5", "Rs 5", True),
        ("Ana is 17 and Jack is 12.", "17 (years old); 12 (years old)", True),
        ("Jack is 12 and Ana is 17.", "17 (years old); 12 (years old)", False),
        ("12", "17 (years old); 12 (years old)", False),
        ("17 (years old); 12 (years old)", "12 (apples)", False),
        ("She needs 3, 4 and 5 eggs, 12 in all", "12", True),
        ("The ratio of boys to girls is 3 to 4", "3:4", True),
        ("2,3", "3", False),
        ("1,00", "100", False),
        ("0,123", "123", False),
        ("5 of 7", "5", False),
        ("five", "5", False),
        ("The answer is 5!", "5", True),
        ("It costs $5!", "5", True),
        ("Answer: 5!", "5", True),
        ("She has 5 apples! 5!", "5", True),
        ("5! Well done", "5", True),
        ("5! = 120", "120", True),
        ("It is 300K.", "300", True),
        ("5M", "5", True),
        ("$5K", "5", False),
        ("She has 5 apples!", "5", True),
        ("It is √25.", "25", False),
        ("2 3", "23", False),
        (r"2\,3", "23", False),
        ("1'00", "100", False),
        ("1_00", "100", False),
        ("100 200", "100200", False),
        ("100 200 300", "300", True),
        ("On day 1 300 people came", "300", True),
        ("The answer is 1 300.", "1300", True),
        ("1 000 - 200 = 800", "800", True),
        ("5m", "5", True),
        ("5 m⁻²", "5", True),
        ("the 5th of a million", "5", True),
        ("8 × 3 = 24", "24", True),
        ("2 × $3 = $6", "6", True),
        ("2 × $3", "3", False),
        ("There are 2\n* 3 apples", "3", True),
        ("3 (5 + 2)", "3", False),
        ("7 (5 + 2)", "49", False),
        ("7 (5 + 2)", "2", False),
        ("7 (7 / 0)", "7", False),
        ("√(5/2)", "5", False),
        ("", "0", False),
        ("none", "0", False),
        ("15:30", "3:30", False),
        ("10", "10 (am)", True),
        ("10 (pm)", "10 (am)", False),
        ("33.33333333", "33.333333333333336", True),
        ("3.3000000000000003", "3.3", True),
        ("Yes, she has enough apples.", "Yes", True),
        ("She has 8. The answer is no.", "No", True),
        ("Ben has more than Bryan", "Bryan", False),
        ("It is 20 > 18.\nBryan", "Bryan", True),
        ("Fred", "Red", False),
        ("2", "Vendor 2", False),
        ("5", "Yes", False),
        ("Yes", "5", False),
    ],
)
def test_answers_in_words(answer, reference, right):
    assert number(answer, reference) is right


def test_a_reference_that_says_nothing_is_refused_before_anything_is_generated():
    def generate(prompts, new_tokens):
        raise AssertionError("generated")

    model = EvalModel(None, generate, None, 8)
    for kind, reference, message in (
        ("number", " - ", "item 7: a reference is '-', expected a number or words"),
        ("gsm8k", "5", "item 7: a gsm8k reference ends on '5'"),
        ("gsm8k_flexible", "5", "expected '#### number'"),
        ("math", "5", r"expected \\boxed"),
    ):
        task = answers.AnswerTask(name="asked", kind=kind)
        prompts = [Prompt(6, "a", [1], r"#### 1 \boxed{1}"), Prompt(7, "b", [1], reference)]
        with pytest.raises(UserError, match=message):
            answers.answer(task, prompts, model)


def test_the_value_stands_beside_the_published_comparison():
    texts = ["#### 5.0", "it is −5", "it is -5.00", "#### 5"]
    prompts = [Prompt(i, "q", [1], f"#### {ref}") for i, ref in enumerate(["5", "5", "-5", "5"])]
    model = EvalModel(None, lambda prompts, n: texts, None, 8)
    summary = answers.answer(answers.AnswerTask(name="t", kind="gsm8k"), prompts, model).summary
    # As published 5.0 is not 5 (strict), and a Unicode minus is no sign (flexible).
    assert [summary["accuracy"], summary["flexible"], summary["value"]] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "text",
    [
        "5" * 20_000,
        "1," * 20_000,
        "1,111" * 4_000,
        "1/" * 20_000,
        "1 " * 20_000,
        "(" * 20_000,
        "5" + " " * 20_000 + "5",
        "9!" * 9_000,
        "!" * 20_000,
        "√" * 20_000,
        "2x" * 9_000,
        "1 000 " * 5_000,
        "1'000" * 5_000,
        "5 million " * 3_000,
        "7 (5+" * 5_000,
        "^-1" * 9_000,
    ],
    ids=lambda text: text[:5],
)
def test_texts_of_a_model_that_repeats_itself_take_no_time(text):
    start = time.perf_counter()
    assert not number(text, "7")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "text",
    ["9^9^9", "9^999999999", "10^(9^9)", "1e999999999", "3 × 10^999", "9^-999", "9999999999!"],
)
def test_powers_are_bounded(text):
    assert number(text, text)
    assert not number(text, "9999999")


def test_long_runs_of_digits_are_compared_as_text():
    assert number("7" * 5000, "7" * 5000)
    assert not number("7" * 5000, "7" * 5001)
    assert quantities.read("7" * 401)[0].parts == ("7" * 401,)
