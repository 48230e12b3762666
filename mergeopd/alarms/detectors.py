"""Detectors of signs in the figures of updates. They keep state, and neither read files nor stop anything.

A detector looks at one update after the other and returns, for every subject (a domain, a teacher, "" for
the run) that it can judge at this update, its finding, or None where all is well. `watch.py` decides when a
sign becomes an alarm.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal, Protocol

from mergeopd.recipe.alarms import (
    DeadDomain,
    DivergenceRising,
    EntropyCollapse,
    GradientSpike,
    IdenticalTeacher,
    LengthCollapse,
    MismatchedTeacher,
    NoColdStart,
    Repetition,
    RolloutGap,
    StarvedDomain,
    Truncation,
    ZeroGradient,
)
from mergeopd.reporting.figures import MEASURES
from mergeopd.reporting.jsonl import Numbers, UpdateRecord

Signs = Mapping[str, str | None]
NO_SIGNS: Signs = {}
_MEMORY = 0.25  # weight of the newest value in a running mean: about the last four updates
_SPIKE_WINDOW = 32
_FEWEST = 8  # earlier gradient norms, for a median
_PROMPTS_PER_DOMAIN = 10  # fewer could be missing by chance


class Detector(Protocol):
    """Judges updates in order."""

    def look(self, record: UpdateRecord) -> Signs:
        """Return the finding by subject, None where all is well; subjects without figures are left out."""


def divergence(numbers: Numbers) -> float | None:
    """Return a teacher's first divergence or its bridge's measure; None without one."""
    return next((numbers[key] for key in MEASURES if key in numbers), None)


@dataclass
class RunningMean:
    """A mean over about the last four values."""

    value: float | None = None

    def add(self, new: float) -> float:
        self.value = new if self.value is None else (1 - _MEMORY) * self.value + _MEMORY * new
        return self.value


@dataclass
class ZeroGradientDetector:
    settings: ZeroGradient

    def look(self, record: UpdateRecord) -> Signs:
        norm, below = record.grad_norm, self.settings.below
        if norm is None:
            return NO_SIGNS
        return {"": f"gradient norm {norm:.2g} (limit {below:g})" if norm < below else None}


@dataclass
class GradientSpikeDetector:
    settings: GradientSpike
    _earlier: deque[float] = field(default_factory=lambda: deque(maxlen=_SPIKE_WINDOW))
    _phase: str = ""

    def look(self, record: UpdateRecord) -> Signs:
        if record.phase != self._phase:
            self._phase = record.phase
            self._earlier.clear()
        norm = record.grad_norm
        if norm is None:
            return NO_SIGNS
        usual = median(self._earlier) if len(self._earlier) >= _FEWEST else 0.0
        self._earlier.append(norm)
        limit = self.settings.factor * usual
        finding = f"gradient norm {norm:.3g}, usually {usual:.3g} (limit {limit:.3g})"
        return {"": finding if 0.0 < limit < norm else None}


_DIVERGENCE = "divergence"


@dataclass
class DivergenceRisingDetector:
    """Compares a running mean with its minimum, of one phase.

    A divergence over all text starts again when the share of the student's responses reaches a new maximum.

    On the student's own responses the negated log-prob gap estimates the reverse KL, and is judged, too: a
    divergence over a part of the vocabulary can fall while the student leaves that part.
    """

    settings: DivergenceRising
    teachers: Collection[str]
    _means: defaultdict[tuple[str, str], RunningMean] = field(
        default_factory=lambda: defaultdict(RunningMean)
    )
    _lowest: dict[tuple[str, str], float] = field(default_factory=dict)
    _started: tuple[str, float] = ("", 0.0)

    def look(self, record: UpdateRecord) -> Signs:
        phase, fraction = self._started
        now = record.on_policy_fraction or 0.0
        if record.phase != phase:
            self._means.clear()
            self._lowest.clear()
        elif now > fraction:
            # The student's own responses have another divergence than text of others.
            for kept in (self._means, self._lowest):
                for key in [key for key in kept if key[1] == _DIVERGENCE]:
                    del kept[key]
        self._started = record.phase, max(now, fraction if record.phase == phase else 0.0)
        signs: dict[str, str | None] = {}
        for name, numbers in record.teachers.items():
            if name in self.teachers:
                gap = numbers.get("logprob_gap_student")
                values = {_DIVERGENCE: divergence(numbers)}
                if gap is not None:
                    values["estimated reverse KL (-log-prob gap)"] = -gap
                known = {what: value for what, value in values.items() if value is not None}
                findings = [self._finding(name, what, value) for what, value in known.items()]
                if findings:
                    signs[name] = next((finding for finding in findings if finding is not None), None)
        return signs

    def _finding(self, name: str, what: str, value: float) -> str | None:
        mean = self._means[name, what].add(value)
        lowest = self._lowest[name, what] = min(mean, self._lowest.get((name, what), mean))
        limit = max(self.settings.factor * lowest, lowest + self.settings.margin)
        finding = f"{what} {mean:.3g}, at its lowest {lowest:.3g} (limit {limit:.3g})"
        return finding if mean > limit else None


@dataclass
class EntropyCollapseDetector:
    settings: EntropyCollapse
    teachers_of: Mapping[str, Collection[str]]

    def look(self, record: UpdateRecord) -> Signs:
        signs: dict[str, str | None] = {}
        for domain, numbers in record.domains.items():
            own = [divergence(record.teachers[t]) for t in self.teachers_of[domain] if t in record.teachers]
            known = [value for value in own if value is not None]
            entropy = numbers.get("entropy_S")
            if entropy is None or not known:
                continue
            finding = f"student entropy {entropy:.2g} nats (limit {self.settings.below:g})"
            finding += f" at a divergence of {max(known):.2g}"
            is_certain = entropy < self.settings.below and max(known) > self.settings.divergence
            signs[domain] = finding if is_certain else None
        return signs


@dataclass
class LengthCollapseDetector:
    """Compares the length of responses that ended by themselves with the phase's longest running mean."""

    settings: LengthCollapse
    max_new_tokens: Mapping[str, int]  # by phase
    _means: defaultdict[tuple[str, str], RunningMean] = field(
        default_factory=lambda: defaultdict(RunningMean)
    )
    _longest: dict[tuple[str, str], float] = field(default_factory=dict)

    def look(self, record: UpdateRecord) -> Signs:
        signs: dict[str, str | None] = {}
        for domain, numbers in record.domains.items():
            length, truncated = numbers.get("mean_length"), numbers.get("truncated_fraction")
            if length is None or truncated is None or truncated > 0.5:
                continue
            cut = truncated * self.max_new_tokens[record.phase]
            finished, key = max(0.0, (length - cut) / (1.0 - truncated)), (record.phase, domain)
            longest = self._longest.get(key, 0.0)
            limit = self.settings.fraction * longest
            self._longest[key] = max(longest, self._means[key].add(finished))
            finding = f"responses of {finished:.3g} tokens, before {longest:.3g} (limit {limit:.3g})"
            signs[domain] = finding if finished < limit else None
        return signs


@dataclass
class HighShareDetector:
    """Finds a share of a domain's responses or tokens that is high for a while and does not fall."""

    settings: Truncation | Repetition
    key: str
    what: str
    _recent: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))

    def look(self, record: UpdateRecord) -> Signs:
        signs: dict[str, str | None] = {}
        number, limit = self.settings.updates, self.settings.share
        for domain, numbers in record.domains.items():
            value = numbers.get(self.key)
            if value is None:
                continue
            recent = self._recent[domain]
            recent.append(value)
            if len(recent) > number:
                recent.popleft()
            half = number // 2
            is_high = len(recent) == number and min(recent) >= limit
            falls = is_high and half and fmean(list(recent)[-half:]) < fmean(list(recent)[:half]) - 0.05
            finding = f"{value:.0%} of {self.what} (limit {limit:.0%}) for {number} updates"
            if not falls:
                signs[domain] = finding if is_high else None
        return signs


@dataclass
class DeadDomainDetector:
    """Counts graded responses since the mean reward of an update was positive, or changed."""

    settings: DeadDomain
    domains: Collection[str]
    _counts: dict[str, float] = field(default_factory=dict)
    _last: dict[str, float] = field(default_factory=dict)

    def look(self, record: UpdateRecord) -> Signs:
        signs: dict[str, str | None] = {}
        for domain, numbers in record.domains.items():
            reward, number = numbers.get("reward"), numbers.get("num_rollouts")
            if domain not in self.domains or reward is None or number is None:
                continue
            is_dead = reward <= 0.0 and self._last.get(domain, reward) == reward
            self._last[domain] = reward
            graded = number * (record.on_policy_fraction or 0.0)  # others' responses have no reward
            self._counts[domain] = self._counts.get(domain, 0.0) + graded if is_dead else 0.0
            count, limit = self._counts[domain], self.settings.responses
            finding = f"reward {reward:g} in {count:.0f} responses in a row (limit {limit})"
            signs[domain] = finding if count >= limit else None
        return signs


@dataclass
class StarvedDomainDetector:
    """Measures each domain's share of the summed token weights, over enough updates to contain all."""

    settings: StarvedDomain
    domains_of: Mapping[str, frozenset[str]]  # by phase
    _recent: dict[frozenset[str], deque[Mapping[str, tuple[float, float]]]] = field(default_factory=dict)

    def look(self, record: UpdateRecord) -> Signs:
        domains = self.domains_of[record.phase]
        if len(domains) < 2:
            return NO_SIGNS
        recent = self._recent.setdefault(domains, deque())
        recent.append({name: _mass(numbers) for name, numbers in record.domains.items()})
        needed = _PROMPTS_PER_DOMAIN * len(domains)
        sizes = [sum(rollouts for rollouts, _ in one.values()) for one in recent]
        while len(recent) > self.settings.updates and sum(sizes[1:]) >= needed:
            recent.popleft()
            sizes.pop(0)
        if len(recent) < self.settings.updates or sum(sizes) < needed:
            return NO_SIGNS
        totals = {d: sum(one[d][1] for one in recent if d in one) for d in sorted(domains)}
        whole, limit = sum(totals.values()), self.settings.share / len(domains)
        if not whole:
            return NO_SIGNS
        return {
            domain: f"{total / whole:.1%} of the loss's weight in {len(recent)} updates (limit {limit:.1%})"
            if total / whole < limit
            else None
            for domain, total in totals.items()
        }


def _mass(numbers: Numbers) -> tuple[float, float]:
    """Return a domain's number of rollouts and its part of the summed token weights."""
    count, share, weight = (numbers.get(key) or 0.0 for key in ("num_rollouts", "token_share", "weight"))
    return count, share * weight


@dataclass
class RolloutGapDetector:
    settings: RolloutGap

    def look(self, record: UpdateRecord) -> Signs:
        gap, limit = record.policy.get("rollout_logprob_gap"), self.settings.nats
        if gap is None:
            return NO_SIGNS
        finding = f"rollout and training log-probs differ by {gap:.2g} nats per token (limit {limit:g})"
        return {"": finding if gap > limit else None}


@dataclass
class IdenticalTeacherDetector:
    """Looks at the run's first update, whose figures are of the student before any change."""

    settings: IdenticalTeacher
    teachers: Collection[str]

    def look(self, record: UpdateRecord) -> Signs:
        if record.update > 1:
            return NO_SIGNS
        limit = self.settings.below
        signs: dict[str, str | None] = {}
        for name in record.teachers.keys() & set(self.teachers):
            value = divergence(record.teachers[name])
            if value is not None:
                is_same = abs(value) < limit
                signs[name] = (
                    f"divergence {value:.1g} before the first update (limit {limit:g})" if is_same else None
                )
        return signs


@dataclass
class FirstGapDetector:
    """Judges the log-prob gap in the first updates, on text of others or on the student's own.

    `figure` is the gap (log p of teacher minus student) that `is_far` judges. Text of others is judged in
    mixtures, too. The student's own is not: it may be far from a teacher whose text it also learns from.
    Later updates are all well, so that the alarm clears.
    """

    settings: MismatchedTeacher | NoColdStart
    teachers: Collection[str]
    figure: Literal["logprob_gap_student", "logprob_gap_text"]
    is_far: Callable[[float], bool]
    limit: str
    _seen: int = 0

    def look(self, record: UpdateRecord) -> Signs:
        if self._seen >= self.settings.updates or not self._is_judged(record):
            return NO_SIGNS
        self._seen += 1
        gaps = {name: record.teachers[name].get(self.figure) for name in record.teachers}
        return {
            name: f"log-prob gap {gap:+.2g} nats per token (limit {self.limit})" if self.is_far(gap) else None
            for name, gap in gaps.items()
            if name in self.teachers and gap is not None
        }

    def _is_judged(self, record: UpdateRecord) -> bool:
        """Whether all text is the student's; or some is of others, and the student is not trained yet."""
        if self.figure == "logprob_gap_student":
            return record.on_policy_fraction == 1.0
        return record.on_policy_fraction != 1.0 and (self._seen > 0 or record.update == 1)
