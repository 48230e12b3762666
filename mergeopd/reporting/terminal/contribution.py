"""What a run changed, in the terminal: sentences, then tables by teacher and by domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mergeopd.messages import joined
from mergeopd.reporting.contribution import Change, Contribution
from mergeopd.reporting.result import Estimate, grade
from mergeopd.reporting.terminal.glyphs import plain_text, table
from mergeopd.reporting.terminal.result import times_and_paths

_MISSING = "-"
_BEHAVIOUR = {
    "length": "tokens",
    "truncated": "cut off, %",
    "tool_calls": "tool calls, %",
    "refusals": "refusals, %",
    "repetition": "repeated, %",
}
_STYLES = {"good": "bold green", "fair": "bold yellow", "poor": "bold red", "none": "dim"}


@dataclass(frozen=True, slots=True)
class ContributionTable:
    """Renders what a run changed, and the paths of what was written."""

    contribution: Contribution
    paths: Mapping[str, Path] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        contribution, ascii_only = self.contribution, options.ascii_only
        style = "bold yellow" if contribution.forgotten else "bold"
        num = contribution.settings["prompts"]
        title = f"{contribution.name}: from {contribution.base} to {contribution.merged}, on {num} prompts"
        yield Text(plain_text(title, ascii_only), style=style)
        for sentence in contribution.summary:
            yield Text(plain_text(f"- {sentence}", ascii_only), overflow="fold")
        yield Text()
        yield from self._teachers(ascii_only)
        yield from self._domains(ascii_only)
        of_teachers = [f"{one.name}: {note}" for one in contribution.teachers for note in one.notes]
        for note in (*of_teachers, *contribution.notes):
            yield Text(plain_text(f"note    {note}", ascii_only), style="yellow", overflow="fold")
        yield from times_and_paths(contribution.seconds, self.paths, options)

    def _teachers(self, ascii_only: bool) -> Iterator[Table]:
        cells = list(self.contribution.cells)
        if not cells:
            return
        rows = table(
            ("teacher", "reverse KL", "gone", "pass rate", "teacher", "recovered", "left"),
            ascii_only=ascii_only,
            title=plain_text("What each teacher changed, base → merged; shares in %", ascii_only),
        )
        for teacher, domain, change in cells:
            name = teacher if teacher == domain else f"{teacher}: {domain}"
            rows.add_row(
                plain_text(name, ascii_only),
                plain_text(_both(change.reverse_kl, _nats), ascii_only),
                _share(change.closed),
                plain_text(_both(change.pass_rate, _percent), ascii_only),
                _percent(change.pass_rate_T),
                _share(change.recovered),
                _MISSING if change.rest_share is None else f"{100 * change.rest_share:.0f}",
            )
        yield rows

    def _domains(self, ascii_only: bool) -> Iterator[RenderableType]:
        domains = self.contribution.domains
        if not domains:
            return
        rows = table(
            ("domain", "n", "pass, %", "change and its 95 % interval"),
            ascii_only=ascii_only,
            title=plain_text("Correct responses by domain, base → merged", ascii_only),
        )
        for domain in domains:
            rows.add_row(
                plain_text(domain.name, ascii_only),
                f"{domain.num_prompts:,}",
                plain_text(_both(domain.pass_rate, _percent), ascii_only),
                _points(domain.pass_rate),
            )
        yield rows
        legends = {
            "no prompt trains": [one.name for one in domains if not one.is_trained],
            "sampled prompts of training:": [one.name for one in domains if one.measured_on == "sample"],
        }
        for text, names in legends.items():
            if names:
                yield Text(plain_text(f"{text} {joined(names, 'and')}", ascii_only), style="dim")
        yield Text()
        yield from self._behaviour(ascii_only)

    def _behaviour(self, ascii_only: bool) -> Iterator[Table]:
        """Yield the figures of behaviour that are not zero everywhere."""
        domains = self.contribution.domains
        seen = {
            heading: key
            for key, heading in _BEHAVIOUR.items()
            if any(_is_seen(getattr(domain, key)) for domain in domains)
        }
        if not seen:
            return
        rows = table(
            ("domain", *seen),
            ascii_only=ascii_only,
            title=plain_text("Behaviour by domain, base → merged", ascii_only),
        )
        for domain in domains:
            changes = {key: getattr(domain, key) for key in seen.values()}
            cells = [
                Text(
                    plain_text(_both(change, _length if key == "length" else _percent), ascii_only),
                    style="bold" if change.sign else "",
                )
                for key, change in changes.items()
            ]
            rows.add_row(plain_text(domain.name, ascii_only), *cells)
        yield rows


def _is_seen(change: Change) -> bool:
    return any((one.value or 0.0) >= 0.005 for one in (change.base, change.merged))


def _both(change: Change, text: Callable[[Estimate], str]) -> str:
    if change.base.value is None or change.merged.value is None:
        return _MISSING
    return f"{text(change.base)} → {text(change.merged)}"


def _nats(estimate: Estimate) -> str:
    value = estimate.value
    return _MISSING if value is None else f"{value:.2g}" if value >= 0.001 or value == 0 else "<0.001"


def _length(estimate: Estimate) -> str:
    return _MISSING if estimate.value is None else f"{estimate.value:.3g}"


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
        text += f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return Text(text, style={1: "bold green", 0: "", -1: "bold red"}[change.sign])
