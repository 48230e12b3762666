"""What verifiers have in common."""

from __future__ import annotations

import re
from typing import Any, Protocol

from mergeopd.errors import VerifierError
from mergeopd.strict_json import parse_json


class Verify(Protocol):
    """Function from a response to a reward in [0, 1]."""

    def __call__(self, response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        """Verify one response; `truncated`: it ended at the length limit."""


_FENCE = re.compile(r"^[ \t]*```(?P<language>[^\n`]*)$", re.MULTILINE)


def fenced_blocks(response: str) -> list[tuple[str, str]]:
    """Return language, in lower case, and content of the closed fenced blocks of a response."""
    fences = list(_FENCE.finditer(response))
    # Fences come in pairs; an odd one at the end was truncated by the length limit.
    return [
        (opening["language"].strip().lower(), response[opening.end() : closing.start()])
        for opening, closing in zip(fences[::2], fences[1::2], strict=False)
    ]


def short(text: str, limit: int = 80) -> str:
    """Quote a text, truncated."""
    return repr(text if len(text) <= limit else f"{text[: limit - 3]}...")


def required(kind: str, reference: str | None) -> str:
    """Return the reference. Raises VerifierError if there is none."""
    if reference is None:
        raise VerifierError(
            f"verifier {kind!r} needs a reference, and the prompt has none; see reference_field"
        )
    return reference


def reference_values(kind: str, reference: str | None) -> Any:
    """Parse a reference that was composed of several fields. Raises VerifierError."""
    try:
        return parse_json(required(kind, reference), float)
    except (ValueError, RecursionError) as error:
        raise VerifierError(f"verifier {kind!r}: the reference is not JSON: {error}") from None
