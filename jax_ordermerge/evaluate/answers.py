"""Is a generated answer right? Plain strings in, yes or no out; knows nothing of models."""

import re
from collections.abc import Sequence

import numpy as np

from jax_ordermerge.errors import UserError

GSM8K_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


def exact(answer: str, reference: str) -> bool:
    """Return whether the strings are equal once the white space around them is gone.

    Example:
        >>> exact(" 42\\n", "42"), exact("42.", "42")
        (True, False)
    """
    return answer.strip() == reference.strip()


def gsm8k_number(text: str) -> str | None:
    """Return the number after the last `####`, commas stripped, or None.

    Example:
        >>> gsm8k_number("She pays 5 + 1,000.\\n#### 1,005")
        '1005'
        >>> gsm8k_number("the answer is 5") is None
        True

    Source: the pattern published with GSM8K (Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021).
    """
    found = GSM8K_NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def gsm8k(answer: str, reference: str) -> bool:
    """Return whether both end on the same `#### number`, compared as strings without commas, as published.

    Raises:
        UserError: the reference holds no such number.

    Example:
        >>> gsm8k("2 + 3 = 5\\n#### 5", "so it is\\n#### 5"), gsm8k("5", "#### 5"), gsm8k("#### 5.0", "#### 5")
        (True, False, False)
    """
    expected = gsm8k_number(reference)
    if expected is None:
        shown = reference.strip()[-40:]
        raise UserError(f"a gsm8k reference ends on '{shown}', expected '#### number'; use kind: exact for plain answers")
    return gsm8k_number(answer) == expected


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
