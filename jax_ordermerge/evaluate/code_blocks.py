"""Code in the answers of chat models: blocks between fences of Markdown."""

import re
import textwrap
from collections.abc import Sequence
from typing import Final

# A fence may stand behind other text, and the rest of its line names the language.
_OPENING: Final = re.compile(r"^(?P<indent>[ \t]*).*?(?P<fence>`{3,}|~{3,})[^`\n]*\n", re.MULTILINE)


def blocks(text: str) -> list[str]:
    """Return the code between fences, without the fences. The last block may have no end.

    Example:
        >>> blocks("So:\\n```python\\nx = 1\\n```\\nor ~~~\\ny = 2\\n")
        ['x = 1\\n', 'y = 2\\n']
    """
    codes = []
    position = 0
    while opening := _OPENING.search(text, position):
        fence = re.escape(opening["fence"])
        # At the start of a line: a text within the code may have the same characters.
        closing = re.compile(rf"^[ \t]*{fence}", re.MULTILINE).search(text, opening.end())
        # Some write it behind the code. What was cut off at the limit of tokens has none.
        closing = closing or re.compile(fence).search(text, opening.end())
        end = closing.start() if closing else len(text)
        # The blocks of a list are indented with its items.
        code = text[opening.end() : end]
        codes.append(textwrap.dedent(code) if opening["indent"] else code)
        position = closing.end() if closing else end
    return codes


def defines(code: str, names: Sequence[str]) -> bool:
    """Return whether a code binds one of the names at its top level.

    Example:
        >>> defines("import math\\nasync def f(x):\\n    g = 1", ["f"]), defines("f = max", ["f"])
        (True, True)
        >>> defines("f(2) gives 3", ["f"]), defines("  g = 1", ["g"])
        (False, False)
    """
    # Not by the parser: a wrong program has to be found, too.
    name = f"(?:{'|'.join(map(re.escape, names))})"
    pattern = rf"^(?:(?:async\s+)?def|class)\s+{name}\b|^{name}\s*(?::[^=\n]*)?=(?!=)"
    return bool(names) and re.search(pattern, code, re.MULTILINE) is not None


def before_blocks(text: str) -> str:
    """Return what stands before the first fence: all, where there is none.

    Example:
        >>> before_blocks("    return x\\n```\\nThat is all.")
        '    return x\\n'
    """
    opening = _OPENING.search(f"{text}\n")
    return text[: opening.start("fence")] if opening else text


def answer(text: str, names: Sequence[str]) -> str | None:
    """Return the block that holds the answer, None where there are no blocks.

    It is the first that defines one of the names, else the first: examples of its use follow.

    Example:
        >>> answer("```\\npip install x\\n```\\n```python\\ndef f(): pass\\n```", ["f"])
        'def f(): pass\\n'
    """
    codes = blocks(text)
    return next((code for code in codes if defines(code, names)), codes[0] if codes else None)
