"""Equality of mathematical answers by value, with math-verify (the optional extra `math`).

An answer of a model may be anything, such as `9^{9^{9^9}}`, and no library survives all of it. So
the comparison runs in a process of its own, which is ended when it takes too long.
"""

import atexit
import importlib.util
import json
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Final

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import matching

MISSING: Final = "symbolic equality not measured: pip install 'jax_ordermerge[math]'"
TIMEOUT: Final = 5.0  # seconds for a pair of answers; the usual one takes a tenth
_START: Final = 120.0  # seconds until sympy is imported, on a machine that is busy
_LONGEST: Final = 1000  # characters of an answer, whose parsing takes more than linear time
# math-verify drops the base of 12_8 and the dots of 0.3\ldots: by writing alone.
_BY_WRITING: Final = re.compile(r"[0-9]\s*_|\\[lc]?dots")
# Forms that math-verify does not read, or reads otherwise: 45^\circ as 45 also within a tangent.
_DEGREES: Final = r"([0-9]+(?:\.[0-9]+)?)\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°)"
_OF_ANGLES: Final = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])(?!\s*\^\s*\{?\s*-)")
_REPEATING: Final = re.compile(
    r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
    r"(?![0-9]|\\(?:overline|bar|dot))"
)
_REWRITES: Final = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$", ""),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"√\s*([0-9]+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"°", r"^\\circ "),
        # behind a fraction math-verify reads no percent
        (r"(?:(?<=\})|(?<=frac[0-9][0-9]))\s*\\?%", ""),
    )
]
# a number with its unit in one text: \text{6 hours}
_MEASURE: Final = re.compile(
    r"\\(?:text|mbox|mathrm)\s*\{\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s+"
    r"(?!.*\b(?:and|or|to)\b)([A-Za-z][A-Za-z .]*)\}"
)
_SPACES: Final = re.compile(r"(?<=[0-9])\s*(?:\\[!,;: ]|\s)\s*(?=[0-9])|\\!")


def is_available() -> bool:
    """Return whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def equal(answer: str, reference: str) -> bool | None:
    """Return whether the last boxed answers have the same value; None where it took too long.

    Answers that are equal by writing (`matching.math`) are equal. An answer whose box is not closed
    is read as if it were, unless it may have been cut.

    Raises:
        UserError: the reference has no boxed answer, or the library cannot be started.
    """
    expected, boxed_answer = matching.boxed(reference), matching.open_boxed(answer)
    if boxed_answer is None or expected is None:
        return matching.math(answer, reference)
    if matching.same_formula(boxed_answer, expected):
        return True
    if max(len(boxed_answer), len(expected)) > _LONGEST:
        return False
    texts = _without_unit([_rewrite(text) for text in (boxed_answer, expected)])
    if any(not text or _BY_WRITING.search(text) for text in texts):
        return False
    return _WORKER.ask(texts)


def _rewrite(text: str) -> str:
    r"""Return a formula in the forms that math-verify reads.

    Example:
        >>> _rewrite(r"\tan 45^\circ"), _rewrite(r"0.1\overline{6}"), _rewrite(r"\$5.00")
        ('\\tan {\\frac{45\\pi}{180}}', '\\frac{15}{90}', '5.00')
    """
    text = text.strip().rstrip(".")
    if _OF_ANGLES.search(text):
        text = re.sub(_DEGREES, r"{\\frac{\1\\pi}{180}}", text)
    text = _REPEATING.sub(_fraction, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _SPACES.sub("", text).strip()


def _fraction(match: re.Match[str]) -> str:
    # 0.1666... is (16 - 1) / 90
    digits, period = match[1] + match[2], match[3] or match[4]
    upper = int(digits + period) - int(digits or "0")
    return rf"\frac{{{upper}}}{{{'9' * len(period)}{'0' * len(match[2])}}}"


def _without_unit(texts: list[str]) -> list[str]:
    """Return a pair without the unit in `\\text{6 hours}`, unless both have one that differs."""
    matches = [_MEASURE.fullmatch(text) for text in texts]
    if len({match[2].strip(" .") for match in matches if match}) > 1:
        return texts
    return [match[1] if match else text for match, text in zip(matches, texts, strict=True)]


class _Worker:
    """The process that compares. It is started for the first pair, and again after a timeout."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    def ask(self, texts: list[str]) -> bool | None:
        """Return the verdict on answer and reference, or None after `TIMEOUT`."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(texts).encode() + b"\n")
            self._process.stdin.flush()
            verdict = self._read(TIMEOUT)
        except OSError:  # it has ended meanwhile
            verdict = ""
        if verdict not in ("true", "false"):
            # Out of time or of memory: what the process holds is not worth saving.
            self.stop()
            return None
        return verdict == "true"

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        worker = Path(__file__).with_name("symbolic_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._read(_START) != "ready":
            self.stop()
            raise UserError(
                "math-verify is installed and does not start; check it with python -c 'import "
                "math_verify', or install it anew: pip install 'jax_ordermerge[math]'"
            )

    def _read(self, seconds: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        # A line is a single write of few bytes, so what can be read is a line.
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline().decode().strip() if ready else ""


_WORKER: Final = _Worker()
