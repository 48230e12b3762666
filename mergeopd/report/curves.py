"""Curves of a run: which quantities, which series, which numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergeopd.report.run_data import Update

MAX_POINTS = 1500
"""Longer runs are shown as means over equal stretches of updates: a page has no use for more."""

Group = Literal["teachers", "domains", "run"]
Read = Callable[[Update], float | None]

DIVERGENCES = {
    "reverse_kl": ("Reverse KL", "KL(student ‖ teacher)"),
    "forward_kl": ("Forward KL", "KL(teacher ‖ student)"),
    "jsd": ("JSD", "generalised Jensen-Shannon divergence"),
}
_TEACHER_CHARTS = (
    *((name, *texts, "nats per token") for name, texts in DIVERGENCES.items()),
    (
        "logprob_gap",
        "Log-prob gap",
        "log p of teacher minus student, at the tokens as written",
        "nats per token",
    ),
    ("entropy_T", "Teacher entropy", "of the teacher's next-token distribution", "nats per token"),
)
_DOMAIN_CHARTS = (
    ("reward", "Reward", "mean over answers that a verifier checked", ""),
    ("nll", "NLL of the text", "-log p of the student, whoever wrote it", "nats per token"),
    ("entropy_S", "Student entropy", "of the student's next-token distribution", "nats per token"),
    ("mean_length", "Answer length", "mean response tokens", "tokens"),
    ("token_share", "Token share", "of the update's response tokens", "%"),
    ("weight", "Balance factor", "multiplies the domain's tokens in the loss", ""),
    ("truncated_fraction", "Cut off", "answers that ended at the length limit", "%"),
)


# Quantities that are left out while they never have another value.
_TELLING_NOTHING = {"weight": 1.0, "truncated_fraction": 0.0}
# What every round repeats; what comes once a run or phase would dwarf it.
_STAGES = ("rollout", "teachers", "update", "checkpoint")


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `colour` is an index into the page's palette; `values` has one number per point."""

    name: str
    colour: int
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """One quantity. `stacked` series are shown as areas on top of each other."""

    id: str
    group: Group
    title: str
    subtitle: str
    unit: str
    series: tuple[Series, ...]
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Curves:
    """All charts over the same `updates`; each point stands for `stretch` of them.

    `phases` are (name, first update).
    """

    updates: tuple[int, ...]
    phases: tuple[tuple[str, int], ...]
    charts: tuple[Chart, ...]
    stretch: int

    def in_group(self, group: Group) -> tuple[Chart, ...]:
        """The charts of one part of the page."""
        return tuple(chart for chart in self.charts if chart.group == group)

    def document(self) -> dict[str, Any]:
        """Plain data for the page's script."""
        return {
            "updates": self.updates,
            "phases": self.phases,
            "charts": {
                chart.id: {
                    "unit": chart.unit,
                    "stacked": chart.stacked,
                    "series": [
                        {"name": s.name, "colour": s.colour, "values": s.values} for s in chart.series
                    ],
                }
                for chart in self.charts
            },
        }


def build_curves(updates: Sequence[Update], max_points: int = MAX_POINTS) -> Curves:
    """The charts of all quantities that some update has; the others are left out.

    Every number is the one of metrics.jsonl (fractions in %), as long as there are at most `max_points`
    updates; beyond that, the mean of the known numbers of a stretch, which stands at its last update.
    """
    colours = colours_of(updates)
    stretch = -(-len(updates) // max_points) if updates else 1
    stretches = [updates[i : i + stretch] for i in range(0, len(updates), stretch)]
    charts: list[Chart] = []

    def add(group: Group, key: str, texts: tuple[str, str, str], reads: dict[str, Read]) -> None:
        factor = 100.0 if texts[2] == "%" else 1.0
        series = tuple(
            Series(name, colours.get(name, index), tuple(_mean(part, read, factor) for part in stretches))
            for index, (name, read) in enumerate(reads.items())
        )
        shown = tuple(s for s in series if any(value is not None for value in s.values))
        if shown:
            stacked = key in ("token_share", "seconds")
            charts.append(Chart(f"{group}-{key}", group, *texts, shown, stacked))

    teachers = sorted({name for update in updates for name in update.teachers})
    domains = sorted({name for update in updates for name in update.domains})
    for key, *texts in _TEACHER_CHARTS:
        add("teachers", key, (texts[0], texts[1], texts[2]), {t: _of_teacher(t, key) for t in teachers})
    for key, *texts in _DOMAIN_CHARTS:
        if key in _TELLING_NOTHING and _always(updates, key, _TELLING_NOTHING[key]):
            continue
        add("domains", key, (texts[0], texts[1], texts[2]), {d: _of_domain(d, key) for d in domains})
    for key, texts_of_run, reads in _run_charts(updates):
        add("run", key, texts_of_run, reads)
    return Curves(
        updates=tuple(part[-1].update for part in stretches),
        phases=_phases(updates),
        charts=tuple(charts),
        stretch=stretch,
    )


def colours_of(updates: Sequence[Update]) -> dict[str, int]:
    """A colour for every teacher and domain, by name: a teacher and its domain of one name share it."""
    names = {name for update in updates for name in (*update.teachers, *update.domains)}
    return {name: index for index, name in enumerate(sorted(names))}


def _run_charts(updates: Sequence[Update]) -> list[tuple[str, tuple[str, str, str], dict[str, Read]]]:
    stages = [name for name in _STAGES if any(name in update.cost.seconds for update in updates)]
    charts: list[tuple[str, tuple[str, str, str], dict[str, Read]]] = [
        ("loss", ("Loss", "as minimised, every weight applied", ""), {"loss": lambda u: u.loss}),
        ("grad_norm", ("Gradient norm", "before clipping", ""), {"gradient norm": lambda u: u.grad_norm}),
        ("lr", ("Learning rate", "", ""), {"learning rate": lambda u: u.lr}),
        (
            "tokens_per_s",
            ("Speed", "response tokens through rollout, teachers and update", "tokens/s"),
            {"tokens per second": lambda u: u.cost.tokens_per_s},
        ),
        (
            "seconds",
            ("Seconds per update", "a round's rollout and teachers count to its first update", "s"),
            {stage: _of_stage(stage) for stage in stages},
        ),
    ]
    if len({update.on_policy_fraction for update in updates}) > 1:
        texts = ("On-policy fraction", "answers that the student wrote", "%")
        charts.append(("on_policy_fraction", texts, {"on-policy": lambda u: u.on_policy_fraction}))
    return charts


def _of_teacher(name: str, key: str) -> Read:
    return lambda update: update.teachers[name].get(key) if name in update.teachers else None


def _of_domain(name: str, key: str) -> Read:
    return lambda update: update.domains[name].get(key) if name in update.domains else None


def _of_stage(name: str) -> Read:
    return lambda update: update.cost.seconds.get(name)


def _mean(part: Sequence[Update], read: Read, factor: float) -> float | None:
    known = [value for update in part if (value := read(update)) is not None]
    return factor * (sum(known) / len(known)) if known else None


def _always(updates: Sequence[Update], key: str, value: float) -> bool:
    """Whether a quantity never was anything else."""
    return all(domain.get(key) in (None, value) for update in updates for domain in update.domains.values())


def _phases(updates: Sequence[Update]) -> tuple[tuple[str, int], ...]:
    phases: list[tuple[str, int]] = []
    for update in updates:
        if not phases or phases[-1][0] != update.phase:
            phases.append((update.phase, update.update))
    return tuple(phases)
