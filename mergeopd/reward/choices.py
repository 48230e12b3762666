"""The verifier of multiple choice."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Sequence
from typing import Any

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import ChoiceVerifier
from mergeopd.reward.numbers import last_boxed
from mergeopd.reward.protocol import Verify, reference_values, required, short

_LETTERS = string.ascii_uppercase
_STATED = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\s+(?i:is|would be)\b)?[\s:*_]*(?:(?i:option|choice)\s+)?"
    r"(?P<text>(?:\\boxed\{)?[\s({\[*_]*(?P<letter>[A-Z])(?![\w'])|[^\n]*)"
)
_ALONE = re.compile(r"\W*(?P<letter>[A-Z])(?:\W*$|[).:])")


def build_choice(spec: ChoiceVerifier, allow_code: Collection[str]) -> Verify:
    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        expected, options = _expected(spec, required("choice", reference))
        if isinstance(expected, str):
            raise VerifierError(f"verifier 'choice': {expected}; correct the prompt file")
        return float(_chosen(response, options, truncated) == expected)

    return verify


def choice_problem(spec: ChoiceVerifier, reference: str) -> str | None:
    """Return why a reference names no option."""
    expected, _ = _expected(spec, reference)
    return expected if isinstance(expected, str) else None


def _expected(spec: ChoiceVerifier, reference: str) -> tuple[int | str, list[str]]:
    """Return the index of the correct option, or why there is none, and the options' texts."""
    answer: Any = reference
    options: list[str] = []
    if spec.options_field is not None:
        values = reference_values("choice", reference)
        answer, options = values["answer"], values["options"]
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            return f"the field {spec.options_field!r} is not a list of texts", []
    text = answer if isinstance(answer, str) else json.dumps(answer)
    num_options = len(options) or len(_LETTERS)
    index = _index(text, options, spec.first_index)
    if index is None or not 0 <= index < num_options:
        return f"the reference {short(text)} names none of the options", options
    return index, options


def _index(text: str, options: Sequence[str], first_index: int) -> int | None:
    text = text.strip()
    if (letter := re.fullmatch(r"\(?([A-Za-z])[).]?", text)) is not None:
        return _LETTERS.index(letter[1].upper())
    if re.fullmatch(r"\d{1,3}", text) and text not in options:
        return int(text) - first_index
    return _of_text(text, options)


def _of_text(text: str, options: Sequence[str]) -> int | None:
    """Return the index of the option with this text, if one alone has it."""
    indices = [i for i, option in enumerate(options) if _plain(option) == _plain(text)]
    return indices[0] if len(indices) == 1 and _plain(text) else None


def _plain(text: str) -> str:
    return text.strip().strip("*_.\"'()[]{} ").casefold()


def _chosen(response: str, options: Sequence[str], truncated: bool) -> int | None:
    """Return the index of the option that a response chooses. Of a truncated one, only a box counts."""
    boxed = last_boxed(response)
    if boxed is not None:
        inner = re.sub(r"\\text(?:bf|rm)?\s*\{([^{}]*)\}", r"\1", boxed)
        letter = re.match(r"\W*([A-Za-z])(?:\W|$)", inner)
        index = _of_text(inner, options)
        return index if index is not None else _LETTERS.index(letter[1].upper()) if letter else None
    if truncated:
        return None
    for match in reversed(list(_STATED.finditer(response))):
        if match["letter"]:
            return _LETTERS.index(match["letter"])
        if (index := _of_text(match["text"], options)) is not None:
            return index
    if (alone := _ALONE.match(response)) is not None:
        return _LETTERS.index(alone["letter"])
    return _of_text(response, options)
