"""Write metrics.jsonl, a line per update, rollouts/samples.jsonl, responses token by token, and two more.

    pandas.json_normalize(map(json.loads, open("metrics.jsonl")))   # columns like teachers.math.reverse_kl

Everything that depends on the machine or on restarts is under `cost`: two runs of one plan differ in that key
only. accuracy.jsonl has a line per measurement during the run, alarms.jsonl one per alarm. The report reads
lines back through the types that write them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mergeopd.reporting.events import (
    AccuracyMeasured,
    AlarmRaised,
    Event,
    RolloutSampled,
    StageStarted,
    TeacherStats,
    UpdateDone,
)
from mergeopd.storage.failures import named_failures
from mergeopd.storage.metrics import MetricsFile

# Numbers of a teacher's distribution, which not all targets contain.
_WHERE_KNOWN = (
    "entropy_T",
    "entropy_gap",
    "overlap",
    "overlap_advantage",
    "shared_mass_S",
    "shared_mass_T",
)

Numbers = Mapping[str, float | None]
_ACCURACY = TypeAdapter(AccuracyMeasured)


@dataclass(frozen=True, slots=True)
class Cost:
    """Time, memory and computation of an update; see `UpdateDone`."""

    seconds: Mapping[str, float]
    tokens_per_s: float | None
    teacher_bytes_read: int
    peak_memory_bytes: int = 0
    num_generated: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """A line of metrics.jsonl. Numbers that are not finite are null there, and None when read back."""

    update: int
    phase: str
    round: int
    lr: float | None
    loss: float | None
    grad_norm: float | None
    clip_factor: float | None
    num_tokens: int
    on_policy_fraction: float | None
    teachers: Mapping[str, Numbers]
    domains: Mapping[str, Numbers]
    policy: Numbers
    verifier_failures: Mapping[str, int]
    cost: Cost
    text_kept: Mapping[str, Numbers] = field(default_factory=dict)
    selected: Mapping[str, float] = field(default_factory=dict)
    serving: Numbers = field(default_factory=dict)

    @staticmethod
    def of(event: UpdateDone) -> UpdateRecord:
        """Build the record of an update: keys in a fixed order, teachers and domains sorted by name."""
        return UpdateRecord(
            update=event.update,
            phase=event.phase,
            round=event.round,
            lr=event.lr,
            loss=event.loss,
            grad_norm=event.grad_norm,
            clip_factor=event.clip_factor,
            num_tokens=event.num_tokens,
            on_policy_fraction=event.on_policy_fraction,
            teachers={name: _teacher_numbers(stats) for name, stats in sorted(event.teachers.items())},
            domains={name: asdict(stats) for name, stats in sorted(event.domains.items())},
            policy={} if event.policy is None else asdict(event.policy),
            verifier_failures=dict(sorted(event.verifier_failures.items())),
            selected=dict(sorted(event.selected.items())),
            text_kept={name: dict(sorted(own.items())) for name, own in sorted(event.text_kept.items())},
            serving={} if event.serving is None else asdict(event.serving),
            cost=Cost(
                seconds=dict(sorted(event.seconds.items())),
                tokens_per_s=event.num_tokens / event.step_s if event.step_s > 0 else None,
                teacher_bytes_read=event.teacher_bytes_read,
                peak_memory_bytes=event.peak_memory_bytes,
                num_generated=dict(sorted(event.num_generated.items())),
                flops=dict(sorted(event.flops.items())),
            ),
        )


def read_updates(path: Path, newest: int) -> list[UpdateRecord]:
    """Read the `newest` last updates of metrics.jsonl; damaged lines are left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        lines = deque(file, newest)
    kind, records = TypeAdapter(UpdateRecord), []
    for line in lines:
        with suppress(ValidationError):
            records.append(kind.validate_json(line))
    return records


def _teacher_numbers(stats: TeacherStats) -> dict[str, float | None]:
    numbers = {
        "num_tokens": stats.num_tokens,
        **dict(sorted(stats.divergence.items())),
        "logprob_gap": stats.logprob_gap,
        "logprob_gap_student": stats.logprob_gap_student,
        "logprob_gap_text": stats.logprob_gap_text,
    }
    if stats.bridge is None:
        known = {key: getattr(stats, key) for key in _WHERE_KNOWN}
        return numbers | {key: value for key, value in known.items() if value is not None}
    return numbers | {key: value for key, value in asdict(stats.bridge).items() if value is not None}


def update_record(event: UpdateDone) -> dict[str, Any]:
    """Return the line of one update in metrics.jsonl."""
    return asdict(UpdateRecord.of(event))


def sample_record(event: RolloutSampled) -> dict[str, Any]:
    """Return the line of one sampled response in rollouts/samples.jsonl."""
    record = asdict(event)
    return {**record, "teachers": dict(sorted(record["teachers"].items()))}


def read_accuracy(path: Path) -> tuple[AccuracyMeasured, ...]:
    """Read accuracy.jsonl, if it is there; damaged lines are left out.

    Raises:
        StorageError: the disk fails.
    """
    if not path.is_file():
        return ()
    with named_failures("read", path):
        lines = path.read_bytes().splitlines()
    records = []
    for line in lines:
        with suppress(ValidationError):
            records.append(_ACCURACY.validate_json(line))
    return tuple(records)


class RecordsReporter:
    """Writes each kind of record to its file, and syncs all before a checkpoint."""

    def __init__(
        self, metrics: MetricsFile, samples: MetricsFile, accuracy: MetricsFile, alarms: MetricsFile
    ) -> None:
        self._metrics = metrics
        self._samples = samples
        self._accuracy = accuracy
        self._alarms = alarms

    def emit(self, event: Event) -> None:
        """Append the line of an event that has one.

        Raises:
            StorageError: the disk fails.
        """
        match event:
            case UpdateDone():
                self._metrics.append(update_record(event))
            case RolloutSampled():
                self._samples.append(sample_record(event))
            case AccuracyMeasured():
                self._accuracy.append(asdict(event))
            case AlarmRaised():
                self._alarms.append(asdict(event))
            case StageStarted(stage="checkpoint"):
                for file in (self._metrics, self._samples, self._accuracy, self._alarms):
                    file.sync()
            case _:
                pass
