"""Substitute `${NAME}` and `${NAME:-default}` in a text, as the shell does; `$${` is a literal `${`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_TOKEN = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\}|\$\{")


@dataclass(frozen=True, slots=True)
class Fault:
    """A variable that cannot be substituted: cause and remedy."""

    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Filled:
    """The text with its variables substituted. `whole`: the text was a single variable."""

    text: str
    whole: bool
    faults: tuple[Fault, ...]


def fill(text: str, env: Mapping[str, str]) -> Filled:
    """Substitute variables. The default is used if the variable is unset or empty, as in the shell."""
    faults: list[Fault] = []
    if any(token[0] == "${" for token in _TOKEN.finditer(text)):
        remedy = "write ${NAME} or ${NAME:-default}; $${ is a literal ${"
        return Filled(text, False, (Fault(f"malformed variable in {text!r}", remedy),))

    def value(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match["name"], match["default"]
        text = env.get(name)
        if default is not None:
            return text or default
        if text is None:
            remedy = f"set it, or give a default: ${{{name}:-default}}"
            faults.append(Fault(f"environment variable '{name}' is not set", remedy))
            return match[0]
        return text

    filled = _TOKEN.sub(value, text)
    only = _TOKEN.fullmatch(text)
    return Filled(filled, bool(only and only["name"]), tuple(faults))
