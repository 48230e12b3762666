"""Events that the engine emits, with plain values only; reporters choose what to show.

Means are per response token unless said otherwise; log-probs and divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from mergeopd.distributed.communicator import Communicator
from mergeopd.reporting.result import AlarmSummary, Estimate, Model, Result
from mergeopd.storage.selection import SelectedShare
from mergeopd.types import Finish, Origin

if TYPE_CHECKING:
    from mergeopd.reporting.jsonl import UpdateRecord

StageName = Literal["startup", "text", "rollout", "teachers", "update", "checkpoint", "export", "evaluation"]


class Event:
    """Base of all events."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class RunFacts:
    """The models of a run and what they run on.

    `student` is its folder, `num_parameters` its size, of which `num_trainable` are trained. `teachers` maps
    names to sizes, to the API's name of a model that writes text only, and to None for the student itself.
    `quantized` says of quantised teachers how far they are from their own weights. `num_threads` are those of
    each process.
    """

    student: str
    dtype: str
    num_parameters: int
    num_trainable: int
    teachers: Mapping[str, int | str]
    device: str
    num_threads: int
    num_processes: int
    quantized: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run starts or resumes. `phases` are (name, updates); `resumed_at` counts updates done before.

    `seconds` is the wall time of the run so far, `history` has records of the last updates done before.
    """

    name: str
    recipe: str
    num_updates: int
    phases: tuple[tuple[str, int], ...]
    teachers: tuple[str, ...]
    domains: tuple[str, ...]
    output: Path
    resumed_at: int = 0
    seconds: float = 0.0
    history: Sequence[UpdateRecord] = ()
    facts: RunFacts | None = None


@dataclass(frozen=True, slots=True)
class StageStarted(Event):
    """Start of work that may take a while; it ends with the next stage or event of the loop.

    `detail` is its subject (`math`, `merged on math`), `total` the number of `unit`s, None if unknown.
    """

    stage: StageName
    detail: str = ""
    total: int | None = None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class StageProgress(Event):
    """`done` of the current stage's `total`."""

    done: int


@dataclass(frozen=True, slots=True)
class BridgeFigures:
    """A teacher with another tokenizer in one update.

    Groups are runs of tokens of both sides with the same bytes. `unaligned_fraction` of the student's
    tokens is in no group and has no term of this teacher; `matched_fraction` is the mass of the teacher's
    distributions on tokens that are compared by identity, None for bridges without such tokens.
    """

    num_groups: int
    unaligned_fraction: float
    tokens_per_group: float
    matched_fraction: float | None


@dataclass(frozen=True, slots=True)
class TeacherStats:
    """One teacher in one update.

    `divergence` maps the objective's divergences to unweighted means over the teacher's tokens; the first one
    is shown. An objective without divergences has `sampled_reverse_kl` (k3). `logprob_gap` is the mean of
    logprob_T - logprob_S at the sampled tokens; `logprob_gap_student` that on the student's own responses and
    `logprob_gap_text` that on text of others, None without any. With a `bridge` all are means over groups,
    None without groups, and the divergence is the bridge's measure (of `span`, minus the gap).

    Of 2604.13016, with k = 16: `overlap` is the share of both models' k most probable tokens that is common,
    `overlap_advantage` the mean over these of pbar_S (log pbar_T - log pbar_S), both renormalised on them;
    `shared_mass_S` and `shared_mass_T` are the probability of either model on them, and `entropy_gap` the
    mean |H(teacher) - H(student)|. The entropy gap is over all of the teacher's tokens, the others over a
    part of them (`batch/collate.py`); None where the teacher's distribution or likeliest tokens are unknown.
    """

    num_tokens: int
    divergence: Mapping[str, float | None]
    logprob_gap: float | None
    entropy_T: float | None = None
    bridge: BridgeFigures | None = None
    logprob_gap_student: float | None = None
    logprob_gap_text: float | None = None
    overlap: float | None = None
    overlap_advantage: float | None = None
    entropy_gap: float | None = None
    shared_mass_S: float | None = None
    shared_mass_T: float | None = None


@dataclass(frozen=True, slots=True)
class DomainStats:
    """One domain in one update.

    Tokens are those in the loss. `mean_length` is in tokens, `token_share` of the update's tokens, `weight`
    the balance factor. `loss_share` is its part of the tokens' absolute losses, None where all are zero.
    `nll` is the mean of -logprob_S of the text, whichever model generated it; `reward` the mean over verified
    responses; `truncated_fraction` the share of responses that ended at the length limit, `repetition` the
    share of 4-grams that occurred earlier in their response, None where all responses are shorter.
    `mean_turns` and `mean_calls` are the assistant's turns and calls per response with tools,
    `failed_call_fraction` the share of calls that could not be run; None without an environment.
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
    repetition: float | None = None
    mean_turns: float | None = None
    mean_calls: float | None = None
    failed_call_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class PolicyStats:
    """Policy terms in one update, over the tokens that the student generated.

    `corrected_fraction` is the share whose importance weight was bounded or masked, `clipped_fraction` the
    share without gradient because of the clip, `importance_weight` the mean weight. `rollout_logprob_gap`
    and `rollout_logprob_gap_max` are mean and maximum of |log pi_old - log behaviour|.
    `zero_advantage_fraction` is the share of the round's groups whose responses all had one reward; None
    without groups.
    """

    corrected_fraction: float
    clipped_fraction: float
    importance_weight: float
    rollout_logprob_gap: float
    rollout_logprob_gap_max: float
    zero_advantage_fraction: float | None = None


@dataclass(frozen=True, slots=True)
class ServingStats:
    """Inference servers in the first update of a round.

    `generation_s` is the wall time from the first request of the round to its last response, also of what ran
    while earlier rounds were scored and trained on; `wait_s` is the part for which the run waited, and
    `sync_s` the time of passing weights to the servers. `lag` and `lag_max` are mean and maximum of the
    updates between the weights that generated a response and those that learn from it. Requests that were
    repeated, responses of wrong weights (generated again) and losses of servers count from the start of the
    process. `engine_gap`, `engine_gap_max` and `engine_kl` compare the
    servers' log-probabilities with the student's
    (`student/parity.py`); None where they were not compared.
    """

    generation_s: float
    wait_s: float
    sync_s: float
    lag: float
    lag_max: float
    num_retries: int
    num_stale: int
    num_lost: int
    engine_gap: float | None = None
    engine_gap_max: float | None = None
    engine_kl: float | None = None


def step_s(seconds: Mapping[str, float]) -> float:
    """Add the seconds of an update's stages, except those of the first update of a process or phase."""
    return sum(value for name, value in seconds.items() if name not in ("startup", "text", "interim"))


@dataclass(frozen=True, slots=True)
class UpdateDone(Event):
    """One optimizer update. `update` counts over the run from 1, `round` over the run from 0.

    `num_tokens` are response tokens in the loss, `grad_norm` is before clipping, `on_policy_fraction` the
    share of responses that the student generated. `seconds` maps `rollout`, `teachers`, `update` (and `text`,
    once a phase) to the wall time since the last update, so a round's rollout counts to its first update.
    `teacher_bytes_read` counts from the start of the process; `policy` is None without policy terms.
    `num_generated` counts the tokens of the update's responses by the origin of the text, `flops` the
    operations that they cost by stage (`models/flops.py`). `peak_memory_bytes` is the most that any process
    has had so far: allocated on its GPU, or resident without one.
    `verifier_failures` counts, by source, responses that have no reward because their verifier failed.
    `text_kept` is the share of teachers' responses that the phase keeps, by teacher and domain, and
    `selected` the share of each source's prompts that it draws from; empty if these are all. `serving` is
    None without inference servers, and after the first update of a round.
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
    peak_memory_bytes: int = 0
    num_generated: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    policy: PolicyStats | None = None
    verifier_failures: Mapping[str, int] = field(default_factory=dict)
    clip_factor: float = 1.0
    text_kept: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    selected: Mapping[str, float] = field(default_factory=dict)
    serving: ServingStats | None = None

    @property
    def step_s(self) -> float:
        """Seconds of the stages that recur."""
        return step_s(self.seconds)


Candidates = tuple[tuple[tuple[str, float], ...] | None, ...]
"""A model's most probable tokens with their log-probs, per token of a response; None if not in the loss."""


@dataclass(frozen=True, slots=True)
class TeacherTrace:
    """One teacher's numbers for every token of a response.

    `divergence` is the first one of the objective, unweighted; `logprob_T` that of the sampled token.
    Tokens that are not in the loss have no number. `masked` are positions of end tokens that are left out of
    this teacher's term, because its own end token differs. `candidates` are known where the loss
    has its distribution over the student's vocabulary, or its top k.
    """

    divergence: tuple[float | None, ...]
    logprob_T: tuple[float | None, ...]
    masked: tuple[int, ...] = ()
    candidates: Candidates | None = None


@dataclass(frozen=True, slots=True)
class RolloutSampled(Event):
    """A response of an update, token by token; also the record of a line in rollouts/samples.jsonl.

    `prompt` is the student's rendering. The texts in `tokens` make up the response; a character that is
    spread over several tokens is in the last of them, and the others are empty. `divergence` names the
    values of the traces, "" where the objective has none. Numbers have six significant digits and are those
    of the loss: under its temperature, before the update. `trained` flags the tokens that are in the loss,
    None where all are; others (of tools, users, the template) have no number. `reference` is the prompt's, if
    it has one; `candidates` are the student's.

    Raises:
        ValueError: the numbers of tokens and values differ.
    """

    update: int
    phase: str
    domain: str
    key: str
    origin: Origin
    finish: Finish
    reward: float | None
    prompt: str
    tokens: tuple[str, ...]
    logprob_S: tuple[float | None, ...]
    divergence: str
    teachers: Mapping[str, TeacherTrace]
    trained: tuple[bool, ...] | None = None
    reference: str | None = None
    candidates: Candidates | None = None

    def __post_init__(self) -> None:
        rows: list[tuple[object, ...]] = [self.logprob_S]
        traces = self.teachers.values()
        rows += [row for trace in traces for row in (trace.divergence, trace.logprob_T)]
        optional = [self.trained, self.candidates, *(trace.candidates for trace in traces)]
        rows += [row for row in optional if row is not None]
        if any(len(row) != len(self.tokens) for row in rows):
            raise ValueError("the numbers of tokens and values differ")


@dataclass(frozen=True, slots=True)
class CheckpointSaved(Event):
    """A checkpoint is complete on disk."""

    update: int
    path: Path


@dataclass(frozen=True, slots=True)
class CheckpointSkipped(Event):
    """A checkpoint is incomplete or damaged and was not used."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Note(Event):
    """A remark for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class PromptsSelected(Event):
    """A phase has selected the prompts of one source that it draws from."""

    share: SelectedShare

    @property
    def text(self) -> str:
        each = self.share
        kept = (
            f"{each.num_kept:,} of {each.num_prompts:,} prompts of {each.source} ({each.kept_fraction:.0%})"
        )
        reasons = f"; {each.reasons}" if each.dropped else ""
        return f"phase '{each.phase}' draws from {kept}{reasons}"


@dataclass(frozen=True, slots=True)
class AccuracyMeasured(Event):
    """Accuracy (0 to 1) of the student after `update` updates, by suite; `num_prompts` were measured of each.

    Also the record of a line in accuracy.jsonl.
    """

    update: int
    accuracy: Mapping[str, Estimate]
    num_prompts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class AlarmRaised(Event):
    """A sign that the run goes wrong, at `update`; also the record of a line in alarms.jsonl.

    `name` is the alarm's key in the recipe, `subject` the domain or teacher concerned, "" for the run.
    `finding` is what was seen, with its figure and threshold; `cause` is likely, `remedy` names the setting
    to change. `stops`: the recipe asks to stop the run.
    """

    update: int
    name: str
    subject: str
    finding: str
    cause: str
    remedy: str
    stops: bool


@dataclass(frozen=True, slots=True)
class StopRequested(Event):
    """A signal asks the run to stop. Sent to the display only, and from another thread than other events."""

    signal: str


@dataclass(frozen=True, slots=True)
class EvaluationDone(Event):
    """Accuracy (0 to 1) of one model on one suite; `is_own_expert`: the student's expert there."""

    model: Model
    suite: str
    accuracy: Estimate
    is_own_expert: bool


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """The end. `seconds` are wall seconds by stage, with their sum as `total`.

    `result` is None where the recipe evaluates nothing. Paths are those to show, `alarms` those of the run.
    """

    seconds: Mapping[str, float]
    result: Result | None = None
    result_path: Path | None = None
    export_path: Path | None = None
    report_path: Path | None = None
    alarms: tuple[AlarmSummary, ...] = ()


class Reporter(Protocol):
    """Receives events as they happen, in order, from one thread."""

    def emit(self, event: Event) -> None:
        """Report the event.

        Raises:
            StorageError: a file that belongs to the run cannot be written.
        """


class Reporters:
    """Passes every event to each reporter in order."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def emit(self, event: Event) -> None:
        for reporter in self._reporters:
            reporter.emit(event)


def progress(reporter: Reporter, total: int, ranks: Communicator) -> Callable[[int], None]:
    """Return a callback that takes the items done on this rank and reports an estimate for all `total`."""
    return lambda done: reporter.emit(StageProgress(min(total, done * ranks.size)))
