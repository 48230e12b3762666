"""Write inspect.html: one file that loads nothing, built from the records of an inspection only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mergeopd.messages import joined
from mergeopd.reporting.estimate import duration, shown_parts
from mergeopd.reporting.inspection import (
    VERDICT_TITLES,
    AlignmentRank,
    DiffSpan,
    Inspection,
    Signal,
    TeacherInspection,
    Verdict,
    VerdictKind,
)
from mergeopd.reporting.page.html import clock_time, render_page
from mergeopd.reporting.page.inspection_charts import (
    PositionChart,
    alignment_chart,
    position_charts,
    teacher_map,
)
from mergeopd.reporting.page.inspection_tokens import MAX_TOKENS, STRONG, ResponseView, TokenPool, legend
from mergeopd.reporting.page.responses import LEVELS
from mergeopd.storage.folders import write_atomic

_STANDINGS: Mapping[VerdictKind, str] = {
    "ready": "good",
    "cold_start": "fair",
    "template_mismatch": "poor",
    "noisy": "fair",
    "wrong_teacher": "poor",
    "nothing_new": "none",
    "unknown": "none",
}
_QUANTITIES = (
    ("pass_rate_S", "pass rate, student", "correct responses, in %"),
    ("pass_rate_T", "pass rate, teacher", "on the same prompts, in %"),
    ("pass_gain", "pass rate gained", "teacher minus student, in percentage points"),
    ("overlap", "overlap", "of the likeliest tokens, in %"),
    ("overlap_advantage", "overlap advantage", "on the common tokens, nats; 0 where both agree"),
    ("reverse_kl", "reverse KL", "nats per token"),
    ("first_token_kl", "reverse KL at first", "at the first token of responses, nats"),
    ("forward_kl", "forward KL", "nats per token"),
    ("logprob_gap", "log-prob gap", "teacher minus student, on the student's responses"),
    (
        "teacher_logprob_gap",
        "log-prob gap, teacher's text",
        "student minus teacher, on the teacher's responses",
    ),
    ("entropy_S", "entropy, student", "nats"),
    ("entropy_T", "entropy, teacher", "nats"),
    ("own_entropy_T", "entropy, teacher's text", "of the teacher on its own responses, nats"),
    ("entropy_gap", "entropy gap", "mean of the absolute differences, nats"),
    ("shared_mass_S", "mass in common, student", "on the common tokens, in %"),
    ("shared_mass_T", "mass in common, teacher", "on the common tokens, in %"),
)
_FRACTIONS = frozenset(
    {"pass_rate_S", "pass_rate_T", "pass_gain", "overlap", "shared_mass_S", "shared_mass_T"}
)
_SHARES = (
    ("truncated_S", "truncated, student", "responses that reached the length limit, in %"),
    ("truncated_T", "truncated, teacher", "responses that reached the length limit, in %"),
    ("foreign_ends", "foreign ends", "responses whose end token the teacher does not use, in %"),
)
_COUNTS = (
    ("num_prompts", "prompts"),
    ("num_frontier", "prompts solved sometimes"),
    ("num_responses", "responses"),
    ("num_tokens", "tokens"),
)
_MAX_EQUAL = 500
_LEFT_OF_EQUAL = 160


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: its anchor, its title in the navigation, a template of `assets/` and its data."""

    id: str
    title: str
    template: str
    view: Any


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of signals: all prompts, or those of a domain."""

    title: str
    signal: Signal
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class TeacherView:
    """A teacher's section."""

    index: int
    teacher: TeacherInspection
    columns: tuple[Column, ...]
    charts: tuple[PositionChart, ...]
    alignment: PositionChart | None
    responses: tuple[ResponseView, ...]

    @property
    def has_template_problem(self) -> bool:
        """Whether the teacher's template harms; a different one does not by itself."""
        findings = self.teacher.compatibility.findings
        return self.teacher.verdict.kind == "template_mismatch" or any(
            finding.topic == "template" and finding.level == "problem" for finding in findings
        )


def write_inspection_page(inspection: Inspection, file: Path) -> None:
    """Write `inspect.html`. Raises StorageError if the disk refuses."""
    write_atomic(file, render(inspection, datetime.now().astimezone()))


def render(inspection: Inspection, now: datetime) -> str:
    """Render the page of an inspection."""
    num_responses = sum(len(teacher.responses) for teacher in inspection.teachers)
    pool = TokenPool(MAX_TOKENS // max(1, num_responses))
    sections = build_sections(inspection, pool)
    return render_page(
        "inspection.html.j2",
        inspection.recipe,
        now,
        pool.document(),
        script="inspection.js",
        has_charts=False,
        inspection=inspection,
        created=_created(inspection.created),
        sections=sections,
        titles=VERDICT_TITLES,
        standings=_STANDINGS,
        quantities=_QUANTITIES,
        fractions=_FRACTIONS,
        shares=_SHARES,
        counts=_COUNTS,
        levels=LEVELS,
        legend=legend(),
        strong=STRONG,
        sides=sides,
        shown_parts=shown_parts,
        duration=duration,
    )


def build_sections(inspection: Inspection, pool: TokenPool) -> tuple[Section, ...]:
    """Build the parts of the page in their order, without those that the inspection lacks."""
    teachers = (_teacher(i, teacher, pool) for i, teacher in enumerate(inspection.teachers))
    several = (
        Section("alignments", "Alignment", "inspection_alignments.html.j2", _alignments(inspection)),
        Section("conflicts", "Conflicts", "inspection_conflicts.html.j2", inspection.conflicts),
        Section("domains", "Domains", "inspection_domains.html.j2", inspection.domains),
        Section("checkpoints", "Checkpoints", "inspection_checkpoints.html.j2", _by_domain(inspection)),
        Section("cost", "Cost", "inspection_cost.html.j2", inspection.cost),
    )
    return (
        Section("overview", "Overview", "inspection_overview.html.j2", _overview(inspection)),
        *(Section(f"teacher-{v.index}", v.teacher.name, "inspection_teacher.html.j2", v) for v in teachers),
        *(section for section in several if section.view),
        Section("settings", "Settings", "inspection_settings.html.j2", inspection.settings),
    )


def _overview(inspection: Inspection) -> dict[str, Any]:
    teachers = inspection.teachers
    groups: dict[VerdictKind, list[tuple[int, TeacherInspection]]] = {}
    for kind in _STANDINGS:
        members = [(i, teacher) for i, teacher in enumerate(teachers) if teacher.verdict.kind == kind]
        if members:
            groups[kind] = members
    return {
        "headline": headline(teachers),
        "standing": _standing(teachers),
        "groups": groups,
        "map": teacher_map(teachers),
        "decided": [(i, teacher) for i, teacher in enumerate(teachers) if teacher.verdict.reasons],
    }


def headline(teachers: Sequence[TeacherInspection]) -> str:
    """Say how many teachers are ready."""
    ready = [teacher.name for teacher in teachers if teacher.verdict.kind == "ready"]
    if len(teachers) == 1:
        kind = teachers[0].verdict.kind
        return (
            f"{teachers[0].name} is ready to teach"
            if ready
            else f"{teachers[0].name}: {VERDICT_TITLES[kind]}"
        )
    if not ready:
        return f"None of {len(teachers)} teachers is ready"
    if len(ready) == len(teachers):
        return f"All {len(teachers)} teachers are ready to teach"
    verb = "is" if len(ready) == 1 else "are"
    return f"{len(ready)} of {len(teachers)} teachers {verb} ready to teach: {joined(ready, 'and')}"


def _standing(teachers: Sequence[TeacherInspection]) -> str:
    kinds = {_STANDINGS[teacher.verdict.kind] for teacher in teachers}
    return next((kind for kind in ("poor", "fair", "none") if kind in kinds), "good")


def _teacher(index: int, teacher: TeacherInspection, pool: TokenPool) -> TeacherView:
    columns = []
    if teacher.signal is not None:
        columns.append(Column("all prompts", teacher.signal, None))
    if len(teacher.by_domain) > 1:
        columns += [
            Column(domain, signal, teacher.domain_verdicts.get(domain))
            for domain, signal in teacher.by_domain.items()
        ]
    gradients = teacher.gradients
    return TeacherView(
        index=index,
        teacher=teacher,
        columns=tuple(columns),
        charts=position_charts(teacher.signal, teacher.by_domain, teacher.verdict.beyond),
        alignment=alignment_chart(gradients.positions) if gradients and gradients.positions else None,
        responses=tuple(pool.add(response) for response in teacher.responses),
    )


def _alignments(inspection: Inspection) -> dict[str, Any]:
    by_domain: dict[str, dict[str, AlignmentRank]] = {}
    for rank in inspection.alignments:
        by_domain.setdefault(rank.domain, {})[rank.teacher] = rank
    if not by_domain:
        return {}
    compared = {rank.teacher for rank in inspection.alignments}
    names = [teacher.name for teacher in inspection.teachers if teacher.name in compared]
    return {"teachers": names, "by_domain": by_domain}


def _by_domain(inspection: Inspection) -> dict[str, list[Any]]:
    ranks: dict[str, list[Any]] = {}
    for rank in inspection.checkpoints:
        ranks.setdefault(rank.domain, []).append(rank)
    return ranks


def sides(spans: Sequence[DiffSpan]) -> dict[str, list[tuple[str, str]]]:
    """Return the parts of both: each `equal`, `differs`, `absent` or `left_out`, and its text.

    After a difference, a `pad` of newlines lets equal lines face each other.
    """
    result: dict[str, list[tuple[str, str]]] = {"student": [], "teacher": []}
    for span in spans:
        for side, text in (("student", span.student), ("teacher", span.teacher)):
            if not span.is_equal:
                missing = max(span.student.count("\n"), span.teacher.count("\n")) - text.count("\n")
                result[side] += [("differs" if text else "absent", text), ("pad", "\n" * missing)]
            elif len(text) <= _MAX_EQUAL:
                result[side].append(("equal", text))
            else:
                num_left_out = len(text) - 2 * _LEFT_OF_EQUAL
                result[side] += [
                    ("equal", text[:_LEFT_OF_EQUAL]),
                    ("left_out", f"{num_left_out:,} equal characters"),
                    ("equal", text[-_LEFT_OF_EQUAL:]),
                ]
    return result


def _created(text: str) -> str:
    try:
        return clock_time(datetime.fromisoformat(text))
    except ValueError:
        return text
