r"""Parse a short text as one rational number: `3`, `-\frac{3}{4}`, `12\text{ cm}^2`, `x = 5\times10^3`."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 1000
_MAX_BITS = 4096
_MAX_DEPTH = 20
MAX_EXPONENT = 308
"""As in `1e308`; larger ones are refused, because comparing their digits would take minutes."""
MAX_FACTORIAL = 100

MINUS = "-\u2212\u2013"
"""Hyphen, minus sign and en dash."""
MULTIPLIERS = "million|billion|trillion|thousand|hundred|dozen"
_UNIT, _OTHER = "\x00", "\x01"

# Words that change a value, or join two.
_NO_UNIT = re.compile(
    rf"\b(?:{MULTIPLIERS}|and|or|plus|minus|times|over|sqrt|root|squared|cubed|pi|to)\b", re.IGNORECASE
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}(?:\s*\^\s*(?:\d|\{\d\}))?"
)
_IGNORED = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|[()\[\]])|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°|\\?[$%]|[€£¥]"
)
_LEAD = re.compile(r"\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?", re.IGNORECASE)
_EQUALS = re.compile(r"=|≈|\\approx(?![A-Za-z])")
# In LaTeX, an argument without braces is one character: \frac12 is one half.
_BARE_ARGUMENTS = re.compile(r"\\[dtc]?frac\s*(\d)\s*(?:(\d)|(?=\{))")
_GROUPED = (r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", r"\d{1,3}(?:[ \u00a0\u202f]\d{3})+", r"\d{1,3}(?:\.\d{3}){2,}")
_TOKEN = re.compile(
    rf"""
    \s*(?:
    (?P<number>(?:{"|".join(_GROUPED)}|\d{{1,3}}(?:_\d{{3}})+|\d+(?:\.\d+)?|\.\d+)
        (?:[eE][-+]?\d{{1,4}}(?!\w))?(?![\d]|[.,_:]\d))
  | (?P<vulgar>[\u00bc-\u00be\u2150-\u215e])
  | (?P<frac>\\[dtc]?frac(?![A-Za-z]))
  | (?P<times>\\(?:times|cdot)(?![A-Za-z])|[\u00d7·*])
  | (?P<over>/|÷|\\div(?![A-Za-z]))
  | (?P<sign>[{MINUS}+])
  | (?P<other>[\^!(){{}}])
    )
    """,
    re.VERBOSE,
)
_SHORT_UNITS = "mm|cm|dm|km|m|mg|kg|g|ml|cl|l|L|ms|s|h|Hz|Pa|ft|in|yd|mi|lb|oz|am|pm|st|nd|rd|th"
_UNITS = re.compile(
    rf"(?:\s*(?:{_UNIT}|(?:[A-Za-z]{{3,}}|{_SHORT_UNITS})(?![A-Za-z])|/)(?:\s*\^\s*(?:\d|\{{\d\}})|[²³])?\.?)*\s*"
)


def read_number(text: str) -> Fraction | None:
    r"""Return the value of a text that is one number from end to end, else None.

    Accepts LaTeX and plain fractions, mixed numbers, thousands separators, integer powers, products and
    factorials of numbers, units, `$` and `%` (which do not change the value), and takes the right-hand side
    of `x = 5`. Roots, variables, constants, sums, tuples, intervals, sets and times are not one number.
    """
    if len(text) > MAX_LENGTH:
        return None
    *left, value = _EQUALS.split(_normalised(text))
    if any("," in part or ";" in part or _NO_UNIT.search(part) for part in left):
        return None  # x = 1, y = 2
    value, num_negations = re.subn(r"^\s*(?:negative|minus)\s+", "", value, flags=re.IGNORECASE)
    try:
        number = _Reader(value).read()
    except (_NotANumberError, ZeroDivisionError, OverflowError):
        return None
    return -number if num_negations else number


def _normalised(text: str) -> str:
    text = text.replace("{,}", ",")
    text = re.sub(r"(?<=\d)\\[,!;: ](?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[,!;: ]|~|\\q?quad(?![A-Za-z])", " ", text)
    text = _TEXT.sub(_text_replacement, text)
    text = _IGNORED.sub(" ", text)
    text = _BARE_ARGUMENTS.sub(_braced, text)
    return _LEAD.sub("", text, count=1).strip().rstrip(".,")


def _text_replacement(match: re.Match[str]) -> str:
    inner = match[1]
    if any(character.isdigit() for character in inner):
        return inner
    return _OTHER if _NO_UNIT.search(inner) else _UNIT


def _braced(match: re.Match[str]) -> str:
    return rf"\frac{{{match[1]}}}" + ("" if match[2] is None else f"{{{match[2]}}}")


class _NotANumberError(Exception):
    pass


@dataclass
class _Reader:
    """Recursive-descent parser of one expression."""

    text: str
    at: int = 0
    depth: int = 0

    def read(self) -> Fraction:
        while self.text.startswith((_UNIT, " "), self.at):
            self.at += 1
        value = self._signed()
        units = _UNITS.match(self.text, self.at)
        if units is None or units.end() != len(self.text) or _NO_UNIT.search(units[0]):
            raise _NotANumberError
        return value

    def _next(self, *kinds: str) -> str | None:
        """Consume the next token if it is of one of the kinds, or one of these characters."""
        match = _TOKEN.match(self.text, self.at)
        if match is None or match.lastgroup is None:
            return None
        token = match[match.lastgroup]
        if match.lastgroup not in kinds and token not in kinds:
            return None
        self.at = match.end()
        return token

    def _require(self, *kinds: str) -> str:
        token = self._next(*kinds)
        if token is None:
            raise _NotANumberError
        return token

    def _signed(self) -> Fraction:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _NotANumberError
        sign = self._next("sign")
        value = self._product()
        self.depth -= 1
        return -value if sign is not None and sign in MINUS else value

    def _product(self) -> Fraction:
        value = self._power()
        if value.denominator == 1 and 0 < value < 1000 and (fraction := self._fraction_behind()) is not None:
            return value + fraction
        if self._next("over"):
            return value / self._power()
        while self._next("times"):
            value = _bounded(value * self._power())
        return value

    def _fraction_behind(self) -> Fraction | None:
        """Parse the proper fraction of a mixed number."""
        before = self.at
        if (vulgar := self._next("vulgar")) is not None:
            return Fraction(unicodedata.numeric(vulgar)).limit_denominator(1000)
        if self._next("frac"):
            self.at = before
            return self._power()
        if (numerator := self._next("number")) is not None and numerator.isdigit() and self._next("over"):
            denominator = self._require("number")
            if denominator.isdigit():
                return Fraction(int(numerator), int(denominator))
        self.at = before
        return None

    def _power(self) -> Fraction:
        value = self._atom()
        if self._next("!"):
            if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
                raise _NotANumberError
            value = Fraction(math.factorial(value.numerator))
        if self._next("^"):
            exponent = self._argument("}") if self._next("{") else self._exponent()
            if exponent.denominator != 1 or abs(exponent) > _MAX_BITS:
                raise _NotANumberError
            size = max(value.numerator.bit_length(), value.denominator.bit_length())
            if size * abs(exponent) > _MAX_BITS:
                raise _NotANumberError
            value = Fraction(value**exponent.numerator)
        return value

    def _exponent(self) -> Fraction:
        sign = self._next("sign")
        value = _value(self._require("number"))
        return -value if sign is not None and sign in MINUS else value

    def _atom(self) -> Fraction:
        if (number := self._next("number")) is not None:
            return _value(number)
        if (vulgar := self._next("vulgar")) is not None:
            return Fraction(unicodedata.numeric(vulgar)).limit_denominator(1000)
        if self._next("frac"):
            self._require("{")
            numerator = self._argument("}")
            if self._next("{"):
                return numerator / self._argument("}")
            digit = self._require("number")
            if len(digit) != 1:
                raise _NotANumberError
            return numerator / int(digit)
        return self._argument(")" if self._require("(", "{") == "(" else "}")

    def _argument(self, closing: str) -> Fraction:
        value = self._signed()
        self._require(closing)
        return value


def _value(number: str) -> Fraction:
    plain = re.sub(r"[,_ \u00a0\u202f]", "", number)
    if plain.count(".") > 1:
        plain = plain.replace(".", "")
    mantissa, _, exponent = plain.lower().partition("e")
    if exponent and abs(int(exponent)) > MAX_EXPONENT:
        raise _NotANumberError
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _NotANumberError
    return value
