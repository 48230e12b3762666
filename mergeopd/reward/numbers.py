"""The final number of a text, exactly, as GSM8K-style answers write it (arXiv:2110.14168)."""

from __future__ import annotations

import re
from fractions import Fraction

# Longer ones are refused by Python's own int() and are no answer to anything.
_MAX_DIGITS = 1000

# Every alternative starts at a digit or dot that no other number reaches into, so the search is linear in
# the text's length. Signs count only where no letter, digit or bracket stands before them: 10-5 is no -5.
_NUMBER = re.compile(
    r"""
    (?:(?<![A-Za-z0-9_)\]}])(?P<sign>[-+\u2212]))?
    (?:[$€£¥]\s?(?P<inner_sign>[-+\u2212])?)?
    (?<![A-Za-z0-9_])(?<!\d\.)
    (?:
        (?:(?P<whole>\d{1,6})[ ])?
        (?<!\d/)(?P<numerator>\d{1,3}(?:,\d{3})+|\d+)/(?P<denominator>\d+)(?![\d/]|[.,]\d)
      | (?P<integer>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<decimals>\.\d+)?(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?
      | (?P<bare>(?<!\.)\.\d+)
    )
    """,
    re.VERBOSE,
)
_MARKED = re.compile(r"####[ \t]*")
_BOXED = re.compile(r"\\boxed\s*\{")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([\d,]{1,40})\s*\}\s*\{\s*(\d{1,40})\s*\}")
_LATEX_SPACES = re.compile(r"\\[,!;: ]")


def final_number(text: str) -> Fraction | None:
    r"""The number right after the last `####`, else in the last `\boxed{...}`, else the last one at all.

    Understands signs, thousands separators, `$` and `%` (which do not change the value), decimals,
    exponents, `a/b`, `1 1/2` and `\frac{a}{b}`. None when there is no number.
    """
    plain = _plain(text)
    for mark in reversed(list(_MARKED.finditer(plain))):
        match = _NUMBER.match(plain, mark.end())
        if match is not None:
            return _value(match)
    boxed = _last_boxed(plain)
    if boxed is not None:
        value = _last(boxed)
        if value is not None:
            return value
    return _last(plain)


def _plain(text: str) -> str:
    r"""LaTeX spellings as plain ones: `1{,}234`, `1\,234`, `\$5`, `5\%`, `\frac{1}{2}`."""
    if "\\" not in text and "{,}" not in text:
        return text
    text = text.replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%")
    text = re.sub(r"(?<=\d)\\[,!;:](?=\d{3})", "", text)
    text = _LATEX_SPACES.sub(" ", text)
    # A digit before \frac makes a mixed number, which needs its blank.
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)
    return _FRACTION.sub(r"\1/\2", text)


def _last_boxed(text: str) -> str | None:
    """What is inside the last box, up to its own closing brace; None when there is none or it is open."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    for position in range(starts[-1], len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[starts[-1] : position]
    return None


def _last(text: str) -> Fraction | None:
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007  only the last one is wanted
        pass
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    """None for a division by zero and for absurdly long numbers."""
    if match.end() - match.start() > _MAX_DIGITS:
        return None
    part = {name: (text or "").replace(",", "") for name, text in match.groupdict().items()}
    if part["denominator"]:
        if int(part["denominator"]) == 0:
            return None
        value = Fraction(int(part["numerator"]), int(part["denominator"])) + int(part["whole"] or 0)
    elif part["bare"]:
        value = Fraction("0" + part["bare"])
    else:
        value = Fraction(part["integer"] + part["decimals"] + part["exponent"])
    minus = {"-", "\u2212"}
    return -value if (part["sign"] in minus) != (part["inner_sign"] in minus) else value
