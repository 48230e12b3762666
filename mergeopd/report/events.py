"""What the engine tells while it works. Plain values only; whoever reports decides what to show.

Means are per response token unless said otherwise; log-probs and divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mergeopd.types import Finish, Origin

StageName = Literal["rollout", "teachers", "update", "evaluation", "export", "text", "checkpoint"]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run begins or goes on. `phases` are (name, updates); `resumed_at` counts updates done before."""

    name: str
    recipe: str
    num_updates: int
    phases: tuple[tuple[str, int], ...]
    teachers: tuple[str, ...]
    domains: tuple[str, ...]
    output: Path
    resumed_at: int = 0


@dataclass(frozen=True, slots=True)
class StageStarted:
    """Work begins that may take a while; it ends where the next stage or event of the loop begins.

    `detail` says on what (`math`, `merged on math`), `total` is how many `unit`s there are, None if unknown.
    """

    stage: StageName
    detail: str = ""
    total: int | None = None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class StageProgress:
    """`done` of the present stage's `total`."""

    done: int


@dataclass(frozen=True, slots=True)
class BridgeFigures:
    """A teacher with another tokenizer in one update.

    Groups are stretches of tokens of both sides that stand for the same bytes. `unaligned_fraction` of the
    student's tokens is in none and learns nothing from this teacher; `matched_fraction` is the mass of the
    teacher's distributions on tokens that are compared by identity, None where the bridge compares none so.
    """

    num_groups: int
    unaligned_fraction: float
    tokens_per_group: float
    matched_fraction: float | None


@dataclass(frozen=True, slots=True)
class TeacherStats:
    """One teacher in one update.

    `divergence` maps the objective's divergences to unweighted means over the teacher's tokens; the first one
    is shown. Where there are none, `sampled_reverse_kl` stands in (k3). `logprob_gap` is the mean of
    logprob_T - logprob_S at the sampled tokens. With a `bridge` both are means over groups, None where there
    was none to compare, and the divergence is the bridge's measure (of `span`, minus the gap).
    """

    num_tokens: int
    divergence: Mapping[str, float | None]
    logprob_gap: float | None
    entropy_T: float | None = None
    bridge: BridgeFigures | None = None


@dataclass(frozen=True, slots=True)
class DomainStats:
    """One domain in one update.

    Tokens are those in the loss. `mean_length` is in tokens, `token_share` of the update's tokens, `weight`
    the balance factor. `loss_share` is its part of the tokens' absolute losses, None where all are zero.
    `nll` is the mean of -logprob_S of the text, whoever wrote it; `reward` the mean over answers that were
    checked; `truncated_fraction` the share of answers that ended at the length limit.
    """

    num_rollouts: int
    num_tokens: int
    mean_length: float
    token_share: float
    weight: float
    nll: float
    entropy_S: float
    truncated_fraction: float
    reward: float | None = None
    loss_share: float | None = None


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """Policy terms in one update, over the tokens that the student wrote.

    `corrected_fraction` is the share whose importance weight was bounded or masked, `clipped_fraction` the
    share without gradient because of the clip, `importance_weight` the mean weight. `behaviour_gap` and
    `behaviour_gap_max` are mean and maximum of |log pi_old - log behaviour|. `silent_groups_fraction` is the
    share of the round's groups whose answers all had one reward; None without groups.
    """

    corrected_fraction: float
    clipped_fraction: float
    importance_weight: float
    behaviour_gap: float
    behaviour_gap_max: float
    silent_groups_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class UpdateDone:
    """One optimizer update. `update` counts over the run from 1, `round` over the run from 0.

    `num_tokens` are response tokens in the loss, `grad_norm` is before clipping, `clip_factor` what clipping
    multiplied the gradient with (1: it was not clipped), `on_policy_fraction` the share of answers that the
    student wrote. `seconds` maps `rollout`, `teachers`, `update` (and `text`, once a phase) to the wall time
    spent since the last update, so a round's rollout counts to its first update. `teacher_bytes_read` counts
    from the start of the process; `policy` is None without policy terms.
    """

    update: int
    phase: str
    round: int
    lr: float
    loss: float
    grad_norm: float
    num_tokens: int
    on_policy_fraction: float
    teachers: Mapping[str, TeacherStats]
    domains: Mapping[str, DomainStats]
    seconds: Mapping[str, float]
    teacher_bytes_read: int = 0
    policy: PolicyStats | None = None
    clip_factor: float = 1.0

    @property
    def step_s(self) -> float:
        """Seconds of the work that every round repeats."""
        return sum(seconds for name, seconds in self.seconds.items() if name != "text")


@dataclass(frozen=True, slots=True)
class TeacherTrace:
    """What one teacher says of every token of an answer.

    `divergence` is the first one of the objective, unweighted; `logprob_T` that of the token as written.
    Tokens that are not in the loss have no number. `masked` are positions of end tokens that do not count in
    this teacher's term, because it ends answers otherwise.
    """

    divergence: tuple[float | None, ...]
    logprob_T: tuple[float | None, ...]
    masked: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RolloutSampled:
    """An answer of an update, token by token, for people to look at.

    `prompt` is the student's rendering. The texts in `tokens` make up the answer; where a character is
    spread over several tokens, the last of them carries it and the others are empty. `divergence` names
    what the traces hold, "" where the objective has none. Numbers have six significant digits and are those
    of the loss: under its temperature, before the update. `trained` flags the tokens that are in the loss,
    None where all are; others (of tools, users, the template) have no number.
    """

    update: int
    phase: str
    domain: str
    key: str
    prompt: str
    tokens: tuple[str, ...]
    logprob_S: tuple[float | None, ...]
    divergence: str
    teachers: Mapping[str, TeacherTrace]
    reward: float | None
    origin: Origin
    finish: Finish
    trained: tuple[bool, ...] | None = None


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is complete on disk."""

    update: int
    path: Path


@dataclass(frozen=True, slots=True)
class CheckpointSkipped:
    """A checkpoint was not trusted."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something a person should know."""

    text: str


@dataclass(frozen=True, slots=True)
class EvaluationDone:
    """Accuracy (0 to 1) of one model on one domain; `model` is base, expert, weight_average or merged."""

    model: str
    domain: str
    accuracy: float
    num_prompts: int


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The end. `seconds` are of this process, by stage, with their sum as `total`.

    `result` is `report.result.result_document`'s, None where the recipe evaluates nothing.
    """

    seconds: Mapping[str, float]
    result: Mapping[str, Any] | None = None
    result_path: Path | None = None
    export_path: Path | None = None


Event = (
    RunStarted
    | StageStarted
    | StageProgress
    | UpdateDone
    | RolloutSampled
    | CheckpointSaved
    | CheckpointSkipped
    | Note
    | EvaluationDone
    | RunFinished
)


class Reporter(Protocol):
    """Takes events as they happen, in order, from one thread."""

    def emit(self, event: Event) -> None:
        """Report the event. An error here stops the run."""


class Reporters:
    """Hands every event to each reporter, in the order given."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def emit(self, event: Event) -> None:
        """Pass the event on."""
        for reporter in self._reporters:
            reporter.emit(event)
