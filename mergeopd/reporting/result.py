"""result.json: accuracies, and the share of each expert's headroom over the base that was recovered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text

MODELS = ("base", "expert", "weight_average", "merged")


@dataclass(frozen=True, slots=True)
class Result:
    """Accuracies (0 to 1) and `recovered` per domain, and wall seconds by stage.

    Each domain gives `base`, `expert`, `merged` and `weight_average`; the last is None where the experts
    cannot be averaged (different shapes). `mean_recovered` is over the domains that have headroom.
    """

    domains: Mapping[str, Mapping[str, float | None]]
    mean_recovered: float | None
    seconds: Mapping[str, float]


_RESULT = TypeAdapter(Result)


def recovered_headroom(base: float, expert: float, merged: float) -> float | None:
    """Return (merged - base) / (expert - base); None where the expert is not better than the base."""
    return (merged - base) / (expert - base) if expert > base else None


def grade(recovered: float | None) -> str:
    """Return the colour class of a recovered headroom: good, fair, poor, or none without headroom."""
    if recovered is None:
        return "none"
    return "good" if recovered >= 0.9 else "fair" if recovered >= 0.5 else "poor"


def result_document(
    domains: Mapping[str, Mapping[str, float | None]], seconds: Mapping[str, float]
) -> Result:
    """Build the result of a run from the accuracies of each domain; `weight_average` may be missing.

    Raises:
        ValueError: a domain has other keys, or lacks a value.
    """
    rows: dict[str, dict[str, float | None]] = {}
    for name, given in domains.items():
        if not set(given) <= set(MODELS):
            raise ValueError(f"domain {name!r} has {sorted(given)}, not only {sorted(MODELS)}")
        base, expert, merged = (given.get(model) for model in ("base", "expert", "merged"))
        if base is None or expert is None or merged is None:
            raise ValueError(f"domain {name!r} lacks the accuracy of base, expert or merged")
        rows[name] = {
            **{model: given.get(model) for model in MODELS},
            "recovered": recovered_headroom(base, expert, merged),
        }
    recovered = [row["recovered"] for row in rows.values() if row["recovered"] is not None]
    return Result(rows, complete_mean(recovered), dict(seconds))


def write_result(path: Path, result: Result) -> None:
    """Write `result.json` atomically.

    Raises:
        StorageError: the disk refuses.
    """
    write_atomic(path, json_text(asdict(result), indent=2) + "\n")


def read_result(path: Path) -> Result | None:
    """Read `result.json`; None where there is none.

    Raises:
        ValueError: it is damaged.
        StorageError: the disk refuses.
    """
    if not path.is_file():
        return None
    with named_failures("read", path):
        content = path.read_bytes()
    return _RESULT.validate_json(content)


def complete_mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None when there is no value or one is missing."""
    numbers = list(values)
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None
