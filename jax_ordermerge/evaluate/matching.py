"""Comparisons of a generated answer with a reference. Strings in, yes or no out."""

import re
from collections.abc import Sequence

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import quantities

# The patterns are those of the publications and of lm-evaluation-harness, oddities included:
# another pattern would give numbers that cannot be compared with published ones. COT_NUMBER, for
# example, needs one more character after the number.
GSM8K_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
COT_NUMBER = re.compile(r"The answer is (-?[0-9.,]+).")
FLEXIBLE_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def truncate(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it.

    Example:
        >>> truncate("5\\n\\nQuestion: 6?", ("Question:", "\\n\\n"))
        '5'
    """
    # An empty text would be found at the start of every text.
    for stop in filter(None, stops):
        text = text.split(stop, 1)[0]
    return text


def exact(answer: str, reference: str) -> bool:
    """Return whether the strings are equal without the white space around them.

    Example:
        >>> exact(" 42\\n", "42"), exact("42.", "42")
        (True, False)
    """
    return answer.strip() == reference.strip()


def gsm8k_number(text: str) -> str | None:
    """Return the number after the first `####`, without commas and without a full stop, or None.

    Example:
        >>> gsm8k_number("She pays 5 + 1,000.\\n#### 1,005")
        '1005'
        >>> gsm8k_number("the answer is 5") is None
        True

    Source: the pattern published with GSM8K (Cobbe et al., "Training Verifiers to Solve Math Word
    Problems", 2021); the full stop as in the filter `strict-match` of lm-evaluation-harness.
    """
    # The first and not the last: a model that goes on with questions of its own writes more of
    # them.
    match = GSM8K_NUMBER.search(text)
    return _without_marks(match[1]) if match else None


def gsm8k(answer: str, reference: str) -> bool:
    """Return whether the first `#### number` of both is the same string, commas aside.

    Raises:
        UserError: the reference has no such number.

    Example:
        >>> gsm8k("2 + 3 = 5\\n#### 5", "so it is\\n#### 5")
        True
        >>> gsm8k("5", "#### 5"), gsm8k("#### 5.0", "#### 5")
        (False, False)
    """
    # As strings: "5.0" is not "5", as in the published evaluation.
    return gsm8k_number(answer) == _gsm8k_reference(reference)


def gsm8k_flexible(answer: str, reference: str) -> bool:
    """Return whether the last number of an answer is that of the reference.

    Raises:
        UserError: the reference has no `#### number`.

    Example:
        >>> gsm8k_flexible("so it is $1,005.", "#### 1005")
        True
        >>> gsm8k_flexible("5 apples, 3 left", "#### 5")
        False

    Source: the filter `flexible-extract` of lm-evaluation-harness, with the characters it ignores.
    """
    expected = _gsm8k_reference(reference)
    # the pattern has two groups, of which one is empty at each match
    numbers = [first or second for first, second in FLEXIBLE_NUMBER.findall(answer)]
    return bool(numbers) and _without_marks(numbers[-1]) == expected


def gsm8k_cot(answer: str, reference: str) -> bool:
    """Return whether the first `The answer is` of an answer is followed by the right number.

    Raises:
        UserError: the reference has no `#### number`.

    Example:
        >>> gsm8k_cot("2 + 3 = 5. The answer is 5.", "#### 5"), gsm8k_cot("#### 5", "#### 5")
        (True, False)

    Source: the answers of Wei et al., "Chain-of-thought prompting elicits reasoning in large
    language models", 2022, https://arxiv.org/abs/2201.11903, as lm-evaluation-harness reads them.
    """
    expected = _gsm8k_reference(reference)
    match = COT_NUMBER.search(answer)
    return match is not None and _without_marks(match[1]) == expected


def _gsm8k_reference(reference: str) -> str:
    number = gsm8k_number(reference)
    if number is None:
        raise UserError(
            f"a gsm8k reference ends on '{reference.strip()[-40:]}', expected '#### number'; use "
            "kind: exact for plain answers"
        )
    return number


def _without_marks(number: str) -> str:
    return re.sub(r"[,$]|\.$", "", number)


def gsm8k_value(answer: str, reference: str) -> bool:
    """Return whether the last number of an answer has the value of the reference.

    Not as published: 5.0 is 5, and a Unicode minus is a sign.

    Raises:
        UserError: the reference has no `#### number`.

    Example:
        >>> gsm8k_value("so it is $5.00", "#### 5"), gsm8k_flexible("so it is $5.00", "#### 5")
        (True, False)
    """
    return number(answer, _gsm8k_reference(reference))


def number(answer: str, reference: str) -> bool:
    """Return whether an answer ends with the numbers of the reference: SVAMP, ASDiv.

    Numbers may be ratios, times, fractions and lists, see `quantities`. A reference that does not
    begin with a number is compared as words.

    Raises:
        UserError: the reference is empty.

    Example:
        >>> number("He has 8 - 3.0 = 5.0 left.", "5"), number("1,000", "1000 (apples)")
        (True, True)
        >>> number("It is 3:4.", "3:4"), number("2,3", "23"), number("−3", "3")
        (True, False, False)
    """
    # Digits and letters: "-" or "?" says nothing that an answer could be.
    if not re.search(r"[^\W_]", reference):
        raise UserError(f"a reference is '{reference.strip()[:40]}', expected a number or words")
    expected = quantities.numeric(reference)
    if expected:
        return quantities.ends_with(answer, expected)
    return quantities.same_words(answer, reference)


def boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}`, `\\fbox{...}` or `\\boxed x`, or None.

    Example:
        >>> boxed(r"so \\boxed{\\frac{1}{2}} holds"), boxed(r"\\boxed 5."), boxed(r"\\boxed{1")
        ('\\\\frac{1}{2}', '5.', None)
    """
    rest = _last_box(text)
    if rest is None:
        return None
    # `\boxed 5`, without braces, ends at the end of the formula
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    end, _ = _closing_brace(rest)
    return rest[1:end].strip() if end else None


def open_boxed(text: str) -> str | None:
    """Return the content of the last box also where its brace is not closed.

    It then ends with the formula or the line. A text that ends inside of the box, with a number or
    a word that could go on, was cut.

    Example:
        >>> open_boxed(r"$\\boxed{\\frac{1}{2}$."), open_boxed(r"\\boxed{\\frac{1}{2")
        ('\\\\frac{1}{2}', None)
    """
    rest, closed = _last_box(text), boxed(text)
    if closed is not None or rest is None:
        return closed
    content = re.split(r"\$|\n", rest[1:])[0].strip()
    if len(content) == len(rest[1:].strip()) and not content.endswith(("}", ")", "]")):
        return None
    _, depth = _closing_brace("{" + content)
    return (content + "}" * (depth - 1)) or None


def _last_box(text: str) -> str | None:
    # The last one is the answer; those before it are intermediate results.
    ends = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)", text)]
    return text[ends[-1] :].lstrip() if ends else None


def _closing_brace(text: str) -> tuple[int, int]:
    """Return where the first brace of a text is closed, else 0, and how many braces stay open."""
    # Braces nest, which a regular expression cannot follow. `\{` is a character and opens nothing:
    # \left\{ 1 \right. is balanced.
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0 and match[0] == "}":
            return match.start(), 0
    return 0, depth


def math(answer: str, reference: str) -> bool:
    """Return whether the last boxed answers are the same after normalization.

    The normalization removes spaces, sizes of brackets, signs of degree, dollar and percent, a
    trailing unit (`\\text{ cm}^2`) and a leading `x =`. It also makes the forms of a fraction, of
    `\\sqrt` and of a decimal uniform: `\\dfrac`, `\\frac12`, `a/b`, `.5`.

    Raises:
        UserError: the reference has no boxed answer.

    Example:
        >>> math(r"\\boxed{\\dfrac12}", r"\\boxed{\\frac{1}{2}}")
        True
        >>> math(r"\\boxed{x = 5\\text{ cm}}", r"\\boxed{5}"), math("5", r"\\boxed{5}")
        (True, False)

    Source: the answers and their equivalence of Hendrycks et al., "Measuring mathematical problem
    solving with the MATH dataset", 2021, https://arxiv.org/abs/2103.03874.
    """
    expected, boxed_answer = boxed(reference), boxed(answer)
    if expected is None:
        raise UserError(
            f"a math reference ends on '{reference.strip()[-40:]}', expected \\boxed{{answer}}; "
            "use kind: exact for plain answers"
        )
    return boxed_answer is not None and same_formula(boxed_answer, expected)


def same_formula(answer: str, reference: str) -> bool:
    """Return whether two formulas are written alike, see `math`.

    Example:
        >>> same_formula(r"5\\text{ cm}^2", "5"), same_formula("0.25", r"\\frac14")
        (True, False)
    """
    return _normalize(answer) == _normalize(reference)


# A backslash before a space is a space, but not the second one of a line break in a matrix.
_IGNORED = re.compile(r"\\left|\\right|(?<!\\)\\[!,;: ]|\\\$|\$|\\%|%|\^\{\\circ\}|\^\\circ|\s")
# Applied in this order: the forms of a fraction are completed step by step.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dt]frac", r"\\frac"),
        (r"^[a-zA-Z]=", ""),
        (r"\\frac([0-9a-zA-Z])([0-9a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"\\frac([0-9a-zA-Z])\{", r"\\frac{\1}{"),
        (r"(\\frac\{[^{}]*\})([0-9a-zA-Z])", r"\1{\2}"),
        (r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"^(-?)([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),
        (r"(^|[^0-9])\.([0-9])", r"\g<1>0.\2"),
    )
]
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def _normalize(text: str) -> str:
    # units first: the next step removes the space that marks them
    text = re.sub(
        r"(?<=.)\\(?:text|mbox|mathrm)\{ [^{}]*\}(?:\^(?:[0-9]|\{[0-9]+\}))?$",
        "",
        text.strip().rstrip("."),
    )
    text = _IGNORED.sub("", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    # The one decimal that the published normalization knows.
    return r"\frac{1}{2}" if text == "0.5" else _THOUSANDS.sub("", text)
