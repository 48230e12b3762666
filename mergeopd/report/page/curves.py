"""Curves of a run: which quantities, which series, which numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergeopd.report.page.run_data import Update

MAX_POINTS = 1500
"""Longer runs are shown as means over equal stretches of updates: a page has no use for more."""
ACCENT = -1
"""The colour of a line that stands alone."""
STAGE_COLOURS = {
    "rollout": 5,
    "teachers": 3,
    "update": 4,
    "text": 6,
    "evaluation": 7,
    "checkpoint": 8,
    "startup": 1,
    "other": 9,
}
"""Apart from the first ones, which teachers and domains get on the same page."""
# What every round repeats; what comes once a run or phase would dwarf it.
_REPEATED_STAGES = ("rollout", "teachers", "update", "checkpoint")

Group = Literal["teachers", "domains", "run"]
Read = Callable[[Update], float | None]


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a chart shows. `key` is its name in metrics.jsonl.

    Series of a `stacked` one are areas on top of each other; a `steady` one has no noise to smooth; one that
    never leaves `dull` says nothing. A `unit` of % shows fractions times 100.
    """

    key: str
    title: str
    subtitle: str = ""
    unit: str = ""
    stacked: bool = False
    steady: bool = False
    dull: float | None = None


DIVERGENCES = {
    "reverse_kl": Quantity("reverse_kl", "Reverse KL", "KL(student ‖ teacher)", "nats per token"),
    "forward_kl": Quantity("forward_kl", "Forward KL", "KL(teacher ‖ student)", "nats per token"),
    "tvd": Quantity("tvd", "TVD", "total variation distance", "mean per token"),
    "jsd": Quantity("jsd", "JSD", "generalised Jensen-Shannon divergence", "nats per token"),
    "skew_forward_kl": Quantity(
        "skew_forward_kl", "Skew forward KL", "KL(teacher ‖ mixture)", "nats per token"
    ),
    "skew_reverse_kl": Quantity(
        "skew_reverse_kl", "Skew reverse KL", "KL(student ‖ mixture)", "nats per token"
    ),
    "clipped_forward_kl": Quantity(
        "clipped_forward_kl", "Clipped forward KL", "forward KL with capped entries", "nats per token"
    ),
    "pieces": Quantity("pieces", "KL of pieces", "or JSD, in the student's vocabulary", "nats per group"),
    "gold": Quantity("gold", "GOLD", "JSD of shared tokens, the others by rank", "mean per group"),
    "uld": Quantity("uld", "ULD", "probabilities by rank", "mean per group"),
    "projection": Quantity("projection", "Projected KL", "in the teacher's vocabulary", "nats per group"),
    "span": Quantity("span", "Span log-ratio", "student minus teacher, of aligned groups", "nats per group"),
    "sampled_reverse_kl": Quantity(
        "sampled_reverse_kl", "Reverse KL, sampled", "k3 at the tokens as written", "nats per token"
    ),
}


def divergence(key: str) -> Quantity:
    """How a divergence is shown; one that has no words of its own goes by its name."""
    return DIVERGENCES.get(key) or Quantity(key, key.replace("_", " "), "", "mean per token")


_BESIDE_DIVERGENCES = (
    Quantity(
        "logprob_gap", "Log-prob gap", "teacher minus student, at the tokens as written", "nats per token"
    ),
    Quantity("entropy_T", "Teacher entropy", "of the next-token distribution", "nats per token"),
    Quantity("num_groups", "Aligned groups", "that both tokenizers cut alike"),
    Quantity("tokens_per_group", "Tokens per group", "of the student's"),
    Quantity("unaligned_fraction", "Unaligned", "student tokens in no group", "%", dull=0.0),
    Quantity("matched_fraction", "Matched mass", "of the teacher's, on shared tokens", "%"),
)
_OF_DOMAINS = (
    Quantity("reward", "Reward", "mean over the answers that a verifier checked"),
    Quantity("nll", "NLL of the text", "-log p of the student, whoever wrote it", "nats per token"),
    Quantity("entropy_S", "Student entropy", "of the next-token distribution", "nats per token"),
    Quantity("mean_length", "Answer length", "mean response tokens", "tokens"),
    Quantity("token_share", "Token share", "of the update's response tokens", "%", stacked=True),
    Quantity("weight", "Balance factor", "multiplies the domain's tokens in the loss", dull=1.0),
    Quantity("truncated_fraction", "Cut off", "answers that ended at the length limit", "%", dull=0.0),
)
_OF_POLICY = (
    Quantity(
        "behaviour_gap",
        "Engine gap",
        "|log pi_old - log behaviour|, own tokens",
        "nats per token",
    ),
    Quantity("behaviour_gap_max", "Largest engine gap", "of any token", "nats"),
    Quantity("importance_weight", "Importance weight", "mean of the policy terms'", dull=1.0),
    Quantity("corrected_fraction", "Corrected", "tokens whose importance weight was bounded", "%", dull=0.0),
    Quantity("clipped_fraction", "Clipped", "tokens without gradient because of the clip", "%", dull=0.0),
    Quantity("silent_groups_fraction", "Silent groups", "prompts whose answers all had one reward", "%"),
)


def _of_policy(key: str) -> Read:
    return lambda update: update.policy.get(key)


_OF_RUN: tuple[tuple[Quantity, Read], ...] = (
    (Quantity("loss", "Loss", "as minimised, every weight applied"), lambda u: u.loss),
    (Quantity("grad_norm", "Gradient norm", "before clipping"), lambda u: u.grad_norm),
    (Quantity("lr", "Learning rate", steady=True), lambda u: u.lr),
    (
        Quantity(
            "on_policy_fraction", "On-policy", "answers that the student wrote", "%", steady=True, dull=1.0
        ),
        lambda u: u.on_policy_fraction,
    ),
    *((quantity, _of_policy(quantity.key)) for quantity in _OF_POLICY),
    (
        Quantity("tokens_per_s", "Speed", "response tokens through a round", "tokens/s"),
        lambda u: u.cost.tokens_per_s,
    ),
)
_SECONDS = Quantity(
    "seconds", "Seconds per update", "a round's rollout counts to its first one", "s", stacked=True
)


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `colour` is an index into the page's palette; `values` has one number per point."""

    name: str
    colour: int
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """One quantity with its lines."""

    group: Group
    quantity: Quantity
    series: tuple[Series, ...]

    @property
    def id(self) -> str:
        """Unique on the page."""
        return f"{self.group}-{self.quantity.key}"


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
                    "unit": chart.quantity.unit,
                    "stacked": chart.quantity.stacked,
                    "steady": chart.quantity.steady,
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
    stretch = max(1, -(-len(updates) // max_points))
    stretches = [updates[i : i + stretch] for i in range(0, len(updates), stretch)]
    charts = []
    for group, quantity, reads, colours in _wanted(updates):
        factor = 100.0 if quantity.unit == "%" else 1.0
        series = tuple(
            Series(name, colours[name], tuple(_mean(part, read, factor) for part in stretches))
            for name, read in reads.items()
        )
        dull = {None, None if quantity.dull is None else factor * quantity.dull}
        shown = tuple(s for s in series if not set(s.values) <= {None})
        if any(not set(s.values) <= dull for s in shown):
            charts.append(Chart(group, quantity, shown))
    return Curves(
        updates=tuple(part[-1].update for part in stretches),
        phases=_phases(updates),
        charts=tuple(charts),
        stretch=stretch,
    )


def _wanted(
    updates: Sequence[Update],
) -> Iterator[tuple[Group, Quantity, dict[str, Read], Mapping[str, int]]]:
    """Every chart that could be: where it stands, what it shows, how each line is read and coloured."""
    teachers = sorted({name for update in updates for name in update.teachers})
    domains = sorted({name for update in updates for name in update.domains})
    # A teacher and a domain of one name share their colour.
    colours = {name: index for index, name in enumerate(sorted({*teachers, *domains}))}
    known = {key for update in updates for record in update.teachers.values() for key in record}
    beside = {"num_tokens", *(quantity.key for quantity in _BESIDE_DIVERGENCES)}
    measured = [key for key in DIVERGENCES if key in known] + sorted(known - beside - DIVERGENCES.keys())
    for quantity in (*map(divergence, measured), *_BESIDE_DIVERGENCES):
        yield "teachers", quantity, {name: _of_teacher(name, quantity.key) for name in teachers}, colours
    for quantity in _OF_DOMAINS:
        yield "domains", quantity, {name: _of_domain(name, quantity.key) for name in domains}, colours
    for quantity, read in _OF_RUN:
        name = quantity.title.lower()
        yield "run", quantity, {name: read}, {name: ACCENT}
    stages = [name for name in _REPEATED_STAGES if any(name in update.cost.seconds for update in updates)]
    yield "run", _SECONDS, {name: _of_stage(name) for name in stages}, STAGE_COLOURS


def _of_teacher(name: str, key: str) -> Read:
    return lambda update: update.teachers[name].get(key) if name in update.teachers else None


def _of_domain(name: str, key: str) -> Read:
    return lambda update: update.domains[name].get(key) if name in update.domains else None


def _of_stage(name: str) -> Read:
    return lambda update: update.cost.seconds.get(name)


def _mean(part: Sequence[Update], read: Read, factor: float) -> float | None:
    known = [value for update in part if (value := read(update)) is not None]
    return factor * (sum(known) / len(known)) if known else None


def _phases(updates: Sequence[Update]) -> tuple[tuple[str, int], ...]:
    phases: list[tuple[str, int]] = []
    for update in updates:
        if not phases or phases[-1][0] != update.phase:
            phases.append((update.phase, update.update))
    return tuple(phases)
