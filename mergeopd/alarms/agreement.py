"""Detectors of a student and a teacher that do not consider the same tokens, or ever fewer of them.

They judge the smaller of both models' probability on the common tokens of their 16 likeliest ones, not the
number of these: two models that are certain of every token agree on it, and their other 15 are noise.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from mergeopd.alarms.detectors import RunningMean, Signs
from mergeopd.recipe.alarms import EntropyGapRising, LowSharedMass, SharedMassFalling
from mergeopd.reporting.jsonl import Numbers, UpdateRecord


def shared_mass(numbers: Numbers) -> float | None:
    """Return the smaller probability of either model on their common likely tokens; None if unknown."""
    student, teacher = numbers.get("shared_mass_S"), numbers.get("shared_mass_T")
    return None if student is None or teacher is None else min(student, teacher)


@dataclass
class PhaseMeans:
    """Running means of a phase by teacher, with their first, lowest and highest values.

    They start again with a phase, and when the share of the student's responses reaches a new maximum: on
    these, the models differ more than on teachers' text.
    """

    first: dict[str, float] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    num: dict[str, int] = field(default_factory=dict)
    _means: dict[str, RunningMean] = field(default_factory=dict)
    _started: tuple[str, float] = ("", 0.0)

    def start(self, record: UpdateRecord) -> None:
        """Forget what was before, if this update starts again."""
        (phase, share), now = self._started, record.on_policy_fraction or 0.0
        if record.phase != phase or now > share:
            for kept in (self.first, self.lowest, self.highest, self.num, self._means):
                kept.clear()
            self._started = record.phase, now

    def add(self, name: str, value: float) -> float:
        """Add a teacher's value, and return the running mean."""
        mean = self._means.setdefault(name, RunningMean()).add(value)
        self.first.setdefault(name, mean)
        self.lowest[name] = min(mean, self.lowest.get(name, mean))
        self.highest[name] = max(mean, self.highest.get(name, mean))
        self.num[name] = self.num.get(name, 0) + 1
        return mean


@dataclass
class LowSharedMassDetector:
    """Judges phases of the student's own responses, after the updates in which the mass may rise."""

    settings: LowSharedMass
    teachers: Collection[str]
    _means: PhaseMeans = field(default_factory=PhaseMeans)

    def look(self, record: UpdateRecord) -> Signs:
        self._means.start(record)
        signs: dict[str, str | None] = {}
        for name, numbers in record.teachers.items():
            mass = shared_mass(numbers)
            if name not in self.teachers or mass is None or record.on_policy_fraction != 1.0:
                continue
            mean = self._means.add(name, mass)
            if self._means.num[name] > self.settings.after:
                first, limit = self._means.first[name], self.settings.share
                is_low = mean < limit and mean < first + self.settings.rise
                finding = f"both models give {mean:.0%} to their common likely tokens, at first {first:.0%}"
                signs[name] = f"{finding} (limit {limit:.0%})" if is_low else None
        return signs


@dataclass
class SharedMassFallingDetector:
    settings: SharedMassFalling
    teachers: Collection[str]
    _means: PhaseMeans = field(default_factory=PhaseMeans)

    def look(self, record: UpdateRecord) -> Signs:
        self._means.start(record)
        signs: dict[str, str | None] = {}
        for name, numbers in record.teachers.items():
            mass = shared_mass(numbers)
            if name in self.teachers and mass is not None:
                mean, highest = self._means.add(name, mass), self._means.highest[name]
                limit = highest - self.settings.fall
                finding = f"both models give {mean:.0%} to their common likely tokens, before {highest:.0%}"
                signs[name] = f"{finding} (limit {limit:.0%})" if mean < limit else None
        return signs


@dataclass
class EntropyGapRisingDetector:
    settings: EntropyGapRising
    teachers: Collection[str]
    _means: PhaseMeans = field(default_factory=PhaseMeans)

    def look(self, record: UpdateRecord) -> Signs:
        self._means.start(record)
        signs: dict[str, str | None] = {}
        for name, numbers in record.teachers.items():
            gap = numbers.get("entropy_gap")
            if name in self.teachers and gap is not None:
                mean, lowest = self._means.add(name, gap), self._means.lowest[name]
                limit = max(self.settings.factor * lowest, lowest + self.settings.margin)
                finding = f"entropies differ by {mean:.2g} nats per token, at the lowest {lowest:.2g}"
                signs[name] = f"{finding} (limit {limit:.2g})" if mean > limit else None
        return signs
