"""Tokens of inspected responses for the page's script, with every text written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mergeopd.reporting.inspection import InspectedResponse, InspectedToken, TokenCandidate
from mergeopd.reporting.page.responses import level
from mergeopd.reporting.page.text import visible

MAX_TOKENS = 40_000
"""On the page; in longer inspections every response is cut to an equal number."""
MAX_CANDIDATES = 5
STRONG = 1.0
"""Reverse KL, in nats, of the tokens between which the page jumps."""
_NUM_STRIPES = 60
_LEGEND = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class ResponseView:
    """A response on the page. `number` is its place in the script's data, None without tokens.

    `stripes` are the levels of colour along the response: of each part the highest.
    """

    response: InspectedResponse
    number: int | None
    mean: float | None
    num_strong: int
    num_hidden: int
    stripes: tuple[int, ...]


@dataclass
class TokenPool:
    """Collects the tokens of all responses; `max_tokens` are shown of each."""

    max_tokens: int
    _texts: dict[str, int] = field(default_factory=dict)
    _rows: dict[tuple[tuple[float, ...], ...], int] = field(default_factory=dict)
    _responses: list[dict[str, Any]] = field(default_factory=list)

    def add(self, response: InspectedResponse) -> ResponseView:
        """Add a response's tokens, and return what the page shows without its script."""
        tokens = response.tokens[: self.max_tokens]
        values = [token.reverse_kl for token in tokens]
        known = [value for value in values if value is not None]
        number = None
        if tokens:
            number = len(self._responses)
            self._responses.append(
                {
                    "texts": [self._text(token.text) for token in tokens],
                    "levels": "".join("-" if value is None else f"{_level(value):x}" for value in values),
                    "reverse_kl": [_short(value) for value in values],
                    "advantage": [_short(token.advantage) for token in tokens],
                    "student": self._candidates([token.candidates_S for token in tokens]),
                    "teacher": self._candidates([token.candidates_T for token in tokens]),
                }
            )
        return ResponseView(
            response=response,
            number=number,
            mean=sum(known) / len(known) if known else None,
            num_strong=sum(value >= STRONG for value in known),
            num_hidden=len(response.tokens) - len(tokens),
            stripes=_stripes(tokens),
        )

    def document(self) -> dict[str, Any]:
        """Return the data of the script. Candidates are pairs of a text's number and a probability."""
        return {
            "texts": [visible(text) for text in self._texts],
            "rows": list(self._rows),
            "responses": self._responses,
            "strong": STRONG,
        }

    def _text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def _candidates(self, rows: Sequence[Sequence[TokenCandidate]]) -> int:
        """Return the number of a response's candidates; equal ones are written once."""
        flat = tuple(
            tuple(
                number
                for candidate in row[:MAX_CANDIDATES]
                for number in (self._text(candidate.text), float(f"{candidate.probability:.3g}"))
            )
            for row in rows
        )
        return self._rows.setdefault(flat, len(self._rows))


def legend() -> list[tuple[float, int]]:
    """Return some values in nats with their levels of colour."""
    return [(value, _level(value)) for value in _LEGEND]


def _level(value: float) -> int:
    return level(value, "reverse_kl")


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _stripes(tokens: Sequence[InspectedToken]) -> tuple[int, ...]:
    count = min(_NUM_STRIPES, len(tokens))
    parts = (tokens[i * len(tokens) // count : (i + 1) * len(tokens) // count] for i in range(count))
    return tuple(max(_level(token.reverse_kl or 0.0) for token in part) for part in parts)
