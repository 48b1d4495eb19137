"""The process behind `symbolic`: pairs of answers in, verdicts out, a line of JSON each.

It is run as a script and imports nothing of this package.
"""

import json
import os
import resource
import sys
from types import ModuleType
from typing import Any, TypeAlias

MEMORY = 2 << 30  # bytes; powers of powers would take all there is
# Decimals that count. math-verify's own 6 would take 3.141593 for pi.
_DECIMALS = 12
Expression: TypeAlias = Any  # an expression or a matrix of sympy, which is optional


def main() -> None:
    """Answer the pairs of standard input until it ends."""
    # Verdicts have a descriptor of their own: a library that prints must not write between them.
    with os.fdopen(os.dup(1), "w", buffering=1) as verdicts:
        os.dup2(2, 1)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        import math_verify  # imported before the first pair, whose time is limited

        verdicts.write("ready\n")
        for line in sys.stdin:
            answer, reference = json.loads(line)
            verdicts.write(json.dumps(equal(math_verify, answer, reference)) + "\n")


def equal(library: ModuleType, answer: str, reference: str) -> bool:
    """Return whether two formulas in LaTeX have the same value, as far as the library can tell."""
    try:
        expected, parsed = (parse(library, text) for text in (reference, answer))
        # Without its own time limit, which is an alarm that C code does not hear.
        return bool(
            library.verify(expected, parsed, float_rounding=_DECIMALS, timeout_seconds=None)
        )
    # The parsers of the library and of sympy raise whatever they meet.
    except Exception:
        return False


def parse(library: ModuleType, text: str) -> list[Expression | str]:
    """Return what a formula may mean: sympy expressions, and its text."""
    # Formulas alone: the library's other parser hands its text to eval.
    meanings = library.parse(
        f"${text.replace('$', '')}$",
        extraction_config=[library.LatexExtractionConfig()],
        parsing_timeout=None,
    )
    return [meaning if isinstance(meaning, str) else with_unit(meaning) for meaning in meanings]


def with_unit(meaning: Expression) -> Expression:
    """Return an expression or a matrix in which the symbol i is the imaginary unit, as in MATH."""
    import sympy

    units = {symbol: sympy.I for symbol in meaning.free_symbols if symbol.name == "i"}
    return meaning.xreplace(units) if units else meaning


if __name__ == "__main__":
    main()
