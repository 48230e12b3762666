"""inspect.json: what an inspection found, for the terminal, the page and programs.

Fractions are from 0 to 1, divergences and entropies in nats per token, lengths in tokens. An `Estimate` has a
95 % interval by prompts, and the value None where the quantity is not defined. Records are plain values; the
version changes when a field changes its meaning or goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from mergeopd.config.schema import DIALECT, Schema, tidied
from mergeopd.errors import StorageError
from mergeopd.reporting.estimate import Estimate as RunEstimate
from mergeopd.reporting.result import Estimate
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text

if TYPE_CHECKING:
    import pandas
    import pyarrow

VERSION = 1

VerdictKind = Literal[
    "ready",
    "cold_start",
    "template_mismatch",
    "nothing_new",
    "wrong_teacher",
    "noisy",
    "unknown",
]
"""What a teacher is good for: `noisy` beyond a token position; `unknown` where too little was measured."""

VERDICT_TITLES: Mapping[VerdictKind, str] = {
    "ready": "ready",
    "cold_start": "cold start first",
    "template_mismatch": "template mismatch",
    "nothing_new": "nothing new to teach",
    "wrong_teacher": "wrong teacher",
    "noisy": "noisy",
    "unknown": "not known",
}

FindingLevel = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about a teacher and the student, with what to do about it if it is a problem.

    `topic` groups findings: vocabulary, special_tokens, end_tokens, template, context, alignment, licence,
    fingerprint.
    """

    topic: str
    level: FindingLevel
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class DiffSpan:
    """A part of two renderings of one conversation: equal texts, or two that differ (either may be empty)."""

    student: str
    teacher: str

    @property
    def is_equal(self) -> bool:
        return self.student == self.teacher


@dataclass(frozen=True, slots=True)
class TemplateDiff:
    """A conversation rendered for student and teacher. `case` names it: a prompt, one with tools, a turn.

    `causes` names the reasons of differences that were recognised, for example `system default`.
    """

    case: str
    spans: tuple[DiffSpan, ...]
    causes: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        return all(span.is_equal for span in self.spans)


@dataclass(frozen=True, slots=True)
class Compatibility:
    """What is known without running a model. `alignment` is the share of the student's tokens that a teacher
    with another tokenizer can score; None for the student's own tokenizer.
    """

    findings: tuple[Finding, ...]
    templates: tuple[TemplateDiff, ...] = ()
    alignment: Estimate | None = None


_UNKNOWN = Estimate(None)


@dataclass(frozen=True, slots=True)
class PositionBucket:
    """Means over the response tokens at positions `start <= position < stop`.

    `own_entropy_T` is the teacher's entropy on its own responses; all others are on the student's.
    """

    start: int
    stop: int
    num_tokens: int
    reverse_kl: float | None
    overlap: float | None
    entropy_S: float | None
    entropy_T: float | None
    advantage: float | None = None
    alignment: float | None = None
    own_entropy_T: float | None = None
    alignment_low: float | None = None
    alignment_high: float | None = None


@dataclass(frozen=True, slots=True)
class Rendering:
    """A teacher that reads the prompts in another way than its card says: the student's template, another
    value of a template's switch.
    """

    name: str
    pass_rate_T: Estimate
    reverse_kl: Estimate
    first_token_kl: Estimate


@dataclass(frozen=True, slots=True)
class Onset:
    """The token of a teacher's own responses from which its entropy differs most from that before.

    `before` and `after` are the means of that entropy, `num_before` and `num_after` their tokens.
    """

    start: int
    before: float
    after: float
    num_before: int
    num_after: int


@dataclass(frozen=True, slots=True)
class Signal:
    """The distributions of student and teacher over the student's own responses (methods: 2604.13016).

    overlap             share of the k likeliest tokens that both have in common
    overlap_advantage   mean over the common tokens of pbar_S (log pbar_T - log pbar_S), both renormalised
    entropy_gap         mean |H(teacher) - H(student)|
    shared_mass_S, _T   mass of student and teacher on the common tokens
    reverse_kl, forward_kl   exact, over the whole vocabulary; None with another tokenizer
    logprob_gap         mean log p of teacher minus student at the sampled tokens
    pass_rate_S, _T     share of correct responses of student and teacher to the same prompts
    teacher_logprob_gap mean log p of student minus teacher at the tokens of the teacher's own responses
    num_frontier        prompts that the student solves sometimes, but not always
    first_token_kl      reverse KL at the first token of responses
    own_entropy_T       entropy of the teacher on its own responses; `onset` is where it changes most
    pass_gain           pass rate of the teacher minus that of the student, on the same prompts
    max_entropy         log of the vocabulary's size: the entropy of a uniform distribution
    foreign_ends        share of the student's ended responses whose end token the teacher does not use;
                        such tokens are in no other figure
    truncated_S, _T     share of responses that reached the length limit
    """

    num_prompts: int
    num_responses: int
    num_tokens: int
    k: int
    overlap: Estimate
    overlap_advantage: Estimate
    entropy_gap: Estimate
    entropy_S: Estimate
    entropy_T: Estimate
    shared_mass_S: Estimate
    shared_mass_T: Estimate
    reverse_kl: Estimate
    forward_kl: Estimate
    logprob_gap: Estimate
    pass_rate_S: Estimate
    pass_rate_T: Estimate
    teacher_logprob_gap: Estimate
    num_frontier: int
    positions: tuple[PositionBucket, ...] = ()
    first_token_kl: Estimate = _UNKNOWN
    own_entropy_T: Estimate = _UNKNOWN
    pass_gain: Estimate = _UNKNOWN
    max_entropy: float | None = None
    foreign_ends: float | None = None
    truncated_S: float | None = None
    truncated_T: float | None = None
    onset: Onset | None = None
    renderings: tuple[Rendering, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GradientAlignment:
    """Cosine of the ideal gradient with a teacher's distillation gradient (2605.10889).

    `score` is of all tokens of the student's responses to the teacher's prompts together, estimated from
    `num_nodes` drawn ones with `num_rollouts` continuations; `on_correct` and `on_incorrect` are of such
    responses. `num_skipped` of the nodes have no ideal gradient: all their continuations have one reward.
    In `positions`, `num_tokens` counts nodes. `by_domain` also has domains that the teacher does not teach.
    """

    num_nodes: int
    num_skipped: int
    num_rollouts: int
    score: Estimate
    on_correct: Estimate
    on_incorrect: Estimate
    positions: tuple[PositionBucket, ...] = ()
    by_domain: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AlignmentRank:
    """A teacher among all that were compared on one domain, by the alignment of its gradient.

    `behind` is the best teacher's alignment minus this one's, on the same nodes; 0 for the best.
    """

    domain: str
    teacher: str
    alignment: Estimate
    behind: Estimate
    is_best: bool


@dataclass(frozen=True, slots=True)
class Reason:
    """A rule that was judged for a verdict: a number against a threshold of the recipe."""

    text: str
    threshold: str
    value: float | None
    limit: float
    is_met: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict in words. `beyond` is the token from which a noisy teacher is noisy."""

    kind: VerdictKind
    sentence: str
    reasons: tuple[Reason, ...] = ()
    remedy: str = ""
    beyond: int | None = None


@dataclass(frozen=True, slots=True)
class TokenCandidate:
    """A likely next token with its probability."""

    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class InspectedToken:
    """One token of a student's response; `reverse_kl` is None where the teacher does not score it."""

    text: str
    reverse_kl: float | None
    advantage: float | None
    candidates_S: tuple[TokenCandidate, ...] = ()
    candidates_T: tuple[TokenCandidate, ...] = ()


@dataclass(frozen=True, slots=True)
class InspectedResponse:
    """A response of the student with its tokens as one teacher sees them, and the teacher's own response."""

    prompt: str
    domain: str
    is_correct: bool | None
    tokens: tuple[InspectedToken, ...]
    teacher_response: str | None = None
    teacher_is_correct: bool | None = None


@dataclass(frozen=True, slots=True)
class TeacherInspection:
    """A teacher against the student: over all its prompts, and by domain."""

    name: str
    model: str
    licence: str | None
    verdict: Verdict
    compatibility: Compatibility
    signal: Signal | None = None
    by_domain: Mapping[str, Signal] = field(default_factory=dict)
    domain_verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    gradients: GradientAlignment | None = None
    responses: tuple[InspectedResponse, ...] = ()


@dataclass(frozen=True, slots=True)
class DomainBudget:
    """A domain's prompts and tokens in the recipe's phases.

    `share` is its share of prompts, `token_share` of the loss's tokens as expected from the sampled lengths,
    `balanced_share` with the recipe's `balance`. `mean_length` is of the student's responses.
    """

    domain: str
    num_prompts: int
    share: float
    mean_length: float
    token_share: float
    balanced_share: float
    pass_rate: Estimate
    num_frontier: int
    truncated_fraction: float


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two teachers of the same prompts. `cosine` is of their distillation gradients in the logits, `floor`
    the reverse KL in nats per token that no student can go below while it follows both.
    """

    first: str
    second: str
    num_tokens: int
    cosine: Estimate
    floor: Estimate


@dataclass(frozen=True, slots=True)
class CheckpointRank:
    """A checkpoint of an expert as a teacher of one domain: its pass rate there and its signal.

    `behind` is the best checkpoint's pass rate minus this one's, on the same prompts; 0 for the best.
    """

    domain: str
    checkpoint: str
    pass_rate: Estimate
    reverse_kl: Estimate
    verdict: Verdict
    is_best: bool
    behind: Estimate = _UNKNOWN


@dataclass(frozen=True, slots=True)
class Inspection:
    """An inspection of a recipe. `settings` are the sizes of the sample and every threshold, by name."""

    version: int
    recipe: str
    plan_hash: str
    student: str
    created: str
    settings: Mapping[str, float | int | str]
    teachers: tuple[TeacherInspection, ...]
    domains: tuple[DomainBudget, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    checkpoints: tuple[CheckpointRank, ...] = ()
    alignments: tuple[AlignmentRank, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    cost: RunEstimate | None = None

    def document(self) -> dict[str, Any]:
        """Return the JSON values of `inspect.json`."""
        return asdict(self)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat row per teacher and domain ("" for all its prompts), for data frames."""
        rows = []
        for teacher in self.teachers:
            signals = {"": teacher.signal, **teacher.by_domain}
            for domain, signal in signals.items():
                verdict = teacher.domain_verdicts.get(domain, teacher.verdict)
                row: dict[str, Any] = {"teacher": teacher.name, "domain": domain, "verdict": verdict.kind}
                for key, value in {} if signal is None else asdict(signal).items():
                    if key not in ("positions", "onset", "renderings", "notes"):
                        row[key] = value["value"] if isinstance(value, dict) else value
                if domain == "" and teacher.gradients is not None:
                    row["alignment"] = teacher.gradients.score.value
                rows.append(row)
        return rows

    def position_rows(self) -> list[dict[str, Any]]:
        """Return one flat row per teacher, domain ("" for all its prompts) and range of positions."""
        rows = []
        for teacher in self.teachers:
            signals = {"": teacher.signal, **teacher.by_domain}
            aligned = () if teacher.gradients is None else teacher.gradients.positions
            by_range = {(one.start, one.stop): one.alignment for one in aligned}
            for domain, signal in signals.items():
                for bucket in () if signal is None else signal.positions:
                    row = {"teacher": teacher.name, "domain": domain, **asdict(bucket)}
                    if domain == "" and row["alignment"] is None:
                        row["alignment"] = by_range.get((bucket.start, bucket.stop))
                    rows.append(row)
        return rows

    def to_arrow(self, by: Literal["domain", "position"] = "domain") -> pyarrow.Table:
        """Convert the figures to a table: a row per teacher and domain, or also per range of positions."""
        import pyarrow

        rows = self.to_rows() if by == "domain" else self.position_rows()
        keys = dict.fromkeys(key for row in rows for key in row)
        return pyarrow.table({key: [row.get(key) for row in rows] for key in keys})

    def to_pandas(self, by: Literal["domain", "position"] = "domain") -> pandas.DataFrame:
        """Convert the figures to a pandas data frame. Raises ModuleNotFoundError without pandas."""
        return self.to_arrow(by).to_pandas()


_ADAPTER = TypeAdapter(Inspection)


def inspection_schema() -> Schema:
    """Return the JSON Schema of `inspect.json`."""
    schema = tidied(_ADAPTER.json_schema(mode="serialization"))
    schema["properties"]["version"] = {"const": VERSION}
    return {"$schema": DIALECT, "title": "mergeopd inspection", **schema}


def write_inspection(inspection: Inspection, file: Path) -> None:
    """Write `inspect.json`. Raises StorageError if the disk refuses."""
    write_atomic(file, json_text(inspection.document()))


def read_inspection(file: Path) -> Inspection:
    """Read `inspect.json`. Raises StorageError for a file that is missing, damaged or of another version."""
    try:
        inspection = _ADAPTER.validate_json(file.read_bytes())
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise StorageError(f"{file} is no inspection of this version of mergeopd: {error}") from error
    if inspection.version != VERSION:
        raise StorageError(
            f"{file} has version {inspection.version}; this version of mergeopd reads {VERSION}"
        )
    return inspection
