"""The resolved recipe: every path absolute, every default written out, every route known, hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from mergeopd.config.values import Strict
from mergeopd.recipe.bridges import Bridge
from mergeopd.recipe.models import Canary, SnapshotRule, Student
from mergeopd.recipe.schema import Checkpoints, Memory, Reports
from mergeopd.recipe.training import AnyRollout, Optimizer, Phase
from mergeopd.recipe.verifiers import Verifier

# What a run may change on the way: where things lie, what stays in memory, what is shown, the processes.
UNBOUND: Mapping[str, Any] = {
    "recipe_file": True,
    "output": True,
    "memory": True,
    "text_cache": True,
    "report": True,
    "student": {"parallel": True},
}


class TeacherPlan(Strict):
    """One teacher, its card merged in. Folders and files are absolute paths.

    `student` is None for another model; otherwise `model` is the student's folder and `student` says which of
    the student's weights teach.
    """

    name: str
    student: Literal["start"] | SnapshotRule | None
    model: str
    tokenizer: str
    template: str | None
    dtype: str
    system: str | None
    prompt: str | None
    fingerprint: str | None
    canary: Canary | None
    bridge: Bridge | None

    @property
    def snapshot_rule(self) -> SnapshotRule | None:
        """How its weights follow the student's; None when they stay."""
        return self.student if isinstance(self.student, SnapshotRule) else None


class SourcePlan(Strict):
    """One prompt file. `teachers` are the products of prompt weight and card weight, zeros dropped."""

    name: str
    source: str
    domain: str
    verifier: Verifier | None
    prompt_field: str
    reference_field: str
    response_field: str | None
    teachers: dict[str, float]
    share: float
    limit: int | None


class EvaluationPlan(Strict):
    """What is measured. `experts` maps each domain to the teacher it is compared with."""

    sources: tuple[SourcePlan, ...]
    experts: dict[str, str]
    max_new_tokens: int
    batch_size: int


class Plan(Strict):
    """Everything a run depends on except the contents of the files it names."""

    name: str
    recipe_file: str
    seed: int
    threads: int
    student: Student
    teachers: dict[str, TeacherPlan]
    sources: tuple[SourcePlan, ...]
    rollout: AnyRollout
    phases: tuple[Phase, ...]
    optimizer: Optimizer
    evaluation: EvaluationPlan | None
    checkpoint: Checkpoints
    allow_code: tuple[str, ...]
    memory: Memory
    report: Reports
    text_cache: str
    output: str

    @property
    def content(self) -> dict[str, Any]:
        """What makes a run what it is, in values of JSON: all but `UNBOUND`."""
        return self.model_dump(mode="json", exclude=dict(UNBOUND))

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON of `content`."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    def has_policy(self, phase: Phase) -> bool:
        """Whether a phase has policy terms, bridges that are one (`span`) included."""
        return phase.loss.has_policy or self._has_spans(phase)

    def _has_spans(self, phase: Phase) -> bool:
        spans = any(t.bridge is not None and t.bridge.kind == "span" for t in self.teachers.values())
        return spans and phase.loss.needs_teacher

    def needs_prior_policy(self, phase: Phase) -> bool:
        """Whether a phase needs the student's log-probabilities from before a round's first update."""
        loss, sampled = phase.loss, phase.loss.sampled_reverse_kl
        return bool(
            self._has_spans(phase)
            or phase.balance.follow_gap
            or (loss.has_policy and phase.updates_per_round > 1)
            or (loss.has_policy and phase.correction.kind == "sequence_mask")
            or (sampled is not None and sampled.needs_whole_answers)
        )

    @property
    def num_updates(self) -> int:
        """Optimizer updates over all phases."""
        return sum(phase.updates for phase in self.phases)
