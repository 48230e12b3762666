"""contribution.json: what a finished run changed in its student, for the terminal, the page and programs.

Units and estimates are those of `inspect.json`, with which it shares its version. It is a file of its own,
because a run folder can have both: `inspect.json` from before the run, and this one from after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from mergeopd.config.schema import DIALECT, Schema, tidied
from mergeopd.errors import StorageError
from mergeopd.reporting.inspection import VERSION
from mergeopd.reporting.result import Estimate
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.metrics import json_text
from mergeopd.types import Finish

if TYPE_CHECKING:
    import pandas
    import pyarrow

MeasuredOn = Literal["evaluation", "sample"]
"""The responses of the run's evaluation, or those that the inspection sampled to prompts of training."""

_UNKNOWN = Estimate(None)


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of the base and of the merged student on the same prompts.

    `change` is the merged student's minus the base's, with its paired interval.
    """

    base: Estimate = _UNKNOWN
    merged: Estimate = _UNKNOWN
    change: Estimate = _UNKNOWN

    @property
    def sign(self) -> int:
        """The sign of the change; 0 if its interval contains zero or it is not known."""
        return ((self.change.low or 0.0) > 0) - ((self.change.high or 0.0) < 0)


@dataclass(frozen=True, slots=True)
class TeacherChange:
    """What a run changed between a teacher and the student, on some of the teacher's prompts.

    reverse_kl, overlap, logprob_gap   as in `Signal`, each student on its own responses
    teacher_logprob_gap   mean log p of student minus teacher at the tokens of the teacher's own responses
    pass_rate             of both students; `pass_rate_T` is the teacher's
    closed                share of the base's reverse KL that is gone: 1 - merged / base
    recovered             share of the teacher's lead in pass rate that the merged student reached
    rest_share            share of what is left to learn, in nats over all tokens of the sample, over all
                          teachers; None without distributions, and for one that followed the student
    """

    num_prompts: int
    num_responses: int
    num_tokens: int
    reverse_kl: Change
    overlap: Change
    logprob_gap: Change
    teacher_logprob_gap: Change
    pass_rate: Change
    pass_rate_T: Estimate
    closed: Estimate
    recovered: Estimate
    rest_share: float | None = None


@dataclass(frozen=True, slots=True)
class TeacherContribution:
    """A teacher of the run; `fault` is the reason why it was not measured."""

    name: str
    model: str
    total: TeacherChange | None = None
    by_domain: Mapping[str, TeacherChange] = field(default_factory=dict)
    fault: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DomainChange:
    """How the student's responses in a domain changed; `name` is a suite of the evaluation or a domain.

    length       mean number of tokens
    truncated    share of responses that reached the length limit
    tool_calls   share of responses with a tool call, also one that cannot be read
    refusals     share of responses that begin as refusals do (a heuristic)
    repetition   share of 4-grams that occurred earlier in their response, mean over responses
    """

    name: str
    domain: str
    measured_on: MeasuredOn
    is_trained: bool
    num_prompts: int
    pass_rate: Change
    length: Change = Change()
    truncated: Change = Change()
    tool_calls: Change = Change()
    refusals: Change = Change()
    repetition: Change = Change()


@dataclass(frozen=True, slots=True)
class StudentResponse:
    """One response; `reward` is None without a verifier, or where it failed with the reason in `failure`."""

    text: str
    reward: float | None
    failure: str | None
    finish: Finish
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ChangedResponse:
    """The responses of both students to a prompt; `change` is that of the prompt's mean reward."""

    name: str
    measured_on: MeasuredOn
    key: str
    prompt: str
    reference: str | None
    change: float | None
    base: StudentResponse
    merged: StudentResponse


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a run changed. `forgotten` names the domains whose pass rate fell by more than noise.

    `summary` says it in sentences, the most important first.
    """

    version: int
    run: str
    name: str
    plan_hash: str
    base: str
    merged: str
    created: str
    settings: Mapping[str, float | int | str]
    summary: tuple[str, ...]
    teachers: tuple[TeacherContribution, ...]
    domains: tuple[DomainChange, ...]
    forgotten: tuple[str, ...] = ()
    responses: tuple[ChangedResponse, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def cells(self) -> Iterator[tuple[str, str, TeacherChange]]:
        """Every teacher, domain, and what changed there."""
        for teacher in self.teachers:
            for domain, change in teacher.by_domain.items():
                yield teacher.name, domain, change

    def document(self) -> dict[str, Any]:
        """Return the JSON values of `contribution.json`."""
        return asdict(self)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat row per teacher and domain, for data frames."""
        return [
            {"teacher": teacher, "domain": domain} | _flat(change) for teacher, domain, change in self.cells
        ]

    def domain_rows(self) -> list[dict[str, Any]]:
        """Return one flat row per domain or suite, for data frames."""
        return [_flat(domain) for domain in self.domains]

    def to_arrow(self, by: Literal["teacher", "domain"] = "teacher") -> pyarrow.Table:
        """Convert the figures to a table: a row per teacher and domain, or per domain alone."""
        import pyarrow

        rows = self.to_rows() if by == "teacher" else self.domain_rows()
        return pyarrow.table({key: [row[key] for row in rows] for key in (rows[0] if rows else ())})

    def to_pandas(self, by: Literal["teacher", "domain"] = "teacher") -> pandas.DataFrame:
        """Convert the figures to a pandas data frame. Raises ModuleNotFoundError without pandas."""
        return self.to_arrow(by).to_pandas()


def _flat(record: TeacherChange | DomainChange) -> dict[str, Any]:
    """Return the values of a record: of a change, both values and their difference."""
    row: dict[str, Any] = {}
    for each in fields(record):
        value = getattr(record, each.name)
        if isinstance(value, Change):
            for part in fields(value):
                row[f"{each.name}_{part.name}"] = getattr(value, part.name).value
        else:
            row[each.name] = value.value if isinstance(value, Estimate) else value
    return row


_ADAPTER = TypeAdapter(Contribution)


def contribution_schema() -> Schema:
    """Return the JSON Schema of `contribution.json`."""
    schema = tidied(_ADAPTER.json_schema(mode="serialization"))
    schema["properties"]["version"] = {"const": VERSION}
    return {"$schema": DIALECT, "title": "mergeopd contribution", **schema}


def write_contribution(contribution: Contribution, file: Path) -> None:
    """Write `contribution.json`. Raises StorageError if the disk refuses."""
    write_atomic(file, json_text(contribution.document()))


def read_contribution(file: Path) -> Contribution:
    """Read `contribution.json`. Raises StorageError for a missing or damaged file."""
    try:
        contribution = _ADAPTER.validate_json(file.read_bytes())
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise StorageError(f"{file} is no contribution of this version of mergeopd: {error}") from error
    if contribution.version != VERSION:
        raise StorageError(
            f"{file} has version {contribution.version}; this version of mergeopd reads {VERSION}"
        )
    return contribution
