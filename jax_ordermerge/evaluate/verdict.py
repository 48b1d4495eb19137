"""What a judge says: A, B, a tie, or nothing that can be read."""

import re
from typing import Final

# Thoughts before the verdict, as models write them; an end alone where the template began them.
_THOUGHTS: Final = re.compile(
    r"<(think|thinking|thought|reasoning|analysis)>.*?(?:</\1>|\Z)|\A.*</(?:think|thinking)>",
    re.DOTALL | re.IGNORECASE,
)
# A capital, in any marks of emphasis and brackets. Patterns that ignore case exempt it.
_LETTER: Final = r"[*_`\"'“”(\[{\s]{0,9}(?-i:(?P<letter>[AB]))(?!\w|['’]\w)"
_CLOSE: Final = r"[*_`\"'“”)\]}.!]{0,9}"
_NOUN: Final = r"(?:answer|option|response|assistant|model|candidate|output|choice)"
_STATEMENTS: Final = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\[\[{_LETTER}",
        rf"\\boxed\{{(?:\\text\w*\{{)?{_LETTER}",
        # Verdict: A; the better one is B; I prefer answer A
        r"\b(?:verdict|choice|choose|winner|preference|prefer(?:red)?|decision|pick|select"
        r"|judge?ment|vote|better|best|superior|stronger|(?:go|going)\s+with|lean(?:ing)?)\b"
        rf"(?:\s+(?:one|overall|{_NOUN}))?(?:\s+(?:is|would\s+be|goes\s+to|for|to|towards?))?"
        rf"[\s*_:=→-]{{0,9}}(?:(?:the\s+)?{_NOUN}\s+)?{_LETTER}",
        # The answer is A; final answer: B. "Answer A" alone only names it.
        rf"\b(?:{_NOUN}|final|reply)[\s*_]{{0,9}}(?:\bis\b|[:=])[\s*_:]{{0,9}}"
        rf"(?:(?:the\s+)?{_NOUN}\s+)?{_LETTER}",
        # Answer A is better; B wins
        rf"{_LETTER}{_CLOSE}\s+(?:is|was|would\s+be|seems)"
        rf"(?:\s+(?:clearly|much|far|slightly|the|overall|a|{_NOUN}|one))*\s+"
        r"(?:better|best|preferred|preferable|superior|stronger|winner|more\s+\w+|most\s+\w+)",
        rf"{_LETTER}{_CLOSE}\s+wins\b",
        # the letter alone, before its reasons or behind them
        rf"\A[\s>]{{0,9}}(?:{_NOUN}\s+)?{_LETTER}{_CLOSE}\s*(?:\n|\Z)",
        rf"(?:\A|\n)[\s>]{{0,9}}(?:{_NOUN}\s+)?{_LETTER}{_CLOSE}\s*\Z",
    )
]
_TIE: Final = re.compile(
    r"^\W*(?:(?:it(?:'s| is)\s+)?(?:a\s+)?(?:tie|draw)|neither|both|equal|same)\W*$"
    r"|\[\[\s*(?:C|tie)\s*\]\]"
    r"|\b(?:verdict|choice|answer|decision|winner)(?:\s+is)?\s*[:=]?\W*"
    r"(?:a\s+)?(?:tie|draw|neither)\b",
    re.IGNORECASE,
)
_MENTION: Final = re.compile(r"(?<![\w'’])(?P<letter>[AB])(?!\w|['’]\w)")
_NEGATION: Final = re.compile(r"\b(?:not|never|cannot)\b|n't\b", re.IGNORECASE)
_NEGATED: Final = re.compile(rf"(?:{_NEGATION.pattern})\s+(?:\w+\s+)?$", re.IGNORECASE)
_BOTH: Final = re.compile(
    rf"{_CLOSE}\s*(?:or|and|nor|vs\.?|versus|/)\s*(?:{_NOUN}\s+)?[AB]\b", re.IGNORECASE
)
# Behind the letter A they say something of an answer; any other word makes it an article.
_VERBS: Final = (
    *("is", "was", "has", "does", "gives", "provides", "wins", "would"),
    *("over", "because", "since", "and", "or", "but", "as", "for"),
)


def parse(reply: str, *, cut: bool = False) -> float | None:
    """Return 1 for A, 0 for B, 1/2 for a stated tie, and None where nothing is stated.

    The last statement counts, without the thoughts before it. Where nothing states a verdict, a
    reply that speaks of one of the two alone names it, unless it was cut and could go on.

    Args:
        reply: text of the judge.
        cut: whether it ended at the largest number of tokens.

    Example:
        >>> parse("A"), parse("<think>A is good ...</think> The better one is B."), parse("Tie.")
        (1.0, 0.0, 0.5)
        >>> parse("A clear reply is hard to give."), parse("<think>Answer A is")
        (None, None)
        >>> parse("Answer A is longer, but B is right. Verdict: **B**")
        0.0
    """
    text = _THOUGHTS.sub("", reply).strip()
    if re.fullmatch(r"\W*[ab]\W*", text):
        text = text.upper()
    statements = [
        (match.end(), 1.0 if match["letter"] == "A" else 0.0)
        for pattern in _STATEMENTS
        for match in pattern.finditer(text)
        if _names_one(text, match) and not _NEGATED.search(text[: match.start()][-40:])
    ]
    statements += [(match.end(), 0.5) for match in _TIE.finditer(text)]
    if statements:
        return max(statements)[1]
    if cut or _NEGATION.search(text):
        return None
    letters = {match["letter"] for match in _MENTION.finditer(text) if _names_one(text, match)}
    return {"A": 1.0, "B": 0.0}[letters.pop()] if len(letters) == 1 else None


def _names_one(text: str, match: re.Match[str]) -> bool:
    """Return whether a letter is the name of an answer: no article, and not one of "A or B"."""
    rest = text[match.end("letter") :][:40]
    word = re.match(r"\s+([a-z]+)", rest)
    article = match["letter"] == "A" and word is not None and word[1] not in _VERBS
    return not article and not _BOTH.match(rest)
