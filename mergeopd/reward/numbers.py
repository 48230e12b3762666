"""Parse the final number of a response, as in GSM8K (arXiv:2110.14168) and MATH (arXiv:2103.03874)."""

from __future__ import annotations

import re
from fractions import Fraction

from mergeopd.reward.expression import MAX_LENGTH, MINUS, MULTIPLIERS, read_number

# Every alternative starts at a digit or dot that is not part of another number, so the search is linear in
# the text's length. A sign counts only if no letter, digit or bracket precedes it: 10-5 does not contain -5.
_NUMBER = re.compile(
    rf"""
    (?:(?<![A-Za-z0-9_)\]}}])[-+{MINUS[1:]}])?
    (?:[$€£¥]\s?[-+{MINUS[1:]}]?)?
    (?<![A-Za-z0-9_])(?<!\d\.)
    (?:
        (?:\d{{1,3}}[ ])?
        (?<!\d/)(?:\d{{1,3}}(?:,\d{{3}})+|\d+)[ ]?/[ ]?\d+(?![\d/]|[.,]\d)
      | (?:\d{{1,3}}(?:\.\d{{3}}){{2,}}(?!\d)|(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?)
        (?:[eE][-+]?\d{{1,4}}(?!\w))?
      | (?<!\.)\.\d+
      | [\u00bc-\u00be\u2150-\u215e]
    )
    """,
    re.VERBOSE,
)
_HASHES = re.compile(r"#{4,}")
_ANSWER = re.compile(r"answer(?:[ ]is|[ ]?[:=])[ \t*:]*", re.IGNORECASE)
_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{")
_MATH = re.compile(
    r"\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]|(?<![\\$])\$(?![\s$])([^$]{1,300})(?<![\s\\])\$(?!\d)"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*([-\d,]{1,40})\s*\}\s*\{\s*(\d{1,40})\s*\}")

# Number of marks that are tried, from the last one.
_MAX_MARKS = 8

# Text around a number that makes it a part of something else: an operand, root, power, time, date or list.
_CONTEXT = 24
_BEFORE = re.compile(
    rf"""(?:
        [\w)\]}}][ \t]*[+*\u00d7·÷/^][ \t]*
      | [\d)\]}}][ \t]+[{MINUS}][ \t]+
      | (?<![A-Za-z])[A-Za-z][ \t]*[{MINUS}][ \t]*
      | \d[:,] | \d[_ \u00a0\u202f](?=\d{{3}}(?!\d))
      | [√±≤≥^_{{π] | \\(?:times|cdot|pm|sqrt|div|leq?|geq?|pi|log|ln)[ ]?
      | \bdollars[ ]and[ ]
    )$""",
    re.VERBOSE,
)
_BEHIND = re.compile(
    rf"""
        [ \t]*(?:[\^√π²³⁴-⁹±°]|\\(?:sqrt|pi|times|cdot|pm|overline|[dtc]?frac|begin)|_\d)
      | [ \t]*[*\u00d7·÷/][ \t]*(?:\d|\(|\\|[a-z](?![A-Za-z])) | [ \t]*\+[ \t]*(?:\d|\(|\\|[a-z](?![A-Za-z]))
      | [ \t]*[{MINUS}][ \t]*[a-z](?![A-Za-z])
      | [.,:]\d | \.?[inxyz](?![A-Za-z]) | [ \t]+(?:{MULTIPLIERS})\b
    """,
    re.VERBOSE,
)
_BULLET = re.compile(r"\s*[-*] ")
_OPEN_TUPLE = re.compile(r"[(\[{][^()\[\]{}]*,\s*$")
_FRACTION_OF_DIFFERENCE = re.compile(rf"\d[{MINUS}]$")
_NEGATED = re.compile(r"\b(?:negative|minus)[ ]$", re.IGNORECASE)


def final_number(text: str, *, truncated: bool = False) -> Fraction | None:
    r"""Return the number that a response gives as its answer, or None.

    That is, in this order: the number after the last `####`; the content of the last `\boxed{...}`, which
    must be one number (`read_number`); the number after the last "answer is" or "answer:"; the last number of
    the text, unless it is part of an expression, a time or a list. Text up to `</think>` is not the answer.

    A response that was `truncated` by the length limit has a number only where it is marked by a complete
    `####` line or box: the last number of unfinished reasoning is not an answer.
    """
    # Reasoning without an end has no answer.
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    marked = _after_hashes(text, truncated)
    if marked is not None:
        return marked[0]
    boxed = last_boxed(text)
    if boxed is not None or truncated:
        return read_number(boxed or "")
    whole = None if _BULLET.match(text) else read_number(text.strip())
    if whole is not None:
        return whole
    for mark in reversed(list(_ANSWER.finditer(text))[-_MAX_MARKS:]):
        number = _at(text, mark.end())
        if number is not None:
            return number[0]
    return _last(text)


def reference_number(text: str) -> Fraction | None:
    r"""Return the value of a reference, or None where it is not one number.

    A reference is one number as a whole, or marks one with `####` or `\boxed{...}`. The last number of a
    sentence does not count: a reference `2\sqrt{3}` would otherwise reward every response that ends in 3.
    """
    text = text.strip()
    whole = read_number(text)
    return final_number(f"{text}\n", truncated=True) if whole is None else whole


def _after_hashes(text: str, truncated: bool) -> tuple[Fraction | None] | None:
    """Return the value after the last `####` with a number, in a tuple; None if there is no such mark."""
    for mark in reversed(list(_HASHES.finditer(text))[-_MAX_MARKS:]):
        # The last line of a truncated text may have the first digits of a number only.
        if not truncated or "\n" in text[mark.end() :]:
            number = _at(text, mark.end())
            if number is not None:
                return number
    return None


def _at(text: str, start: int) -> tuple[Fraction | None] | None:
    """Return the number that begins at `start`, in a tuple with None for an expression; None without one."""
    stop = text.find("\n", start)
    line = text[start : min(len(text) if stop < 0 else stop, start + MAX_LENGTH)]
    line = line.lstrip(" \t").rstrip(" \t*")
    whole = read_number(line)
    if whole is not None:
        return (whole,)
    segment = _MATH.match(line)
    if segment is not None:
        return (read_number(segment[segment.lastindex or 0]),)
    plain = _plain(line)
    match = _NUMBER.match(plain)
    return None if match is None else (_in_context(plain, match),)


def last_boxed(text: str) -> str | None:
    """Return the content of the last box that is closed and not empty; "" if there are only others."""
    starts = [match.end() for match in _BOXED.finditer(text)]
    for start in reversed(starts[-_MAX_MARKS:]):
        depth = 1
        for position in range(start, min(len(text), start + MAX_LENGTH)):
            depth += (text[position] == "{") - (text[position] == "}")
            if depth == 0:
                if text[start:position].strip():
                    return text[start:position]
                break
    return "" if starts else None


def _last(text: str) -> Fraction | None:
    """Return the last number of a text; None if it is part of an expression."""
    digit = max((match.end() for match in re.finditer(r"\d(?=\D*\Z)", text[-MAX_LENGTH:])), default=0)
    place = max(0, len(text) - MAX_LENGTH) + digit
    for segment in _MATH.finditer(text, max(0, place - 400)) if digit else ():
        if segment.start() < place <= segment.end():
            return read_number(segment[segment.lastindex or 0])
    plain = _plain(text)
    match = None
    for match in _NUMBER.finditer(plain):  # noqa: B007  only the last one is used
        pass
    return None if match is None else _in_context(plain, match)


def _plain(text: str) -> str:
    r"""Convert LaTeX spellings to plain ones: `1{,}234`, `1\,234`, `\$5`, `5\%`, `\frac{1}{2}`."""
    if "\\" not in text and "{,}" not in text:
        return text
    text = text.replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%")
    text = re.sub(r"(?<=\d)\\[,!;:](?=\d{3})", "", text)
    text = re.sub(r"\\[,!;: ]", " ", text)
    # A digit before \frac makes a mixed number, which needs its blank.
    text = re.sub(r"(?<=\d)(?=\\[dtc]?frac)", " ", text)
    return _FRACTION.sub(r"\1/\2", text)


def _in_context(text: str, match: re.Match[str]) -> Fraction | None:
    """Return the value of a number in a text; None if the text around it changes the value."""
    start, end = match.span()
    # `_BEFORE` ends with `$`, so it is matched against the text before the number alone.
    before = text[max(0, start - _CONTEXT) : start]
    written = match[0].lstrip(f"+{MINUS}$€£¥ ")
    if (
        _BEFORE.search(before)
        or _BEHIND.match(text, end)
        or ("/" in written and _FRACTION_OF_DIFFERENCE.search(before))
        or (text[end : end + 1] in (")", "]", "}") and _OPEN_TUPLE.search(before))
    ):
        return None
    value = read_number(match[0])
    return -value if value is not None and value > 0 and _NEGATED.search(before) else value
