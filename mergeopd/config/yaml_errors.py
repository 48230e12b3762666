"""Explain the YAML library's syntax errors in plain words, at the line of the mistake."""

from __future__ import annotations

import re

from ruamel.yaml.error import MarkedYAMLError, StringMark

_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_GLUED = re.compile(r"\s*([\w.-]+):\S")
_QUOTE = 'quote the value: "..."'


Mistake = tuple[StringMark | None, str, str]
"""Location (None if it is unknown), cause and remedy."""


def syntax_mistake(error: MarkedYAMLError, text: str) -> Mistake:
    """Describe the error that the YAML library raised for `text`.

    If the library detects an error in a later line, the location is that of the enclosing construct.
    """
    problem, context = str(error.problem), str(error.context)
    here, start = error.problem_mark, error.context_mark
    if ("flow mapping" in context or "flow sequence" in context) and start is not None:
        if "${" in _line(text, here):
            return here, *_other(problem, _line(text, here))
        return _unclosed(context, problem, here, start)
    if "quoted scalar" in context and "end of stream" in problem:
        return start, "a quote is opened here and not closed", "close it, or quote the whole value"
    if "unknown escape character" in problem:
        message = f"in double quotes, {problem.rpartition(' ')[2]} cannot follow a backslash"
        return here, message, "use single quotes: '...'"
    if "simple key" in context and "':'" in problem:
        return start, *_no_colon(_line(text, start))
    if "expected <block end>" in problem:
        if extra := re.search(r"found '(.)'$", problem):
            return here, f"'{extra[1]}' has no opening bracket", "remove it"
        return here, "the indentation matches no line above", "indent the entries of a section equally"
    if "mapping values are not allowed" in problem:
        if here is not None and ": " in _line(text, here)[: here.column] + " ":
            return here, "a second ': ' in one line", f"put it on a line of its own, or {_QUOTE}"
        above = here.line - 1 if here is not None else 0
        if _GLUED.match(_lines(text)[above]):
            return StringMark("", 0, above, 0, "", 0), *_no_colon(_lines(text)[above])
        remedy = "indent the keys of a section equally, with `: ` after every key"
        return here, "unexpected key: the line above has another indentation or no ': '", remedy
    return here, *_other(problem, _line(text, here))


def _unclosed(context: str, problem: str, here: StringMark | None, start: StringMark) -> Mistake:
    opened, closing = ("{", "}") if "mapping" in context else ("[", "]")
    if here is not None and here.line == start.line and "end>" not in problem:
        if other := re.search(r"got '([\]}])'$", problem):
            return here, f"'{opened}' is closed by '{other[1]}'", f"write '{closing}'"
        return here, f"expected ',' or '{closing}'", "put a comma between the entries"
    return start, f"'{opened}' is not closed", f"add '{closing}'"


def _no_colon(line: str) -> tuple[str, str]:
    key = _GLUED.match(line)
    if key:
        return f"no space after '{key[1]}:'", f"write '{key[1]}: ...'"
    return "a line without ': '", "write it as `key: value`"


def _other(problem: str, line: str) -> tuple[str, str]:
    message = problem.removeprefix("but ")
    for jargon, words in (("'<stream end>'", "the end"), ("the node content", "a value")):
        message = message.replace(jargon, words)
    if "\\t" in problem:
        return message, "indent with spaces"
    if "${" in line:
        return message, 'inside {...} and [...] put variables in quotes: "${NAME}"'
    if "cannot start any token" in problem:
        return message, _QUOTE
    return message, ""


def _lines(text: str) -> list[str]:
    return _LINE_BREAK.split(text)


def _line(text: str, mark: StringMark | None) -> str:
    lines = _lines(text)
    return lines[mark.line] if mark is not None and mark.line < len(lines) else ""
