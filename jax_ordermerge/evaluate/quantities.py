"""Numbers in texts: ratios, times, fractions, lists and units beside plain numbers.

References of word problems look like `9 (apples)`, `3:4`, `12:30`, `1/6`, `-(1/3)`, `3:30 p.m.`,
`17 (years old); 12 (years old)`, `6th`, and also `Yes` or `Mrs. Hilt`.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Final, NamedTuple, TypeAlias

# A run of digits longer than this stays text: Python refuses to convert some of them, and a model
# that repeats a digit must not cost minutes.
_LONGEST: Final = 400
_TOLERANCE: Final = Fraction(1, 10**6)
Value: TypeAlias = Fraction | str


class Quantity(NamedTuple):
    """A number, or numbers joined to one answer.

    Attributes:
        separator: `:` of what may be a time, `to` of a ratio that is none (`3:4`), `/` of dates,
            `-` of ranges, and empty of one number. A fraction or a power is one number.
        parts: the numbers.
        half: `a` or `p` of a time with a.m. or p.m., else empty.
    """

    separator: str
    parts: tuple[Value, ...]
    half: str = ""


# -------------------------------------------------------------- characters

_CHARACTERS: Final = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-")  # minus signs and hyphens
    | dict.fromkeys("\u2044\u2215\uff0f", "/")
    | dict.fromkeys("\u2236\uff1a", ":")
    | dict.fromkeys("\uff0c\u066c", ",")
    | dict.fromkeys("\uff0e\u066b", ".")
    | {"\uff1b": ";", "\uff05": "%"}
    # what separates thousands is made a comma, of which the pattern of numbers then decides
    | dict.fromkeys("\u2009\u202f\u00a0", "\u00a0")
)
_SUPERSCRIPTS: Final = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_LATEX: Final = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r" \1/\2"),
        (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r" \1/\2"),
        (r"\{,\}|,\\!", ","),
        (r"\\times|\\cdot", "×"),
        (r"\\[!,;:]", ""),
        (r"([\^_])\{(-?[0-9]+)\}", r"\1\2"),
        (r"\\([$%#])", r"\1"),
        (r"-\s+(?=[0-9]+/[0-9])(?<=[=({:$]-\s)|(?<![\w)\]} ])-\s+(?=[0-9]+/[0-9])", "-"),
    )
]


def _plain(text: str) -> str:
    """Return a text in which numbers are written with ASCII characters alone.

    Example:
        >>> _plain("−1½ or ５ m²")
        '-1 1/2 or 5 m^2'
    """
    text = re.sub(
        f"[{_SUPERSCRIPTS}]+",
        lambda match: "^" + "".join(str(_SUPERSCRIPTS.index(digit)) for digit in match[0]),
        text.translate(_CHARACTERS),
    )
    text = "".join(map(_plain_character, text)) if not text.isascii() else text
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    # -(1/3) is written with brackets, and "negative 3" is a sign
    text = re.sub(r"-\s?\(\s*([0-9][0-9./,]*)\s*\)", r"-\1", text)
    return re.sub(r"(?i)\bnegative\s+(?=[$0-9.])", "-", text)


def _plain_character(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    # ½ is one half, and 1½ is 1 1/2 and not 11/2
    decomposition = unicodedata.decomposition(character)
    if decomposition.startswith("<fraction>"):
        return " " + "".join(chr(int(code, 16)) for code in decomposition.split()[1:]).replace(
            "\u2044", "/"
        )
    return character


# -------------------------------------------------------------- the pattern

# Thousands first: of 1,234 the digits alone would be 1 and 234. "2,3" is no number but two.
_DIGITS: Final = r"(?:[1-9][0-9]{0,2}(?:[,\u00a0][0-9]{3})+(?![,\u00a0]?[0-9])|[0-9]+)"
_NUMBER: Final = (
    rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![\w.])|\s*[×x*]\s*10\s?\^\s?[-+]?[0-9]{1,3})?"
)
_CURRENCY: Final = r"(?:[$€£¥₹]\s?)?"
# A minus after a number or a word subtracts or joins. One with a space behind it is a sign only
# where nothing can be subtracted from.
_SIGN: Final = r"(?:(?<![\w)\]}%.,^])-|(?:\A|(?<=[=(])|(?<=[=(]\s))-\s)"
_QUANTITY: Final = re.compile(
    rf"{_CURRENCY}(?P<sign>{_SIGN})?{_CURRENCY}(?<![A-Za-z_^])(?:(?<![0-9.])|(?<![0-9])(?=[0-9]))"
    rf"(?:(?P<integer>[0-9]+)(?:[ ]+|-|[ ]+and[ ]+)(?P<fraction>[0-9]+/[0-9]+)(?![0-9]*\s?/)"
    rf"|(?P<first>{_NUMBER})(?P<others>(?:(?:[:/^-]|\s:\s|\s/\s){_NUMBER})*))"
    r"(?:\s?\(?(?P<half>[aApP])\.?\s?[mM]\b\.?\)?)?"
)
_JOINT: Final = re.compile(rf"\s?([:/^-])\s?({_NUMBER})")
# A bracket with a word behind a number, but not (a.m.).
_UNIT: Final = re.compile(
    r"(?<=[0-9])\s*\((?=[^()]*[A-Za-z])(?!\s*[ap]\.?\s?m\.?\s*\))[^()]*\)", re.IGNORECASE
)
_LISTED: Final = re.compile(r"\s*(?:[;,&]|,?\s*\band\b)\s*")


def read(text: str) -> list[Quantity]:
    """Return the quantities of a text, in their order. Units in brackets are passed over.

    Example:
        >>> [quantity.parts for quantity in read("1,000 (apples), 1 1/2 or −3")]
        [(Fraction(1000, 1),), (Fraction(3, 2),), (Fraction(-3, 1),)]
        >>> read("3:30 p.m.")
        [Quantity(separator=':', parts=(Fraction(3, 1), Fraction(30, 1)), half='p')]
    """
    return [_quantity(match) for match in _QUANTITY.finditer(_normalize(text))]


def _normalize(text: str) -> str:
    """Return a text with numbers in ASCII and without units in brackets."""
    # Characters first: the pattern of units knows ASCII alone.
    return _UNIT.sub("", _plain(text)).strip()


def _quantity(match: re.Match[str]) -> Quantity:
    sign = -1 if match["sign"] else 1
    half = (match["half"] or "").lower()
    if match["integer"]:
        upper, lower = match["fraction"].split("/")
        fraction = _divide(_value(upper), _value(lower))
        integer = _value(match["integer"])
        # Too long a number, or a division by zero: compared as it is written.
        if isinstance(fraction, str) or isinstance(integer, str):
            return Quantity("", (f"{'-' * (sign < 0)}{match[0]}",), half)
        return Quantity("", (sign * (integer + fraction),), half)
    joints = _JOINT.findall(match["others"])
    parts = [_value(match["first"]), *(_value(number) for _, number in joints)]
    separator = "".join(sorted({joint for joint, _ in joints}))
    if separator == "/" and len(parts) == 2:
        parts, separator = [_divide(*parts)], ""
    elif separator == "^" and len(parts) == 2:
        parts, separator = [_power(*parts)], ""
    # Minutes and seconds have two digits below 60, so 3:4 is a ratio. 3:45 may be either, and is
    # compared as it is written.
    elif separator == ":" and not all(re.fullmatch("[0-5][0-9]", part) for _, part in joints):
        separator = "to"
    first = parts[0]
    parts[0] = sign * first if isinstance(first, Fraction) else f"{'-' * (sign < 0)}{first}"
    return Quantity(separator, tuple(parts), half)


def _value(text: str) -> Value:
    text = re.sub(r"[,\u00a0\s{}]", "", text)
    text = re.sub(r"[×x*]10\^", "e", text)
    return Fraction(text) if len(text) <= _LONGEST else text


def _divide(upper: Value, lower: Value) -> Value:
    if isinstance(upper, str) or isinstance(lower, str) or not lower:
        return f"{upper}/{lower}"
    return upper / lower


def _power(base: Value, exponent: Value) -> Value:
    # bounded: a power of a few characters can have more digits than there is memory
    if isinstance(base, str) or isinstance(exponent, str) or exponent not in range(100):
        return f"{base}^{exponent}"
    return Fraction(base ** int(exponent))


# -------------------------------------------------------------- comparison


def equal(first: Quantity, second: Quantity) -> bool:
    """Return whether two quantities are the same: of one kind, with the same numbers.

    A ratio is compared as it is written, because 12:30 is not 2:5. Where one of two times says a.m.
    or p.m. and the other does not, the other may also be one of 24 hours.

    Example:
        >>> half, ratio, time = read("0.5")[0], read("1:2")[0], read("3:30 pm")[0]
        >>> equal(half, read("1/2")[0]), equal(half, ratio), equal(time, read("15:30")[0])
        (True, False, True)
    """
    if first.half or second.half:
        return bool(_clock(first) & _clock(second)) and not (
            first.half and second.half and first.half != second.half
        )
    return (
        first.separator == second.separator
        and len(first.parts) == len(second.parts)
        and all(map(_close, first.parts, second.parts))
    )


def _close(first: Value, second: Value) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    # Numbers in data sets are rounded, as floats or by hand. Relative below 1: 1e-7 is not 0.
    return abs(first - second) <= _TOLERANCE * min(Fraction(1), abs(second))


def _clock(quantity: Quantity) -> set[tuple[Value, ...]]:
    """Return the hours, minutes and seconds that a quantity may be."""
    # without a separator it is a full hour: 3 p.m.
    if quantity.separator not in ("", ":") or len(quantity.parts) > 3:
        return set()
    hour, *rest = quantity.parts
    rest += [Fraction(0)] * (3 - len(quantity.parts))
    times = {(hour, *rest)}
    if quantity.half and isinstance(hour, Fraction):
        # Both readings: 15:30 p.m. is written, too. 12 a.m. is 0, and 12 p.m. is 12.
        times |= {(hour % 12 + 12 * (quantity.half == "p"), *rest)}
    return times


# What may stand before the number of a reference, in this order.
_ANNOUNCEMENTS: Final = [
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"\b[a-z]\s?=\s?",
        r"^.*(?:=|####|≈)\s*",
        r"^[^0-9:]*:\s*(?=[-$(0-9.])",
        r"^[^0-9]*\b(?:is|are|was|were|equals|has|have|had|costs?)\s+(?=[-$(0-9.])",
        r"^(?:the|about|approximately|roughly|~|usd|eur|gbp|inr|rs\.?|us)\s*(?=[$0-9])",
        # a formula: $5$ is no price
        r"^\$(?=[^$]*\$$)|(?<=[0-9}])\$$|^\\boxed\{(?=[^{}]*\}$)|^\\\(|\\\)$",
    )
]


def numeric(reference: str) -> list[Quantity]:
    """Return the quantities of a reference that begins with one; of words an empty list.

    What stands behind a number is its unit: `9 apples`, `6th`. A number behind words belongs to
    them: `Vendor 2`.

    Example:
        >>> len(numeric("9; 11 (cm)")), numeric("Vendor 2"), len(numeric("The 60th caller."))
        (2, [], 1)
    """
    # All of them in turn: several may stand before one number, as in `x = about $5`.
    for pattern in _ANNOUNCEMENTS:
        reference = pattern.sub("", reference.strip())
    reference = re.sub(r"^([0-9.]+)\s+to\s+([0-9.]+)$", r"\1:\2", reference)
    text = _normalize(reference)
    matches = list(_QUANTITY.finditer(text))
    if not matches or text[: matches[0].start()].strip("(+ "):
        return []
    return [_quantity(match) for match in matches]


def ends_with(answer: str, expected: list[Quantity]) -> bool:
    """Return whether the last quantities of an answer are the expected ones, in their order.

    A list that is longer than expected is another answer: `9; 11; 13` is not 13.

    Example:
        >>> ends_with("so 8 - 3 = 5 apples", numeric("5")), ends_with("2,3", numeric("23"))
        (True, False)
        >>> ends_with("Ana is 17 and Jack is 12.", numeric("17 (years old); 12 (years old)"))
        True
    """
    text = _normalize(answer)
    # "3 to 4" is a ratio where a ratio is asked for
    if len(expected) == 1 and expected[0].separator in ("to", ":"):
        text = re.sub(r"(?<=[0-9])\s+to\s+(?=[0-9])", ":", text)
    matches = list(_QUANTITY.finditer(text))
    last, rest = matches[-len(expected) :], matches[: -len(expected)]
    if rest and _LISTED.fullmatch(text[rest[-1].end() : last[0].start()]):
        return False
    return len(last) == len(expected) and all(
        equal(_quantity(match), quantity) for match, quantity in zip(last, expected, strict=True)
    )


# -------------------------------------------------------------- words


def same_words(answer: str, reference: str) -> bool:
    """Return whether an answer says what a reference without a number does.

    That is the answer, its last line, or what follows the last `answer is`, colon or `\\boxed`, but
    for case, articles and punctuation. Of `Yes` and `No` it is the first word of these.

    Example:
        >>> same_words("So the answer is Mrs. Hilt.", "Mrs. Hilt")
        True
        >>> same_words("Yes, she has enough.", "Yes"), same_words("Purple or red", "Red")
        (True, False)
    """
    lines = answer.strip().splitlines() or [""]
    announced = re.split(r"(?i)\banswer\s+is\b|####|:\s|\\boxed\{", answer)[-1]
    expected = _words(reference)
    # The least is cut first: a reference may hold a colon, or several lines.
    for text in (answer, lines[-1], announced):
        words = _words(text)
        if words == expected or (expected in (["yes"], ["no"]) and words[:1] == expected):
            return True
    return False


def _words(text: str) -> list[str]:
    words = re.findall(r"\w+(?:['’]\w+)*", text.casefold().replace("’", "'"))
    return [word for word in words if word not in ("the", "a", "an")]
