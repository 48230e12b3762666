"""Detectors of a student and a teacher that do not consider the same tokens, or ever fewer of them.

They judge the smaller of both models' probability on the common tokens of their 16 likeliest ones, not the
number of these: two models that are certain of every token agree on it, and their other 15 are noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field

from mergeopd.alarms.detectors import NO_SIGNS, RunningMean, Signs
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
class _TeacherDetector(ABC):
    """Judges a figure of every watched teacher by its running mean."""

    teachers: Collection[str]
    _means: PhaseMeans = field(default_factory=PhaseMeans, init=False)

    def look(self, record: UpdateRecord) -> Signs:
        self._means.start(record)
        signs: dict[str, str | None] = {}
        for name, numbers in record.teachers.items():
            value = self._figure(numbers) if name in self.teachers and self._is_judged(record) else None
            if value is not None:
                mean = self._means.add(name, value)
                signs |= self._judge(name, mean)
        return signs

    def _is_judged(self, record: UpdateRecord) -> bool:
        return True

    def _figure(self, numbers: Numbers) -> float | None:
        return shared_mass(numbers)

    @abstractmethod
    def _judge(self, name: str, mean: float) -> Signs:
        """Return the teacher's sign; none while it is too early."""


@dataclass
class LowSharedMassDetector(_TeacherDetector):
    """Judges phases of the student's own responses, after the updates in which the mass may rise."""

    settings: LowSharedMass

    def _is_judged(self, record: UpdateRecord) -> bool:
        return record.on_policy_fraction == 1.0

    def _judge(self, name: str, mean: float) -> Signs:
        if self._means.num[name] <= self.settings.after:
            return NO_SIGNS
        first, limit = self._means.first[name], self.settings.share
        finding = f"both models give {mean:.0%} to their common likely tokens, at first {first:.0%}"
        is_low = mean < limit and mean < first + self.settings.rise
        return {name: f"{finding} (limit {limit:.0%})" if is_low else None}


@dataclass
class SharedMassFallingDetector(_TeacherDetector):
    settings: SharedMassFalling

    def _judge(self, name: str, mean: float) -> Signs:
        highest = self._means.highest[name]
        limit = highest - self.settings.fall
        finding = f"both models give {mean:.0%} to their common likely tokens, before {highest:.0%}"
        return {name: f"{finding} (limit {limit:.0%})" if mean < limit else None}


@dataclass
class EntropyGapRisingDetector(_TeacherDetector):
    settings: EntropyGapRising

    def _figure(self, numbers: Numbers) -> float | None:
        return numbers.get("entropy_gap")

    def _judge(self, name: str, mean: float) -> Signs:
        lowest = self._means.lowest[name]
        limit = max(self.settings.factor * lowest, lowest + self.settings.margin)
        finding = f"entropies differ by {mean:.2g} nats per token, at the lowest {lowest:.2g}"
        return {name: f"{finding} (limit {limit:.2g})" if mean > limit else None}
