"""An inspection in the terminal: verdicts with their numbers, then what is worth knowing before a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mergeopd.reporting.estimate import Estimate as RunEstimate
from mergeopd.reporting.estimate import duration
from mergeopd.reporting.inspection import (
    VERDICT_TITLES,
    Finding,
    FindingLevel,
    Inspection,
    Signal,
    TeacherInspection,
    Verdict,
    VerdictKind,
)
from mergeopd.reporting.result import Estimate
from mergeopd.reporting.terminal.glyphs import plain_text, table
from mergeopd.reporting.terminal.result import times_and_paths

_MISSING = "-"
_STYLES: Mapping[VerdictKind, str] = {
    "ready": "bold green",
    "cold_start": "bold yellow",
    "template_mismatch": "bold red",
    "nothing_new": "bold yellow",
    "wrong_teacher": "bold red",
    "noisy": "bold yellow",
    "unknown": "dim",
}
_LEVEL_STYLES: Mapping[FindingLevel, str] = {"problem": "bold red", "note": "yellow"}
_HEADINGS = ("verdict", "pass, %", "reverse KL", "overlap", "entropy gap")


@dataclass(frozen=True, slots=True)
class InspectionTable:
    """Renders an inspection, and the paths of what was written."""

    inspection: Inspection
    paths: Mapping[str, Path] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        inspection, ascii_only = self.inspection, options.ascii_only
        yield self._teachers(ascii_only)
        yield from _sentences(inspection.teachers, ascii_only)
        yield from self._domains_of_teachers(ascii_only)
        yield from self._budget(ascii_only)
        yield from self._gradients(ascii_only)
        yield from self._conflicts(ascii_only)
        yield from self._checkpoints(ascii_only)
        yield from _findings(inspection.teachers, ascii_only)
        yield from _cost(inspection.cost, ascii_only)
        yield from times_and_paths(inspection.seconds, self.paths, options)

    def _teachers(self, ascii_only: bool) -> Table:
        num = self.inspection.settings.get("prompts")
        sample = f" from {num} prompts" if num else ""
        student = escape(plain_text(self.inspection.student, ascii_only))
        rows = table(
            ("teacher", *_HEADINGS),
            ascii_only=ascii_only,
            title=f"Teachers of {student}{sample}: pass rate of student and teacher, and means per token",
        )
        rows.columns[1].justify, rows.columns[1].no_wrap = "left", True
        for teacher in self.inspection.teachers:
            name = _plain(teacher.name, ascii_only)
            rows.add_row(name, *_figures(teacher.verdict, teacher.signal, ascii_only))
        return rows

    def _domains_of_teachers(self, ascii_only: bool) -> Iterator[Table]:
        """Yield the figures by domain, of teachers with several."""
        several = [teacher for teacher in self.inspection.teachers if len(teacher.by_domain) > 1]
        if not several:
            return
        rows = table(("teacher", "domain", *_HEADINGS), ascii_only=ascii_only, title="By domain")
        for column in rows.columns[1:3]:
            column.justify = "left"
        rows.columns[2].no_wrap = True
        for teacher in several:
            for i, (domain, signal) in enumerate(teacher.by_domain.items()):
                verdict = teacher.domain_verdicts.get(domain, teacher.verdict)
                names = (_plain(text, ascii_only) for text in ("" if i else teacher.name, domain))
                rows.add_row(*names, *_figures(verdict, signal, ascii_only))
        yield rows

    def _budget(self, ascii_only: bool) -> Iterator[Table]:
        domains = self.inspection.domains
        if not domains:
            return
        headings = ("domain", "prompts", "tokens", "balanced", "length", "cut off", "solved", "frontier")
        rows = table(
            headings,
            ascii_only=ascii_only,
            title="Shares of the loss in %: by prompts, by tokens, with the recipe's `balance`",
        )
        for one in domains:
            rows.add_row(
                _plain(one.domain, ascii_only),
                *(f"{100 * share:.0f}" for share in (one.share, one.token_share, one.balanced_share)),
                f"{one.mean_length:,.0f}",
                f"{100 * one.truncated_fraction:.0f} %",
                f"{_percent(one.pass_rate)} %",
                f"{one.num_frontier:,}",
            )
        yield rows

    def _gradients(self, ascii_only: bool) -> Iterator[Table]:
        measured = [(t.name, t.gradients) for t in self.inspection.teachers if t.gradients is not None]
        if not measured:
            return
        rows = table(
            ("teacher", "alignment", "correct", "wrong", "nodes", "skipped", "rollouts"),
            ascii_only=ascii_only,
            title="Cosine of the ideal gradient with the teacher's, by all responses and by outcome",
        )
        for name, one in measured:
            rows.add_row(
                _plain(name, ascii_only),
                _bounds(one.score),
                _number(one.on_correct),
                _number(one.on_incorrect),
                *(f"{num:,}" for num in (one.num_nodes, one.num_skipped, one.num_rollouts)),
            )
        yield rows
        if not self.inspection.alignments:
            return
        ranks = table(
            ("domain", "teacher", "alignment", "behind the best"),
            ascii_only=ascii_only,
            title="Teachers by the alignment of their gradients on each domain",
        )
        for rank in self.inspection.alignments:
            ranks.add_row(
                _plain(rank.domain, ascii_only),
                _plain(rank.teacher, ascii_only),
                _bounds(rank.alignment),
                "" if rank.is_best else _bounds(rank.behind),
            )
        yield ranks

    def _conflicts(self, ascii_only: bool) -> Iterator[Table]:
        if not self.inspection.conflicts:
            return
        rows = table(
            ("teachers of the same prompts", "cosine", "least reverse KL", "tokens"),
            ascii_only=ascii_only,
            title="Agreement of teachers: cosine of their gradients, and what no student can go below",
        )
        for one in self.inspection.conflicts:
            names = _plain(f"{one.first}, {one.second}", ascii_only)
            rows.add_row(names, _number(one.cosine), _number(one.floor), f"{one.num_tokens:,}")
        yield rows

    def _checkpoints(self, ascii_only: bool) -> Iterator[Table]:
        if not self.inspection.checkpoints:
            return
        rows = table(
            ("domain", "checkpoint", "verdict", "pass rate", "behind", "reverse KL", ""),
            ascii_only=ascii_only,
            title="Checkpoints as teachers",
        )
        for column in rows.columns[1:3]:
            column.justify = "left"
        for one in self.inspection.checkpoints:
            rows.add_row(
                _plain(one.domain, ascii_only),
                _plain(one.checkpoint, ascii_only),
                _title(one.verdict),
                _percent(one.pass_rate),
                "" if one.is_best else _points(one.behind, ascii_only),
                _number(one.reverse_kl),
                "best" if one.is_best else "",
            )
        yield rows


def _points(estimate: Estimate, ascii_only: bool) -> str:
    """Format a difference of rates in percentage points, with half of its interval."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None:
        return _MISSING
    half = "" if low is None or high is None else f" ± {50 * (high - low):.0f}"
    return plain_text(f"{100 * value:.0f}{half}", ascii_only)


def _figures(verdict: Verdict, signal: Signal | None, ascii_only: bool) -> tuple[Text | str, ...]:
    if signal is None:
        return (_title(verdict), *[_MISSING] * (len(_HEADINGS) - 1))
    rates = f"{_percent(signal.pass_rate_S)} → {_percent(signal.pass_rate_T)}"
    return (
        _title(verdict),
        _plain(rates, ascii_only),
        _number(signal.reverse_kl),
        _number(signal.overlap),
        _number(signal.entropy_gap),
    )


def _title(verdict: Verdict) -> Text:
    text = VERDICT_TITLES[verdict.kind]
    if verdict.beyond is not None:
        text += f" beyond {verdict.beyond:,}"
    return Text(text, style=_STYLES[verdict.kind])


def _sentences(teachers: Sequence[TeacherInspection], ascii_only: bool) -> Iterator[RenderableType]:
    """Yield each teacher's verdict in words, with what to do."""
    rows = _grid(2)
    for teacher in teachers:
        verdict = teacher.verdict
        name = _plain(teacher.name, ascii_only, _STYLES[verdict.kind])
        rows.add_row(name, _with_remedy(verdict.sentence, verdict.remedy, ascii_only))
    yield rows
    yield Text()


def _grid(num_columns: int) -> Table:
    """Return a table without lines, for text of several lines."""
    rows = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(num_columns):
        rows.add_column(overflow="fold")
    return rows


def _with_remedy(text: str, remedy: str, ascii_only: bool) -> Text:
    line = _plain(text.removesuffix(".") + ".", ascii_only)
    return (
        line.append_text(_plain(f" Remedy: {remedy.removesuffix('.')}.", ascii_only, "dim"))
        if remedy
        else line
    )


def _cost(cost: RunEstimate | None, ascii_only: bool) -> Iterator[Text]:
    """Yield what a run would cost on this machine, in a line."""
    if cost is None:
        return
    peak, limit = (size / 2**30 for size in (cost.peak_bytes, cost.limit_bytes))
    line = (
        f"A run on {cost.hardware}: {peak:,.2f} of {limit:,.2f} GiB at its peak ({cost.peak.stage}), "
        f"{duration(cost.seconds)}. mergeopd plan says more."
    )
    yield Text(plain_text(line, ascii_only))
    for obstacle in cost.obstacles:
        yield Text(plain_text(f"! {obstacle}", ascii_only), style="bold red")


def _plain(text: str, ascii_only: bool, style: str = "") -> Text:
    """Return text of models and recipes, in which brackets are no markup."""
    return Text(plain_text(text, ascii_only), style=style)


def _findings(teachers: Sequence[TeacherInspection], ascii_only: bool) -> Iterator[RenderableType]:
    """Yield notes and problems of the comparison without models, those of several teachers once."""
    by_finding: dict[Finding, list[str]] = {}
    for teacher in teachers:
        for finding in teacher.compatibility.findings:
            if finding.level != "ok":
                by_finding.setdefault(finding, []).append(teacher.name)
    if not by_finding:
        return
    rows = _grid(3)
    rows.title, rows.title_justify, rows.title_style = "Known without running a model", "left", "bold"
    for level, style in _LEVEL_STYLES.items():
        for finding, names in by_finding.items():
            if finding.level == level:
                who = "all" if 1 < len(names) == len(teachers) else ", ".join(names)
                text = _with_remedy(finding.text, finding.remedy, ascii_only)
                rows.add_row(Text(level, style=style), _plain(who, ascii_only), text)
    yield rows
    yield Text()


def _percent(estimate: Estimate) -> str:
    return _MISSING if estimate.value is None else f"{100 * estimate.value:.0f}"


def _bounds(estimate: Estimate) -> str:
    """Format a cosine with its interval, which is not symmetric."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None:
        return _MISSING
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _number(estimate: Estimate) -> str:
    if estimate.value is None:
        return _MISSING
    is_plain = abs(estimate.value) >= 0.005 or estimate.value == 0
    return f"{estimate.value:.2f}" if is_plain else f"{estimate.value:.0e}"
