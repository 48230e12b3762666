"""Raises alarms: watches the events of a run, and says whether the run should stop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from mergeopd.alarms.detectors import Detector
from mergeopd.alarms.of_plan import detectors_of
from mergeopd.alarms.texts import TEXTS
from mergeopd.recipe.plan import Plan
from mergeopd.reporting.events import AccuracyMeasured, AlarmRaised, Event, Reporter, RunStarted, UpdateDone
from mergeopd.reporting.jsonl import UpdateRecord
from mergeopd.reporting.result import AlarmSummary, Estimate, Result

_CLEAR_AFTER = 10  # updates in a row without a sign, after which an alarm can be raised again


@dataclass
class _State:
    """A subject of an alarm: signs seen in a row, or updates without one; `is_raised` until it clears."""

    num_signs: int = 0
    num_clear: int = 0
    is_raised: bool = False

    def add(self, is_sign: bool, needed: int) -> bool:
        """Count a judgement; return whether the alarm is to be raised now."""
        self.num_signs = self.num_signs + 1 if is_sign else 0
        self.num_clear = 0 if is_sign else self.num_clear + 1
        if self.num_clear >= _CLEAR_AFTER:
            self.is_raised = False
        is_due = self.num_signs >= needed and not self.is_raised
        self.is_raised = self.is_raised or is_due
        return is_due


class AlarmWatch:
    """Passes events on to `inner`, followed by the alarms that they raise.

    An alarm is raised once for each subject, and again only after it cleared. `overlap` counts, by source,
    the evaluation prompts that are also trained on.
    """

    def __init__(self, plan: Plan, overlap: Mapping[str, int], inner: Reporter) -> None:
        self._plan = plan
        self._overlap = overlap
        self._inner = inner
        self._detectors: dict[str, Detector] = {
            name: detector for name, detector in detectors_of(plan).items() if self._is_on(name)
        }
        self._states: dict[tuple[str, str], _State] = {}
        self._base: Mapping[str, Estimate] = {}
        self._raised: list[AlarmRaised] = []
        self._to_stop: str | None = None

    def emit(self, event: Event) -> None:
        """Report the event and its alarms."""
        self._inner.emit(event)
        for alarm in self._alarms_of(event):
            self._raised.append(alarm)
            if alarm.stops and self._to_stop is None:
                self._to_stop = f"{alarm.name} ({alarm.subject})" if alarm.subject else alarm.name
            self._inner.emit(alarm)

    def take_stop(self) -> str | None:
        """Return the alarm that asks to stop the run, once; None where none does."""
        reason, self._to_stop = self._to_stop, None
        return reason

    def replay(
        self,
        updates: Iterable[UpdateRecord],
        accuracy: Iterable[AccuracyMeasured],
        alarms: Iterable[AlarmRaised],
    ) -> None:
        """Restore the state of a resumed run from its records; alarms that were raised stay raised."""
        self._raised = list(alarms)
        measured = {event.update: event for event in accuracy}
        if 0 in measured:
            list(self._accuracy(measured.pop(0)))
        for record in updates:
            list(self._update(record))
            if record.update in measured:
                list(self._accuracy(measured[record.update]))
        known = {(alarm.name, alarm.subject) for alarm in self._raised}
        for key, state in self._states.items():
            state.is_raised = state.is_raised and key in known

    @property
    def summaries(self) -> tuple[AlarmSummary, ...]:
        """The alarms of the run, each at its first update."""
        first: dict[tuple[str, str], AlarmRaised] = {}
        for alarm in self._raised:
            first.setdefault((alarm.name, alarm.subject), alarm)
        return tuple(AlarmSummary(a.update, a.name, a.subject, a.finding) for a in first.values())

    def judge(self, result: Result) -> Result:
        """Raise the alarms of a result, and return it with all alarms of the run."""
        for name, subject, finding in _signs_of(result, self._plan):
            if self._is_on(name) and all((a.name, a.subject) != (name, subject) for a in self._raised):
                # Nothing is left to stop.
                alarm = replace(self._alarm(self._plan.num_updates, name, subject, finding), stops=False)
                self._raised.append(alarm)
                self._inner.emit(alarm)
        return replace(result, alarms=self.summaries)

    def _is_on(self, name: str) -> bool:
        return self._plan.alarms.action_of(name) != "off"

    def _alarms_of(self, event: Event) -> Iterator[AlarmRaised]:
        match event:
            case RunStarted():
                yield from self._start()
            case UpdateDone():
                yield from self._update(UpdateRecord.of(event))
            case AccuracyMeasured():
                yield from self._accuracy(event)

    def _start(self) -> Iterator[AlarmRaised]:
        """Raise the alarms of the inputs, unless an earlier start of this run did."""
        for source, number in sorted(self._overlap.items()):
            known = any((a.name, a.subject) == ("overlap", source) for a in self._raised)
            if number and self._is_on("overlap") and not known:
                yield self._alarm(0, "overlap", source, f"{number:,} evaluation prompts are also trained on")

    def _update(self, record: UpdateRecord) -> Iterator[AlarmRaised]:
        for name, detector in self._detectors.items():
            needed = self._plan.alarms.updates_of(name)
            for subject, finding in detector.look(record).items():
                yield from self._count(record.update, name, subject, finding, needed)

    def _accuracy(self, event: AccuracyMeasured) -> Iterator[AlarmRaised]:
        if not event.update:
            self._base = event.accuracy
            return
        trained = self._plan.evaluation.experts if self._plan.evaluation is not None else {}
        for suite, now in event.accuracy.items():
            base = self._base.get(suite)
            if suite not in trained or base is None or base.value is None or now.value is None:
                continue
            below = (now.high or 0.0) < (base.low or 0.0)
            finding = f"accuracy {now.value:.1%}, the base {base.value:.1%}, beyond their intervals"
            yield from self._count(event.update, "below_base", suite, finding if below else None, 1)
            if base.value == 0.0:
                finding = f"accuracy 0 % in {event.num_prompts.get(suite, 0):,} prompts, as of the base"
                yield from self._count(event.update, "dead_domain", suite, None if now.value else finding, 1)

    def _count(
        self, update: int, name: str, subject: str, finding: str | None, needed: int
    ) -> Iterator[AlarmRaised]:
        if self._is_on(name):
            state = self._states.setdefault((name, subject), _State())
            if state.add(finding is not None, needed) and finding is not None:
                lasting = f" for {needed} updates" if needed > 1 else ""
                yield self._alarm(update, name, subject, finding + lasting)

    def _alarm(self, update: int, name: str, subject: str, finding: str) -> AlarmRaised:
        cause, remedy = TEXTS[name]
        stops = self._plan.alarms.action_of(name) == "stop"
        return AlarmRaised(update, name, subject, finding, cause, remedy, stops)


def _signs_of(result: Result, plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield name, subject and finding of each sign in a result."""
    for suite, row in result.suites.items():
        base, merged = row.accuracy.get("base"), row.accuracy.get("merged")
        expert = row.accuracy.get(row.expert or "")
        # What is forgotten of a skill without an expert is in the verdict.
        if row.expert is None or base is None or base.value is None or merged is None:
            continue
        if row.over_base.value is not None and row.over_base.high is not None and row.over_base.high < 0:
            yield (
                "below_base",
                suite,
                f"{100 * row.over_base.value:+.1f} points to the base, beyond the interval",
            )
        if base.value == 0.0 and merged.value == 0.0:
            yield "dead_domain", suite, f"accuracy 0 % in {row.num_prompts:,} prompts, as of the base"
        teacher = plan.teachers.get(row.expert.removeprefix("expert/"))
        is_expert = teacher is not None and teacher.student is None
        if is_expert and expert is not None and expert.value is not None and expert.value <= base.value:
            yield "weak_teacher", suite, f"the expert reaches {expert.value:.1%}, the base {base.value:.1%}"
