"""Parse JSON strictly: no NaN or Infinity, no duplicate keys; and compare values as JSON does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any


def finite(text: str) -> float:
    """Parse a number to a finite float. Raises ValueError."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is out of range")
    return value


def decoder(parse_float: Callable[[str], Any] = finite) -> json.JSONDecoder:
    """Return a strict decoder, which raises ValueError or RecursionError."""
    return json.JSONDecoder(
        parse_float=parse_float, parse_constant=_refuse_constant, object_pairs_hook=_unique_object
    )


def parse_json(text: str, parse_float: Callable[[str], Any] = Decimal) -> Any:
    """Parse with exact numbers by default. Raises ValueError or RecursionError."""
    return decoder(parse_float).decode(text)


def is_equal(a: Any, b: Any) -> bool:
    """Compare as JSON: 1 equals 1.0 but not true, unlike in Python."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(is_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value
