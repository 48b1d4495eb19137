"""Numbers in texts: ratios, times, fractions, lists and units beside plain numbers.

References of word problems look like `9 (apples)`, `3:4`, `12:30`, `1/6`, `-(1/3)`, `3:30 p.m.`,
`17 (years old); 12 (years old)`, `6th`, and also `Yes` or `Mrs. Hilt`.
"""

import math
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
            `-` of ranges, `×` of products and sizes (`2x3`), empty of one number. A fraction or a
            power is one number.
        parts: the numbers.
        half: `a` or `p` of a time with a.m. or p.m., else empty.
    """

    separator: str
    parts: tuple[Value, ...]
    half: str = ""


# -------------------------------------------------------------- characters

_CHARACTERS: Final = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-")  # minus signs and hyphens
    | dict.fromkeys("\u2044\u2215\uff0f\u00f7", "/")
    | dict.fromkeys("\u2236\uff1a", ":")
    | dict.fromkeys("\uff0c\u066c", ",")
    | dict.fromkeys("\uff0e\u066b", ".")
    | {"\uff1b": ";", "\uff05": "%", "\uff01": "!"}
    | dict.fromkeys("\u2019\u02bc\uff07", "'")
    | dict.fromkeys("\u22c5\u00b7\u2219\u2715\u2a2f", "×")
    | dict.fromkeys("\u2007\u2009\u202f\u00a0", "\u00a0")
)
_SUPERSCRIPTS: Final = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_CURRENCY: Final = r"(?:[$€£¥₹]\s?)?"
_OPERAND: Final = r"√?[0-9][0-9.,]*!?"
_LATEX: Final = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\{,\}|,\\!", ","),
        (r"\\!", ""),
        (r"\\[,;: ]", "\u00a0"),
        (r"\\times|\\cdot", "×"),
        (r"\\div\b", "/"),
        (r"(?i)\\sqrt\s*\[3\]|\bcube root of\s|\bcbrt\b", "∛"),
        (r"(?i)\\sqrt(?!\s*\[)|\bsquare root of\s|\bsqrt\b", "√"),
        (r"([√∛∜])\s*(?:\{\s*([0-9.,]+)\s*\}|\(\s*([0-9.,]+)\s*\)|(?=[0-9]))", r"\1\2\3"),
        # two signs cancel: -\frac{-1}{2}
        (r"-\s*(\\[dtc]?frac\s*\{\s*)-(?=[0-9])", r"+\1"),
        (rf"\\[dtc]?frac\s*\{{\s*(-?{_OPERAND})\s*\}}\s*\{{\s*(-?{_OPERAND})\s*\}}", r" \1/\2"),
        (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r" \1/\2"),
        (r"(?<![\w)])\((-?[0-9][0-9.,]*)\)(?=\s?/)", r"\1"),
        (r"(?<=[0-9])\s?/\s?\((-?[0-9][0-9.,]*)\)", r"/\1"),
        (r"(?<=[0-9])(?:\*\*|[ ]\*\*[ ])(?=-?[0-9])", "^"),
        (r"([\^_])(?:\{([-+]?[0-9]+)\}|\(([-+]?[0-9]+)\))", r"\1\2\3"),
        (rf"(?<=[0-9!])[ ]?[×*xX][ ]?{_CURRENCY}(?=[0-9√∛∜])", "×"),
        (r"(?<=[0-9])[ ]?(?=[√∛∜])", "×"),
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
        "[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+",
        lambda match: "^" + match[0].translate(_SUPERSCRIPTS),
        text.translate(_CHARACTERS),
    )
    # Patterns with several spaces take quadratic time where a model repeats them.
    text = re.sub("[ ]{2,}", " ", text)
    text = "".join(map(_plain_character, text)) if not text.isascii() else text
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _GROUPED.sub(lambda match: match[0].replace(match["separator"], ","), text)
    text = _SPACED.sub(_join_thousands, text.replace("\u00a0", " "))
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


# -------------------------------------------------------------- thousands

# What separates thousands is made a comma, of which the pattern of numbers then decides.
_GROUPED: Final = re.compile(
    r"(?<![\w.,'])[1-9][0-9]{0,2}(?P<separator>['_\u00a0])[0-9]{3}(?:(?P=separator)[0-9]{3})*"
    r"(?!(?P=separator)?[0-9])"
)
_SPACED: Final = re.compile(
    r"(?<![\w.,'^/])(?<![0-9][ ])([1-9][0-9]{0,2})((?:[ ][0-9]{3})+)(?![0-9]|[ ]?[/:]?[ ]?[0-9])"
)
_BEFORE_A_NUMBER: Final = re.compile(
    r"(?:^|[^\w\s,]|\b(?:is|are|was|were|equals|has|have|had|costs?|makes?|of|about|total))\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)


def _join_thousands(match: re.Match[str]) -> str:
    # No number of a list begins with 0. Without one, "100 200" is a list and "day 1 200 people"
    # two numbers.
    head, groups = match[1], match[2]
    before = match.string[max(0, match.start() - 20) : match.start()]
    if " 0" in groups or (len(head) < 3 and _BEFORE_A_NUMBER.search(before)):
        return head + groups.replace(" ", ",")
    return match[0]


# -------------------------------------------------------------- the pattern

# Thousands first: of 1,234 the digits alone would be 1 and 234. "2,3" is no number but two.
_DIGITS: Final = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])|[0-9]+)"
_NUMBER: Final = (
    rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![\w.])|\s*[×x*]\s*10\s?\^\s?[-+]?[0-9]{1,3})?"
)
_TERM: Final = rf"[√∛∜]?{_NUMBER}(?:!+(?!=))?"
_SCALES: Final = {
    "hundred": 10**2,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}
_SUFFIXES: Final = {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}
# 5k is 5,000. 5M may be 5 m and 300K a temperature, but $5M is five million.
_SCALE: Final = (
    r"(?:(?P<scale>(?:(?:[ -]|\\(?:text|mbox|mathrm)\{\s?)?"
    rf"(?i:{'|'.join(_SCALES)})s?\b\}}?){{1,3}})"
    r"|(?P<suffix>k\b|(?(price)(?:[KMB]|[mb]n)\b|(?!))))?"
)
# A minus after a number or a word subtracts or joins. One with a space behind it is a sign only
# where nothing can be subtracted from.
_SIGN: Final = r"(?:(?<![\w)\]}%.,^])-|(?:\A|(?<=[=(])|(?<=[=(]\s))-\s)"
_QUANTITY: Final = re.compile(
    rf"(?P<price>[$€£¥₹]\s?)?(?P<sign>{_SIGN})?{_CURRENCY}(?<![A-Za-z_^√∛∜])(?<!\^[-+])"
    r"(?:(?<![0-9.])|(?<![0-9])(?=[0-9]))"
    rf"(?:(?P<integer>[0-9]+)(?:[ ]+|-|[ ]+and[ ]+)(?P<fraction>[0-9]+/[0-9]+)(?![0-9]*\s?/)"
    rf"|(?P<first>{_TERM})(?P<others>(?:(?:[:×-]|[/^][-+]?|\s:\s|\s/\s){_TERM})*)){_SCALE}"
    r"(?:\s?\(?(?P<half>[aApP])\.?\s?[mM]\b\.?\)?)?"
)
_JOINT: Final = re.compile(rf"\s?([:/^×-])\s?([-+]?{_TERM})")
# A bracket with a word behind a number, but not (a.m.).
_UNIT: Final = re.compile(
    r"(?<=[0-9])\s*\((?=[^()]*[A-Za-z])(?!\s*[ap]\.?\s?m\.?\s*\))[^()]*\)", re.IGNORECASE
)
# The working behind a number: 7 (5 + 2). With another value it may be a factor.
_OPERATED: Final = rf"{_CURRENCY}[0-9]{{1,15}}(?:\.[0-9]{{1,15}})?"
_EXPRESSION: Final = rf"\(({_OPERATED}(?:\s?[-+×/]\s?{_OPERATED}){{1,9}})\)"
_WORKING: Final = re.compile(rf"(?<![\w.,/^])([0-9][0-9,.]{{0,20}})[ ]{_EXPRESSION}")
# "The answer is 5!" and "5! Well done" are no factorials, but 5! and = 5! are.
_EXCLAMATION: Final = re.compile(
    r"((?:[A-Za-z.:!?][ ]\**[-$€£¥₹]*|[$€£¥₹]\s?)[0-9][0-9.,]*)!+(?=\s|\Z|\*)"
    r"|([0-9])!+(?=\s+[A-Z])"
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
    """Return a text with numbers in ASCII, without units and working in brackets."""
    # Characters first: the pattern of units knows ASCII alone.
    text = _UNIT.sub("", _plain(text)).strip()
    text = re.sub(f"√{_EXPRESSION}", _root_of_sum, text)
    return _WORKING.sub(_without_working, _EXCLAMATION.sub(r"\1\2", text))


def _root_of_sum(match: re.Match[str]) -> str:
    # √25/2 would be the half of √25
    value = _evaluate(match[1])
    return match[0] if isinstance(value, str) or value.denominator > 1 else f"√{value}"


def _without_working(match: re.Match[str]) -> str:
    number = _value(match[1].rstrip(".,"))
    return match[1] if number == _evaluate(match[2]) else match[0]


def _evaluate(text: str) -> Value:
    """Return the value of a sum of products, or the text of a division by zero.

    Example:
        >>> _evaluate("$5 + 2×3 - 4/2")
        Fraction(9, 1)
    """
    total = Fraction(0)
    for sign, product in re.findall(r"([-+]?)([^-+]+)", re.sub(r"[\s$€£¥₹]", "", text)):
        value = Fraction(1)
        for operator, number in re.findall(r"([×/]?)([^×/]+)", product):
            if operator == "/" and not Fraction(number):
                return text
            value *= Fraction(number) ** (-1 if operator == "/" else 1)
        total += -value if sign == "-" else value
    return total


def _quantity(match: re.Match[str]) -> Quantity:
    quantity = _unscaled(match)
    names = re.findall("|".join(_SCALES), (match["scale"] or "").lower())
    factor = math.prod(_SCALES[name] for name in names)
    if match["suffix"]:
        names, factor = [match["suffix"]], _SUFFIXES[match["suffix"].lower()]
    # What stays text is compared as it is written.
    parts = tuple(
        part * factor if isinstance(part, Fraction) else " ".join([part, *names])
        for part in quantity.parts
    )
    return quantity._replace(parts=parts)


def _unscaled(match: re.Match[str]) -> Quantity:
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
    text = re.sub(r"[,\s{}]", "", text)
    text = re.sub(r"[×x*]10\^", "e", text)
    if len(text) > _LONGEST:
        return text
    value = Fraction(text.strip("√∛∜!+-")) * (-1 if text.startswith("-") else 1)
    root, factorials = re.search("[√∛∜]", text), text.count("!")
    if factorials:
        # Bounded as powers are. √ of a factorial and n!! stay text.
        if root or factorials > 1 or value not in range(101):
            return text
        return Fraction(math.factorial(int(value)))
    if root:
        sign, value = (-1 if value < 0 else 1), abs(value)
        square_root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        return sign * square_root if root[0] == "√" and square_root**2 == value else text
    return value


def _divide(upper: Value, lower: Value) -> Value:
    if isinstance(upper, str) or isinstance(lower, str) or not lower:
        return f"{upper}/{lower}"
    return upper / lower


def _power(base: Value, exponent: Value) -> Value:
    # bounded: a power of a few characters can have more digits than there is memory
    if isinstance(base, str) or isinstance(exponent, str) or exponent not in range(-99, 100):
        return f"{base}^{exponent}"
    if not base and exponent < 0:
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
