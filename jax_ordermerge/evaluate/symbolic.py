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
    texts = [_SPACES.sub("", text.strip().rstrip(".")) for text in (boxed_answer, expected)]
    if matching.same_formula(boxed_answer, expected):
        return True
    if any(len(text) > _LONGEST or not text or _BY_WRITING.search(text) for text in texts):
        return False
    return _WORKER.ask(texts)


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
