"""Say in sentences what a run changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergeopd.messages import joined
from mergeopd.reporting.contribution import Change, DomainChange, TeacherChange, TeacherContribution

# Figures of behaviour, with the words for more and for less of them.
_BEHAVIOUR = (
    ("length", "longer", "shorter"),
    ("truncated", "more often cut off at the length limit", "less often cut off at the length limit"),
    ("tool_calls", "with more tool calls", "with fewer tool calls"),
    ("refusals", "more often refusals", "less often refusals"),
    ("repetition", "more repetitive", "less repetitive"),
)
Cell = tuple[str, str, TeacherChange]


def summary_of(teachers: Sequence[TeacherContribution], domains: Sequence[DomainChange]) -> tuple[str, ...]:
    """Return sentences on what changed: divergence, forgetting, what is left, behaviour."""
    cells = [(t.name, domain, change) for t in teachers for domain, change in t.by_domain.items()]
    return (
        *_closed(cells),
        *_forgotten(domains),
        *_rest(cells),
        *_behaviour(domains),
        *(f"{teacher.name} {teacher.fault}" for teacher in teachers if teacher.fault is not None),
    )


def _closed(cells: Sequence[Cell]) -> Iterator[str]:
    """Say how far the student went to its teachers: means per token, every teacher and domain equally."""
    known = [cell for cell in cells if cell[2].closed.value is not None]
    if not known:
        return
    before = sum(change.reverse_kl.base.value or 0.0 for _, _, change in known) / len(known)
    after = sum(change.reverse_kl.merged.value or 0.0 for _, _, change in known) / len(known)
    closed = 1.0 - after / before
    text = f"the reverse KL to its teachers went from {before:.2g} to {after:.2g} nats per token"
    text += f", {closed:.0%} of it is gone" if closed > 0 else ": the student is no nearer to them"
    if len(known) > 1:
        most, least = (pick(known, key=lambda cell: cell[2].closed.value or 0.0) for pick in (max, min))
        shares = [f"{_cell(cell)} {cell[2].closed.value:.0%}" for cell in (most, least)]
        text += f" (most: {shares[0]}, least: {shares[1]})"
    yield text


def _rest(cells: Sequence[Cell]) -> Iterator[str]:
    """Say where most is left to learn."""
    shares = [(change.rest_share, name, domain, change) for name, domain, change in cells]
    known = [(share, name, domain, change) for share, name, domain, change in shares if share is not None]
    if len(known) > 1:
        share, name, domain, change = max(known, key=lambda each: each[0])
        yield (
            f"{share:.0%} of what is left to learn is {_cell((name, domain, change))}: reverse KL "
            f"{change.reverse_kl.merged.value:.2g} nats per token{_rates(change)}"
        )


def _rates(change: TeacherChange) -> str:
    own, teacher = change.pass_rate.merged.value, change.pass_rate_T.value
    return "" if own is None or teacher is None else f", pass rate {own:.0%}, the teacher's {teacher:.0%}"


def _cell(cell: Cell) -> str:
    teacher, domain, _ = cell
    return teacher if teacher == domain else f"{teacher} on {domain}"


def _forgotten(domains: Sequence[DomainChange]) -> Iterator[str]:
    known = [domain for domain in domains if domain.pass_rate.change.value is not None]
    lost = [_change("pass_rate", domain) for domain in known if domain.pass_rate.sign < 0]
    gained = [_change("pass_rate", domain) for domain in known if domain.pass_rate.sign > 0]
    if lost:
        yield f"forgotten: fewer correct responses than the base in {joined(lost, 'and')}"
    if gained:
        yield f"more correct responses than the base in {joined(gained, 'and')}"
    if known and not lost:
        yield "nothing was forgotten beyond noise in " + joined([domain.name for domain in known], "and")


def _behaviour(domains: Sequence[DomainChange]) -> Iterator[str]:
    """Say which figures of behaviour changed beyond noise, and where."""
    for key, more, less in _BEHAVIOUR:
        for sign, words in ((1, more), (-1, less)):
            where = [_change(key, domain) for domain in domains if getattr(domain, key).sign == sign]
            if where:
                yield f"responses are {words} in {joined(where, 'and')}"


def _change(key: str, domain: DomainChange) -> str:
    change: Change = getattr(domain, key)
    before, after = (each.value or 0.0 for each in (change.base, change.merged))
    values = f"{before:.3g} → {after:.3g} tokens" if key == "length" else f"{before:.0%} → {after:.0%}"
    return f"{domain.name} ({values})"
