"""Numbers as people read them: p values, errors, intervals, and the words that a p value allows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CLEAR, WEAK = 0.01, 0.05
LONGEST_ANSWER = 700


def p_text(p: float) -> str:
    """Return a p value for people.

    Example:
        >>> p_text(0.0312), p_text(1e-9)
        ('p = 0.031', 'p < 0.0001')
    """
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def strength(p: float) -> str:
    """Return "clearly", "weakly" or "" for a p value.

    Example:
        >>> strength(0.001), strength(0.03), strength(0.3)
        ('clearly', 'weakly', '')
    """
    return "clearly" if p < CLEAR else "weakly" if p < WEAK else ""


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation, None for one value.

    Example:
        >>> spread([1.0, 3.0]), spread([1.0])
        ((2.0, 1.4142135623730951), (1.0, None))
    """
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def number(value: float | None, digits: int) -> str:
    """Return a number with so many digits, a dash for None.

    Example:
        >>> number(1.25, 1), number(None, 1)
        ('1.2', '–')
    """
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Return a share in per cent, a dash for None.

    Example:
        >>> percent(0.125)
        '12.5'
    """
    return "–" if value is None else f"{100 * value:.1f}"


def plus_minus(value: float | None, error: float | None, digits: int) -> str:
    """Return value and standard error.

    Example:
        >>> plus_minus(1.5, 0.25, 2)
        '1.50 ± 0.25'
    """
    return number(value, digits) + (
        f" ± {error:.{digits}f}" if value is not None and error is not None else ""
    )


def mean_sd(values: Sequence[float | None], digits: int) -> str:
    """Return mean and, in brackets, standard deviation; a dash when a value is unknown.

    Example:
        >>> mean_sd([1.0, 3.0], 2)
        '2.00 (1.41)'
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    mean, sd = spread(known)
    return number(mean, digits) + (f" ({sd:.{digits}f})" if sd is not None else "")


def interval(gap: Mapping[str, float], scale: float, digits: int) -> str:
    """Return estimate, standard error, interval and, where there is one, p of a `paired.difference` or a gap.

    Example:
        >>> interval({"estimate": 0.1, "se": 0.02, "low": 0.06, "high": 0.14, "p": 0.002}, 100, 1)
        '+10.0 ± 2.0 [+6.0, +14.0], p = 0.002'
    """
    value, error, low, high = (scale * gap[key] for key in ("estimate", "se", "low", "high"))
    p = f", {p_text(gap['p'])}" if "p" in gap else ""
    return f"{value:+.{digits}f} ± {error:.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{p}"


def gap_or_reason(gap: Mapping[str, Any]) -> str:
    """Return a gap between losses, or why it could not be determined.

    Example:
        >>> gap_or_reason({"reason": "one member only"})
        '– (one member only)'
    """
    return f"– ({gap['reason']})" if "reason" in gap else interval(gap, 1, 4)


def loss_unit(objective: Mapping[str, Any]) -> str:
    """Return the unit of the losses of an objective, a section of the config.

    Example:
        >>> (
        ...     loss_unit({}),
        ...     loss_unit({"kind": "dpo", "loss": "sigmoid"}),
        ...     loss_unit({"kind": "dpo", "loss": "ipo"}),
        ... )
        ('nats a token', 'nats a pair', 'squared nats a pair')
    """
    if objective.get("kind", "sft") == "sft":
        return "nats a token"
    return "squared nats a pair" if objective.get("loss") == "ipo" else "nats a pair"


def shortened(text: str) -> str:
    """Return text of at most `LONGEST_ANSWER` characters, the cut marked.

    Example:
        >>> len(shortened("a" * 1000))
        720
    """
    return (
        text
        if len(text) <= LONGEST_ANSWER
        else text[:LONGEST_ANSWER] + f" … ({len(text)} characters)"
    )
