"""result.json: accuracies of all measured models with intervals, and what the merge reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from mergeopd.messages import joined
from mergeopd.recipe.controls import CONTROLS, Control
from mergeopd.storage.chat_replies import ApiUse
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text
from mergeopd.storage.quantized import Quantization
from mergeopd.storage.teacher_text import KeptShare

Kind = Literal["base", "expert", "static_merge", "control", "merged"]
KINDS: tuple[Kind, ...] = ("base", "expert", "static_merge", "control", "merged")


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was measured; `key` names it in a result, `title` is for people."""

    key: str
    kind: Kind
    title: str

    @classmethod
    def expert(cls, teacher: str) -> Model:
        return cls(f"expert/{teacher}", "expert", teacher)

    @classmethod
    def control(cls, control: Control) -> Model:
        return cls(f"control/{control}", "control", CONTROLS[control])


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; None where it is not defined, or the sample does not bound it."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """One suite of evaluation prompts: accuracies (0 to 1) by model, and the merged student beside others.

    `expert` is the model that the student is compared with here; None for a skill that no prompt trains, of
    which `over_base` says what was kept. `recovered` is the share of the expert's
    headroom over the base that the student reached: (merged - base) / (expert - base). The other estimates
    are differences of accuracies, merged minus the other; `over_static` is to the best static merge,
    `over_control` to each control by its model key. `overlap` counts the prompts that are also trained on.
    `samples` is the number of responses per prompt; with several, accuracy is avg@k and `pass_at_k` has the
    probability that one of k responses is correct, by model and k. An estimate is None where one of its
    models was not measured.
    """

    expert: str | None
    num_prompts: int
    accuracy: Mapping[str, Estimate]
    recovered: Estimate
    over_base: Estimate
    over_expert: Estimate
    over_static: Estimate | None = None
    overlap: int = 0
    domain: str = ""
    samples: int = 1
    pass_at_k: Mapping[str, Mapping[int, Estimate]] = field(default_factory=dict)
    over_control: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AlarmSummary:
    """An alarm of the run, at the first update that raised it; `subject` is a domain or teacher."""

    update: int
    name: str
    subject: str
    finding: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a run reached.

    `mean` has the means by kind of model (each suite's own expert, the best static merge and control) over
    the suites with an expert, or over all if none has one. `mean_recovered` is over the suites with headroom.
    `best_static`, `best_expert` and `best_control` are the models of their kind with the highest such mean,
    if there are any. `verdict` says it in words, `seconds` is wall time by stage. `update` is the one whose
    weights were exported because they were the best; None where those of the last were. `trained_tokens`
    counts the response tokens in the loss of the student and its controls, by model key; empty without
    controls. `alarms` are those of the run. `text_kept` is what phases with `keep` have left of
    the teachers' text, `api_use` what teachers behind APIs have counted, `quantized` how far quantised
    teachers are from their own weights.
    """

    models: tuple[Model, ...]
    suites: Mapping[str, SuiteResult]
    mean: Mapping[Kind, Estimate]
    mean_recovered: Estimate
    best_static: str | None
    best_expert: str | None
    verdict: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    update: int | None = None
    best_control: str | None = None
    trained_tokens: Mapping[str, int] = field(default_factory=dict)
    alarms: tuple[AlarmSummary, ...] = ()
    text_kept: tuple[KeptShare, ...] = ()
    api_use: tuple[ApiUse, ...] = ()
    quantized: Mapping[str, Quantization] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of model to show: controls only if there are any."""
        return tuple(kind for kind in KINDS if kind != "control" or self.best_control is not None)

    def headline(self, suite: str) -> dict[Kind, Estimate | None]:
        """Return a suite's accuracies by kind: its expert, the best static merge and control."""
        row = self.suites[suite]
        keys = {
            "base": "base",
            "expert": row.expert or "",
            "static_merge": self.best_static or "",
            "control": self.best_control or "",
            "merged": "merged",
        }
        return {kind: row.accuracy.get(keys[kind]) for kind in self.kinds}


_RESULT = TypeAdapter(Result)


def grade(recovered: float | None) -> str:
    """Return the colour class of a recovered headroom: good, fair, poor, or none without headroom."""
    if recovered is None:
        return "none"
    return "good" if recovered >= 0.9 else "fair" if recovered >= 0.5 else "poor"


def standing(result: Result) -> Literal["good", "fair", "poor"]:
    """Return the colour class of a result: poor if the student is below the base in a domain with an expert,
    good if it reaches the expert within noise in all and forgets nothing; a difference counts if its
    interval excludes zero.
    """
    below = [row for row in result.suites.values() if (row.over_base.high or 0.0) < 0]
    if any(row.expert is not None for row in below):
        return "poor"
    is_short = (
        row.over_expert is not None and (row.over_expert.high or 0.0) < 0 for row in result.suites.values()
    )
    return "fair" if below or any(is_short) else "good"


def shortfall(result: Result) -> str:
    """Return in words where the student is below the base beyond the intervals; "" if nowhere."""
    below = {name: row for name, row in result.suites.items() if (row.over_base.high or 0.0) < 0}
    lost = [name for name, row in below.items() if row.expert is None]
    parts = ["below the base"] if len(lost) < len(below) else []
    return ", ".join([*parts, *([f"forgets {joined(lost, 'and')}"] if lost else [])])


def write_result(path: Path, result: Result) -> None:
    """Write `result.json` atomically.

    Raises:
        StorageError: the disk refuses.
    """
    write_atomic(path, json_text(asdict(result), indent=2) + "\n")


def read_result(path: Path) -> Result | None:
    """Read `result.json`; None where there is none.

    Raises:
        ValueError: it "is damaged", or "is of another version of mergeopd".
        StorageError: the disk refuses.
    """
    if not path.is_file():
        return None
    with named_failures("read", path):
        content = path.read_bytes()
    try:
        return _RESULT.validate_json(content)
    except ValidationError as error:
        is_json = all(fault["type"] != "json_invalid" for fault in error.errors())
        raise ValueError("is of another version of mergeopd" if is_json else "is damaged") from error
