"""result.json: accuracies of all measured models with intervals, and what the merge reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text

Kind = Literal["base", "expert", "static_merge", "merged"]
KINDS: tuple[Kind, ...] = ("base", "expert", "static_merge", "merged")


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was measured; `key` names it in a result, `title` is for people."""

    key: str
    kind: Kind
    title: str

    @classmethod
    def expert(cls, teacher: str) -> Model:
        return cls(f"expert/{teacher}", "expert", teacher)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; None where it is not defined, or the sample does not bound it."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """One suite of evaluation prompts: accuracies (0 to 1) by model, and the merged student beside others.

    `expert` is the model that the student is compared with here. `recovered` is the share of the expert's
    headroom over the base that the student reached: (merged - base) / (expert - base). The other estimates
    are differences of accuracies, merged minus the other; `over_static` is to the best static merge.
    `overlap` counts the prompts that are also trained on.
    """

    expert: str
    num_prompts: int
    accuracy: Mapping[str, Estimate]
    recovered: Estimate
    over_base: Estimate
    over_expert: Estimate
    over_static: Estimate | None = None
    overlap: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What a run reached.

    `mean` has the means over suites by kind of model: each suite's own expert, the best static merge.
    `mean_recovered` is over the suites with headroom. `best_static` and `best_expert` are the static merge
    and the expert with the highest mean accuracy over all suites, if there are any. `verdict` says it in
    words, `seconds` is wall time by stage.
    """

    models: tuple[Model, ...]
    suites: Mapping[str, SuiteResult]
    mean: Mapping[Kind, Estimate]
    mean_recovered: Estimate
    best_static: str | None
    best_expert: str | None
    verdict: str
    seconds: Mapping[str, float] = field(default_factory=dict)

    def headline(self, suite: str) -> dict[Kind, Estimate | None]:
        """Return a suite's accuracies by kind: the expert of its domain, the best static merge."""
        row = self.suites[suite]
        keys = {
            "base": "base",
            "expert": row.expert,
            "static_merge": self.best_static or "",
            "merged": "merged",
        }
        return {kind: row.accuracy.get(keys[kind]) for kind in KINDS}


_RESULT = TypeAdapter(Result)


def grade(recovered: float | None) -> str:
    """Return the colour class of a recovered headroom: good, fair, poor, or none without headroom."""
    if recovered is None:
        return "none"
    return "good" if recovered >= 0.9 else "fair" if recovered >= 0.5 else "poor"


def standing(result: Result) -> Literal["good", "fair", "poor"]:
    """Return the colour class of a result: poor if the student is below the base in any suite, good if it
    reaches the expert within noise in all; a difference counts if its interval excludes zero.
    """
    rows = result.suites.values()
    if any(row.over_base.high is not None and row.over_base.high < 0 for row in rows):
        return "poor"
    is_short = (row.over_expert is not None and (row.over_expert.high or 0.0) < 0 for row in rows)
    return "fair" if any(is_short) else "good"


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
