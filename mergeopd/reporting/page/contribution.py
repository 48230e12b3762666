"""Write contribution.html: what a run changed, in one file that loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mergeopd.reporting.contribution import Change, ChangedResponse, Contribution, DomainChange, TeacherChange
from mergeopd.reporting.page.html import clock_time, render_page
from mergeopd.reporting.page.text import visible
from mergeopd.reporting.result import grade
from mergeopd.storage.folders import write_atomic

_FIGURES = (
    (
        "reverse_kl",
        "reverse KL",
        "of the student from the teacher, on its own responses, nats per token",
    ),
    ("overlap", "overlap", "of the likeliest tokens, in %"),
    ("logprob_gap", "log-prob gap", "teacher minus student, on the student's responses, nats per token"),
    ("teacher_logprob_gap", "gap on the teacher's text", "student minus teacher, nats per token"),
    ("pass_rate", "pass rate", "correct responses, in %"),
)
_FRACTIONS = frozenset({"overlap", "pass_rate", "truncated", "tool_calls", "refusals", "repetition"})
_BEHAVIOUR = (
    ("length", "length", "tokens"),
    ("truncated", "cut off", "at the length limit, %"),
    ("tool_calls", "tool calls", "responses with one, %"),
    ("refusals", "refusals", "by their first words, %"),
    ("repetition", "repetition", "repeated 4-grams, %"),
)
_MAX_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Cell:
    """A teacher on a domain; `base` and `merged` are the lengths of its bars of reverse KL, in %."""

    teacher: str
    index: int
    domain: str
    change: TeacherChange
    base: float | None
    merged: float | None


def write_contribution_page(contribution: Contribution, file: Path) -> None:
    """Write `contribution.html`. Raises StorageError if the disk refuses."""
    write_atomic(file, render(contribution, datetime.now().astimezone()))


def render(contribution: Contribution, now: datetime) -> str:
    """Render the page of a contribution."""
    return render_page(
        "contribution.html.j2",
        contribution.name,
        now,
        {},
        script=None,
        has_charts=False,
        contribution=contribution,
        created=clock_time(datetime.fromisoformat(contribution.created)),
        standing=_standing(contribution),
        cells=_cells(contribution),
        responses=_by_name(contribution.responses),
        figures=_FIGURES,
        behaviour=_seen(contribution.domains),
        fractions=_FRACTIONS,
        grade_of=grade,
        shortened=shortened,
    )


def _standing(contribution: Contribution) -> str:
    """Return the colour class: poor if a trained domain is below the base, fair if another is."""
    lost = [domain for domain in contribution.domains if domain.pass_rate.sign < 0]
    if lost:
        return "poor" if any(domain.is_trained for domain in lost) else "fair"
    return "good" if contribution.domains else "none"


def _cells(contribution: Contribution) -> list[Cell]:
    longest = max((c.reverse_kl.base.value or 0.0 for _, _, c in contribution.cells), default=0.0)
    longest = max([longest, *(c.reverse_kl.merged.value or 0.0 for _, _, c in contribution.cells)])

    def length(value: float | None) -> float | None:
        return None if value is None or longest <= 0.0 else 100.0 * max(value, 0.0) / longest

    return [
        Cell(
            teacher.name,
            index,
            domain,
            change,
            length(change.reverse_kl.base.value),
            length(change.reverse_kl.merged.value),
        )
        for index, teacher in enumerate(contribution.teachers)
        for domain, change in teacher.by_domain.items()
    ]


def _seen(domains: tuple[DomainChange, ...]) -> list[tuple[str, str, str]]:
    """Return the figures of behaviour that are not zero everywhere."""
    return [figure for figure in _BEHAVIOUR if any(_is_seen(getattr(one, figure[0])) for one in domains)]


def _is_seen(change: Change) -> bool:
    return bool(change.base.value or change.merged.value)


def _by_name(responses: tuple[ChangedResponse, ...]) -> dict[str, list[ChangedResponse]]:
    by_name: dict[str, list[ChangedResponse]] = {}
    for response in responses:
        by_name.setdefault(response.name, []).append(response)
    return by_name


def shortened(text: str) -> str:
    """Return a text with visible control characters, at most so long that a page can have many of them."""
    more = len(text) - _MAX_CHARACTERS
    return visible(text if more <= 0 else f"{text[:_MAX_CHARACTERS]} … {more:,} more characters")
