"""Substitute `${NAME}` and `${NAME:-default}` in a text, as the shell does; `$${` is a literal `${`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_TOKEN = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\}|\$\{")


class Filled(NamedTuple):
    """The text with its variables substituted. `whole`: the text was a single variable.

    `faults` are the causes and remedies of variables that cannot be substituted.
    """

    text: str
    whole: bool
    faults: list[tuple[str, str]]


def fill(text: str, env: Mapping[str, str]) -> Filled:
    """Substitute variables. The default is used if the variable is unset or empty, as in the shell."""
    faults: list[tuple[str, str]] = []
    if any(token[0] == "${" for token in _TOKEN.finditer(text)):
        remedy = "write ${NAME} or ${NAME:-default}; $${ is a literal ${"
        return Filled(text, False, [(f"malformed variable in {text!r}", remedy)])

    def value(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match["name"], match["default"]
        text = env.get(name)
        if default is not None:
            return text or default
        if text is None:
            remedy = f"set it, or give a default: ${{{name}:-default}}"
            faults.append((f"environment variable '{name}' is not set", remedy))
            return match[0]
        return text

    filled = _TOKEN.sub(value, text)
    only = _TOKEN.fullmatch(text)
    return Filled(filled, bool(only and only["name"]), faults)
