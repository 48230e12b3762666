"""Suggest similar names and paths."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

# The comparison time is the product of both lengths, for every candidate.
_MAX_LENGTH = 200
_MAX_CANDIDATES = 1000


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most similar to `word`, ignoring case, or None."""
    if len(word) > _MAX_LENGTH:
        return None
    short = [candidate for candidate in candidates if len(candidate) <= _MAX_LENGTH]
    by_lower = {candidate.lower(): candidate for candidate in short[:_MAX_CANDIDATES]}
    best = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[best[0]] if best else None


def did_you_mean(word: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """Return a remedy that suggests the closest candidate, else `otherwise`."""
    near = closest(word, candidates)
    return f"did you mean '{near}'?" if near else otherwise


def closest_path(
    written: str, folder: Path, *, directory: bool = False, suffixes: tuple[str, ...] = ()
) -> str:
    """Return the existing path most similar to `written` (relative to `folder`), "" if there is none.

    Each part that does not exist is replaced by the most similar name; the result must be a file with one of
    the suffixes (any, if none are given), or a directory.
    """
    current, parts = folder, []
    for part in Path(written).parts:
        if not os.path.exists(current / part):
            try:
                visible = (n for n in os.listdir(current) if not n.startswith("."))
                names = sorted(name for name in visible if not name.endswith(".partial"))
            except OSError:
                return ""
            near = closest(part, names)
            if near is None:
                return ""
            part = near
        current = current / part
        parts.append(part)
    if directory:
        fits = os.path.isdir(current)
    else:
        fits = os.path.isfile(current) and (not suffixes or current.suffix in suffixes)
    return str(Path(*parts)) if fits and parts else ""
