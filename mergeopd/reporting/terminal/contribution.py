"""What a run changed, in the terminal: sentences, then tables by teacher and by domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mergeopd.reporting.contribution import Change, Contribution, DomainChange
from mergeopd.reporting.result import Estimate, grade
from mergeopd.reporting.terminal.glyphs import plain_text, table
from mergeopd.reporting.terminal.result import times_and_paths

_MISSING = "-"
_STYLES = {"good": "bold green", "fair": "bold yellow", "poor": "bold red", "none": "dim"}


@dataclass(frozen=True, slots=True)
class ContributionTable:
    """Renders what a run changed, and the paths of what was written."""

    contribution: Contribution
    paths: Mapping[str, Path] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found, ascii_only = self.contribution, options.ascii_only
        style = "bold yellow" if found.forgotten else "bold"
        yield Text(plain_text(f"{found.name}: from {found.base} to {found.merged}", ascii_only), style=style)
        for sentence in found.summary:
            yield Text(plain_text(f"- {sentence}", ascii_only), overflow="fold")
        yield Text()
        yield from self._teachers(ascii_only)
        yield from self._domains(ascii_only)
        for note in found.notes:
            yield Text(plain_text(f"note    {note}", ascii_only), style="yellow", overflow="fold")
        yield from times_and_paths(found.seconds, self.paths, options)

    def _teachers(self, ascii_only: bool) -> Iterator[Table]:
        found = self.contribution
        cells = list(found.cells)
        if not cells:
            return
        rows = table(
            ("teacher", "domain", "reverse KL", "gone, %", "pass, %", "teacher", "recovered", "left, %"),
            ascii_only=ascii_only,
            title=f"What each teacher changed: {found.settings['prompts']} prompts of training, base → merged"
            if not ascii_only
            else "What each teacher changed, base -> merged",
        )
        rows.columns[1].justify = "left"
        before = ""
        for teacher, domain, change in cells:
            rows.add_row(
                plain_text("" if teacher == before else teacher, ascii_only),
                plain_text(domain, ascii_only),
                plain_text(_both(change.reverse_kl, _nats), ascii_only),
                _share(change.closed),
                plain_text(_both(change.pass_rate, _percent), ascii_only),
                _percent(change.pass_rate_T),
                _share(change.recovered),
                _MISSING if change.rest_share is None else f"{100 * change.rest_share:.0f}",
            )
            before = teacher
        yield rows

    def _domains(self, ascii_only: bool) -> Iterator[RenderableType]:
        domains = self.contribution.domains
        if not domains:
            return
        figures: list[tuple[str, Callable[[DomainChange], str]]] = [
            ("length", lambda one: _both(one.length, lambda estimate: f"{estimate.value:.3g}"))
        ]
        for key, heading in (
            ("truncated", "cut off, %"),
            ("tool_calls", "tools, %"),
            ("refusals", "refusals, %"),
            ("repetition", "repeated, %"),
        ):
            if any(_is_seen(getattr(domain, key)) for domain in domains):
                figures.append((heading, _percents(key)))
        rows = table(
            ("domain", "n", "pass, %", "change", *(heading for heading, _ in figures)),
            ascii_only=ascii_only,
            title=plain_text("Responses by domain, base → merged", ascii_only),
        )
        for domain in domains:
            cells = [plain_text(figure(domain), ascii_only) for _, figure in figures]
            name = domain.name if domain.is_trained else f"{domain.name} (not trained)"
            rows.add_row(
                plain_text(name, ascii_only),
                f"{domain.num_prompts:,}",
                plain_text(_both(domain.pass_rate, _percent), ascii_only),
                _points(domain.pass_rate),
                *cells,
            )
        yield rows
        if sampled := [domain.name for domain in domains if domain.measured_on == "sample"]:
            text = f"{', '.join(sampled)}: prompts of training, since the run's evaluation has no responses"
            yield Text(plain_text(text, ascii_only), style="dim")
            yield Text()


def _percents(key: str) -> Callable[[DomainChange], str]:
    return lambda domain: _both(getattr(domain, key), _percent)


def _is_seen(change: Change) -> bool:
    return any((one.value or 0.0) >= 0.005 for one in (change.base, change.merged))


def _both(change: Change, text: Callable[[Estimate], str]) -> str:
    if change.base.value is None or change.merged.value is None:
        return _MISSING
    return f"{text(change.base)} → {text(change.merged)}"


def _nats(estimate: Estimate) -> str:
    return _MISSING if estimate.value is None else f"{estimate.value:.2g}"


def _percent(estimate: Estimate) -> str:
    return _MISSING if estimate.value is None else f"{100 * estimate.value:.0f}"


def _share(estimate: Estimate) -> Text:
    return Text(_percent(estimate), style=_STYLES[grade(estimate.value)])


def _points(change: Change) -> Text:
    """Format a change in points with its interval, coloured where that excludes zero."""
    value, low, high = change.change.value, change.change.low, change.change.high
    if value is None:
        return Text(_MISSING)
    text = f"{100 * value:+.1f}"
    if low is not None and high is not None:
        text += f" ({100 * low:+.0f} to {100 * high:+.0f})"
    return Text(text, style={1: "bold green", 0: "", -1: "bold red"}[change.sign])
