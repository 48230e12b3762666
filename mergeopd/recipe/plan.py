"""The resolved recipe: absolute paths, explicit defaults, teachers of every prompt source, and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mergeopd.config.values import Strict
from mergeopd.models.residency import Residency
from mergeopd.recipe.alarms import Alarms
from mergeopd.recipe.baselines import StaticMerge
from mergeopd.recipe.bridges import Bridge
from mergeopd.recipe.environments import Environment
from mergeopd.recipe.inspection import InspectionSettings
from mergeopd.recipe.models import Canary, SnapshotRule, Student
from mergeopd.recipe.rollout import AnyRollout
from mergeopd.recipe.routing import PhaseTeachers
from mergeopd.recipe.schema import Checkpoints, Interim, Memory, Reports
from mergeopd.recipe.served import Served
from mergeopd.recipe.text_api import TextApi
from mergeopd.recipe.training import Optimizer, Phase
from mergeopd.recipe.verifiers import Verifier

# Settings of an API that do not change its responses.
API_UNBOUND = ("url", "api_key_env", "allow_http_to", "concurrency", "timeout_s", "prices", "probe")

# Settings that may change when a run is resumed: paths, alarms, memory, reports,
# inspections, processes, remarks.
UNBOUND: Mapping[str, Any] = {
    "recipe_file": True,
    "output": True,
    "alarms": True,
    "memory": True,
    "text_cache": True,
    "report": True,
    "inspect": True,
    "student": {"parallel": True, "kernel": True, "packing": True, "compile": True},
    "optimizer": {"offload": True},
    "rollout": dict.fromkeys(
        ("url", "launch", "api_key_env", "concurrency", "timeout_s", "sync", "parity", "gather"), True
    ),
    # Recorded targets are those of the teacher itself.
    "teachers": {
        "__all__": {
            "licence": True,
            "residency": True,
            "targets": True,
            "api": dict.fromkeys(API_UNBOUND, True),
            "served": dict.fromkeys(("url", "concurrency", "timeout_s"), True),
        }
    },
}


class TeacherPlan(Strict):
    """A teacher with the values of its card. Paths are absolute.

    For a self-teacher, `student` selects the student's weights and `model` is the student's folder. One
    behind an API has neither model nor tokenizer.
    """

    name: str
    student: Literal["start"] | SnapshotRule | None
    model: str | None
    tokenizer: str | None
    template: str | None
    dtype: str
    system: str | None
    prompt: str | None
    fingerprint: str | None
    canary: Canary | None
    bridge: Bridge | None
    weight: float = 1.0
    licence: str | None = None
    template_arguments: dict[str, Any] = Field(default={})
    api: TextApi | None = None
    targets: str | None = None
    served: Served | None = None
    residency: Residency = "auto"
    quantize: Literal["int8", "float8"] | None = None

    @property
    def folder(self) -> Path:
        """The model's folder. Raises ValueError for a teacher behind an API."""
        if self.model is None:
            raise ValueError(f"teacher '{self.name}' has no folder")
        return Path(self.model)

    @property
    def needs_head(self) -> bool:
        """Whether its prediction head is read here: not for servers that return log-probabilities."""
        return self.served is None or self.served.hidden_states

    @property
    def snapshot_rule(self) -> SnapshotRule | None:
        """How a self-teacher's weights are updated; None if they are constant."""
        return self.student if isinstance(self.student, SnapshotRule) else None


class RewardModelPlan(Strict):
    """A reward model with the values of its card. Paths are absolute."""

    name: str
    model: str
    tokenizer: str
    template: str | None
    template_arguments: dict[str, Any]
    fingerprint: str | None


class SourcePlan(Strict):
    """A file of prompts, or the folder of a dataset.

    `dataset` is its id on the hub, whose `revision` (a commit) is read; both are None for local files.
    `teachers` are the nonzero products of prompt weight and teacher weight. `reward_model` is the model of a
    verifier of that kind.
    """

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
    allow_overlap: bool = False
    tools_field: str = "tools"
    environment: Environment | None = None
    text_field: str | None = None
    max_tokens: int | None = None
    pack: bool = False
    messages_field: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    reward_model: RewardModelPlan | None = None

    @property
    def title(self) -> str:
        """The source in messages: its path or id, with subset and split."""
        parts = ", ".join(part for part in (self.subset, self.split) if part)
        return (self.dataset or self.source) + (f" ({parts})" if parts else "")

    @property
    def main_field(self) -> tuple[str, str]:
        """The field with a row's prompt, conversation or document, and the recipe's key that names it."""
        if self.text_field is not None:
            return self.text_field, "text_field"
        if self.messages_field is not None:
            return self.messages_field, "messages_field"
        return self.prompt_field, "prompt_field"


def phase_teachers(
    phase: Phase, sources: Iterable[SourcePlan], teachers: Mapping[str, TeacherPlan]
) -> PhaseTeachers:
    """Resolve the teachers of a phase of a recipe with these sources and teachers."""
    drawn = {s.name: s.teachers for s in sources if phase.prompts is None or s.name in phase.prompts}
    return PhaseTeachers.of(phase, drawn, {name: teacher.weight for name, teacher in teachers.items()})


class SuitePlan(Strict):
    """Evaluation sources that are one row of the result, measured with the same settings.

    `expert` is the teacher with which the student is compared; None if no prompt trains the domain.
    """

    name: str
    domain: str
    expert: str | None
    sources: tuple[SourcePlan, ...]
    max_new_tokens: int
    samples: int
    temperature: float
    top_p: float


class EvaluationPlan(Strict):
    """The evaluation."""

    suites: tuple[SuitePlan, ...]
    static_merges: tuple[StaticMerge, ...]
    all_experts: bool
    batch_size: int
    interim: Interim | None = None

    @property
    def sources(self) -> tuple[SourcePlan, ...]:
        """The sources of all suites."""
        return tuple(source for suite in self.suites for source in suite.sources)

    @property
    def experts(self) -> dict[str, str]:
        """The teachers with which suites are compared, by the suite's name."""
        return {suite.name: suite.expert for suite in self.suites if suite.expert is not None}


class Plan(Strict):
    """All settings of a run; everything it depends on, except for the contents of files."""

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
    alarms: Alarms
    checkpoint: Checkpoints
    allow_code: tuple[str, ...]
    memory: Memory
    report: Reports
    inspect: InspectionSettings
    text_cache: str
    output: str

    @property
    def content(self) -> dict[str, Any]:
        """The settings that identify a run, as JSON values: all except `UNBOUND`."""
        return self.model_dump(mode="json", exclude=dict(UNBOUND))

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON of `content`."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    @property
    def experts(self) -> list[str]:
        """The teachers that are evaluated: those with which suites are compared, or all if none is."""
        return sorted(set(self.evaluation.experts.values() if self.evaluation else ()) or self.teachers)

    def shares(self, phase: Phase) -> dict[str, float]:
        """Share of each source that a phase draws from, by name."""
        return phase.shares({source.name: source.share for source in self.sources})

    def sources_of(self, phase: Phase) -> tuple[SourcePlan, ...]:
        """The sources that a phase draws from, in the recipe's order."""
        shares = self.shares(phase)
        return tuple(source for source in self.sources if source.name in shares)

    def reads_documents(self, phase: Phase) -> bool:
        """Whether a phase learns from text without prompts."""
        return any(source.text_field is not None for source in self.sources_of(phase))

    def teachers_of(self, phase: Phase) -> PhaseTeachers:
        """The teachers of a phase."""
        return phase_teachers(phase, self.sources, self.teachers)

    def rollout_of(self, phase: Phase) -> AnyRollout:
        """How responses are sampled in a phase."""
        return phase.rollout.over(self.rollout)

    def has_policy(self, phase: Phase) -> bool:
        """Whether a phase has policy terms, including the bridge `span`."""
        return phase.loss.has_policy or self._has_spans(phase)

    def _has_spans(self, phase: Phase) -> bool:
        bridges = [self.teachers[name].bridge for name in self.teachers_of(phase).scoring()]
        return any(bridge is not None and bridge.kind == "span" for bridge in bridges)

    def needs_prior_policy(self, phase: Phase) -> bool:
        """Whether a phase needs the student's log-probabilities before a round's first update."""
        loss, sampled = phase.loss, phase.loss.sampled_reverse_kl
        return bool(
            self._has_spans(phase)
            or phase.balance.follow_gap
            or (loss.has_policy and phase.updates_per_round > 1)
            or (loss.has_policy and phase.correction.kind == "sequence_mask")
            or (sampled is not None and sampled.needs_full_responses)
        )

    @property
    def num_updates(self) -> int:
        """Optimizer updates over all phases."""
        return sum(phase.updates for phase in self.phases)
