"""Is a generated answer right? Plain strings in, yes or no out; knows nothing of models."""

import re
from collections.abc import Sequence

import numpy as np

from jax_ordermerge.errors import UserError

GSM8K_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
COT_NUMBER = re.compile(r"The answer is (-?[0-9.,]+).")
FLEXIBLE_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
PLAIN_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+")


def ended(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it.

    Example:
        >>> ended("5\\n\\nQuestion: 6?", ("Question:", "\\n\\n"))
        '5'
    """
    for stop in filter(None, stops):
        text = text.split(stop, 1)[0]
    return text


def exact(answer: str, reference: str) -> bool:
    """Return whether the strings are equal once the white space around them is gone.

    Example:
        >>> exact(" 42\\n", "42"), exact("42.", "42")
        (True, False)
    """
    return answer.strip() == reference.strip()


def gsm8k_number(text: str) -> str | None:
    """Return the number after the first `####`, without commas and a full stop behind it, or None.

    Example:
        >>> gsm8k_number("She pays 5 + 1,000.\\n#### 1,005")
        '1005'
        >>> gsm8k_number("the answer is 5") is None
        True

    Source: the pattern published with GSM8K (Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021); the full stop as in
    the filter `strict-match` of lm-evaluation-harness.
    """
    found = GSM8K_NUMBER.search(text)
    return _bare(found[1]) if found else None


def gsm8k(answer: str, reference: str) -> bool:
    """Return whether the first `#### number` of both is the same, compared as strings without commas, as published.

    Raises:
        UserError: the reference holds no such number.

    Example:
        >>> (
        ...     gsm8k("2 + 3 = 5\\n#### 5", "so it is\\n#### 5"),
        ...     gsm8k("5", "#### 5"),
        ...     gsm8k("#### 5.0", "#### 5"),
        ... )
        (True, False, False)
    """
    expected = gsm8k_number(reference)
    if expected is None:
        shown = reference.strip()[-40:]
        raise UserError(
            f"a gsm8k reference ends on '{shown}', expected '#### number'; use kind: exact for plain answers"
        )
    return gsm8k_number(answer) == expected


def gsm8k_flexible(answer: str, reference: str) -> bool:
    """Return whether the last number of an answer is that of the reference, wherever it stands.

    Raises:
        UserError: the reference holds no `#### number`.

    Example:
        >>> (
        ...     gsm8k_flexible("so it is $1,005.", "#### 1005"),
        ...     gsm8k_flexible("5 apples, 3 left", "#### 5"),
        ... )
        (True, False)

    Source: the filter `flexible-extract` of lm-evaluation-harness, with the characters it ignores.
    """
    found = [first or second for first, second in FLEXIBLE_NUMBER.findall(answer)]
    expected = gsm8k_number(reference)
    if expected is None:
        return gsm8k(answer, reference)  # which says what is wrong
    return bool(found) and _bare(found[-1]) == expected


def _bare(number: str) -> str:
    return re.sub(r"[,$]|\.$", "", number)


def gsm8k_cot(answer: str, reference: str) -> bool:
    """Return whether an answer says `The answer is` and, the first time, the number of the reference.

    Raises:
        UserError: the reference holds no `#### number`.

    Example:
        >>> gsm8k_cot("2 + 3 = 5. The answer is 5.", "#### 5"), gsm8k_cot("#### 5", "#### 5")
        (True, False)

    Source: the answers of Wei et al., "Chain-of-thought prompting elicits reasoning in large language models", 2022,
    https://arxiv.org/abs/2201.11903, as lm-evaluation-harness reads them.
    """
    found, expected = COT_NUMBER.search(answer), gsm8k_number(reference)
    if expected is None:
        return gsm8k(answer, reference)  # which says what is wrong
    return found is not None and _bare(found[1]) == expected


def number(answer: str, reference: str) -> bool:
    """Return whether the last number of an answer equals the reference as a number: SVAMP, ASDiv.

    Raises:
        UserError: the reference holds no number.

    Example:
        >>> (
        ...     number("He has 8 - 3.0 = 5.0 left.", "5"),
        ...     number("none", "0"),
        ...     number("1,000", "1000 (apples)"),
        ... )
        (True, False, True)
    """
    expected = PLAIN_NUMBER.search(reference)
    if expected is None:
        raise UserError(
            f"a reference is '{reference.strip()[:40]}', expected a number; use kind: exact for other answers"
        )
    found = PLAIN_NUMBER.findall(answer)
    return bool(found) and abs(_value(found[-1]) - _value(expected.group())) < 1e-6


def _value(text: str) -> float:
    return float(text.replace(",", ""))


def boxed(text: str) -> str | None:
    """Return what stands in the last `\\boxed{...}` (or `\\fbox{...}`, or `\\boxed x`), braces balanced, or None.

    Example:
        >>> boxed(r"so \\boxed{\\frac{1}{2}} holds"), boxed(r"\\boxed 5."), boxed(r"\\boxed{1")
        ('\\\\frac{1}{2}', '5.', None)
    """
    starts = [found.end() for found in re.finditer(r"\\(?:boxed|fbox)", text)]
    if not starts:
        return None
    rest = text[starts[-1] :].lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for at, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:at].strip()
    return None


def math(answer: str, reference: str) -> bool:
    """Return whether the last boxed answers are the same up to how they are written.

    Compared as strings after what is read over: spaces, sizes of brackets, `\\dfrac` and `\\tfrac`, left out braces of `\\frac` and
    `\\sqrt`, `a/b` for a fraction, signs of degree, dollar and percent, words in `\\text` at the end, `x =` before, `.5` for `0.5`.

    Raises:
        UserError: the reference holds no boxed answer.

    Example:
        >>> (
        ...     math(r"\\boxed{\\dfrac12}", r"\\boxed{\\frac{1}{2}}"),
        ...     math(r"\\boxed{x = 5\\text{ cm}}", r"\\boxed{5}"),
        ...     math("5", r"\\boxed{5}"),
        ... )
        (True, True, False)

    Source: the answers and what is equivalent among them, Hendrycks et al., "Measuring mathematical problem solving with the MATH
    dataset", 2021, https://arxiv.org/abs/2103.03874.
    """
    expected, found = boxed(reference), boxed(answer)
    if expected is None:
        raise UserError(
            f"a math reference ends on '{reference.strip()[-40:]}', expected \\boxed{{answer}}; use kind: exact for plain answers"
        )
    return found is not None and _written_alike(found) == _written_alike(expected)


_READ_OVER = re.compile(r"\\left|\\right|\\[!,;: ]|\\\$|\$|\\%|%|\^\{\\circ\}|\^\\circ|\s")


def _written_alike(text: str) -> str:
    text = re.sub(r"\\(?:text|mbox|mathrm)\{ [^{}]*\}$", "", text.strip().rstrip("."))
    text = re.sub(r"\\[dt]frac", r"\\frac", _READ_OVER.sub("", text))
    text = re.sub(r"^[a-zA-Z]=", "", text)
    text = re.sub(r"\\frac([0-9a-zA-Z])([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([0-9a-zA-Z])\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})([0-9a-zA-Z])", r"\1{\2}", text)
    text = re.sub(r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"^(-?)([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(^|[^0-9])\.([0-9])", r"\g<1>0.\2", text)
    return (
        r"\frac{1}{2}" if text == "0.5" else re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    )


def accuracy(correct: Sequence[bool]) -> tuple[float, float]:
    """Return the share of right answers and its standard error `sqrt(p (1 - p) / n)`.

    Raises:
        UserError: no answers.

    Example:
        >>> accuracy([True, True, True, False])
        (0.75, 0.21650635094610965)
    """
    if not len(correct):
        raise UserError("no answers to score; the task has no items, check its data and limit")
    share = float(np.mean(np.asarray(correct, bool)))
    return share, float(np.sqrt(share * (1 - share) / len(correct)))
