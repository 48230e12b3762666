"""Alarms from streams of figures: one stream for every alarm, once, again after it cleared, over a resume."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from results import result_of

from mergeopd.alarms.texts import TEXTS
from mergeopd.alarms.watch import AlarmWatch
from mergeopd.recipe.alarms import ALARMS
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.resolve import read
from mergeopd.reporting.events import (
    AccuracyMeasured,
    AlarmRaised,
    DomainStats,
    Event,
    PolicyStats,
    RunStarted,
    TeacherStats,
    UpdateDone,
)
from mergeopd.reporting.jsonl import UpdateRecord, update_record
from mergeopd.reporting.result import Estimate
from mergeopd.storage.metrics import json_text

DOMAINS = ("chat", "code", "math")
HEALTHY = DomainStats(10, 300, 30.0, 1 / 3, 1.0, 0.5, 0.6, 0.1, 0.4, 1 / 3, 0.05)
TEACHER = TeacherStats(300, {"reverse_kl": 0.8}, -0.8, 0.4, logprob_gap_student=-0.8)
POLICY = PolicyStats(0.0, 0.0, 1.0, 0.001, 0.1)
START = RunStarted("run", "r.yaml", 100, (("merge", 100),), DOMAINS, DOMAINS, Path("run"))
UPDATES = TypeAdapter(UpdateRecord)


@pytest.fixture
def plan(project: Path) -> Plan:
    plan = read(project / "recipes" / "merge.yaml").plan
    assert plan is not None
    return plan


class Kept:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def alarms(self) -> list[tuple[int, str, str]]:
        return [(e.update, e.name, e.subject) for e in self.events if isinstance(e, AlarmRaised)]


def update(number: int, **changes: Any) -> UpdateDone:
    """An update of a healthy run; `domains` and `teachers` replace figures by name, `None` removes one."""
    own, teachers = changes.pop("domains", {}), changes.pop("teachers", {})
    event = UpdateDone(
        update=number,
        phase="merge",
        round=number,
        lr=1e-5,
        loss=1.0,
        grad_norm=2.0,
        num_tokens=900,
        on_policy_fraction=1.0,
        teachers={name: replace(TEACHER, **teachers.get(name, {})) for name in DOMAINS},
        domains={
            name: replace(HEALTHY, **own.get(name, {})) for name in DOMAINS if own.get(name, {}) is not None
        },
        seconds={},
        policy=POLICY,
    )
    return replace(event, **changes)


def watched(plan: Plan, events: Sequence[Event], **overlap: int) -> list[tuple[int, str, str]]:
    kept = Kept()
    watch = AlarmWatch(plan, overlap, kept)
    for event in events:
        watch.emit(event)
    return kept.alarms


def kl(value: float) -> dict[str, Any]:
    return {"divergence": {"reverse_kl": value}, "logprob_gap_student": -value}


def shared(student: float, teacher: float) -> dict[str, Any]:
    return {"shared_mass_S": student, "shared_mass_T": teacher}


ON_TEXT = {"logprob_gap_student": None}
Stream = Callable[[int], UpdateDone]
BAD: dict[str, tuple[Stream, tuple[int, str]]] = {
    "zero_gradient": (lambda u: update(u, grad_norm=2.0 if u < 4 else 1e-8), (8, "")),
    "gradient_spike": (lambda u: update(u, grad_norm=2.0 if u < 10 else 21.0), (12, "")),
    "divergence_rising": (
        # The running mean is 0.8 + 2.2 (1 - 0.75^k) after k updates, and above 0.8 + 1 from k = 3.
        lambda u: update(u, teachers={"code": kl(0.8 if u < 5 else 3.0)}),
        (11, "code"),
    ),
    "entropy_collapse": (
        lambda u: update(u, domains={"math": {"entropy_S": 0.6 if u < 3 else 1e-4}}),
        (5, "math"),
    ),
    "length_collapse": (lambda u: update(u, domains={"chat": {"mean_length": 30.0 if u < 6 else 9.0}}), (8, "chat")),
    "truncation": (lambda u: update(u, domains={"math": {"truncated_fraction": 0.6}}), (6, "math")),
    "repetition": (lambda u: update(u, domains={"math": {"repetition": 0.9}}), (6, "math")),
    "dead_domain": (lambda u: update(u, domains={"code": {"reward": 0.0}}), (30, "code")),
    "starved_domain": (lambda u: update(u, domains={"chat": {"weight": 0.05}}), (5, "chat")),
    "rollout_gap": (lambda u: update(u, policy=replace(POLICY, rollout_logprob_gap=0.2)), (3, "")),
    "identical_teacher": (
        lambda u: update(u, teachers={"math": kl(1e-6 if u == 1 else 0.3)}),
        (1, "math"),
    ),
    "mismatched_teacher": (
        lambda u: update(u, on_policy_fraction=0.0, teachers={"code": {"logprob_gap_text": 4.0 if u < 9 else 0.5}}),
        (2, "code"),
    ),
    "no_cold_start": (
        lambda u: update(u, on_policy_fraction=float(u > 3), teachers={"code": kl(6.0) if u > 3 else ON_TEXT}),
        (6, "code"),
    ),
    # 8 updates to rise, then 3 in a row.
    "low_shared_mass": (lambda u: update(u, teachers={"code": shared(0.4, 0.9)}), (11, "code")),
    "shared_mass_falling": (
        # The running mean is 0.95 - 0.4 (1 - 0.75^k) after k updates, and below 0.95 - 0.25 from k = 4.
        lambda u: update(u, teachers={"math": shared(0.99, 0.95 if u < 5 else 0.55)}),
        (10, "math"),
    ),
    "entropy_gap_rising": (
        # 0.1 + 1.4 (1 - 0.75^k) is above 0.1 + 0.5 from k = 2.
        lambda u: update(u, teachers={"math": {"entropy_gap": 0.1 if u < 5 else 1.5}}),
        (8, "math"),
    ),
}  # fmt: skip


def test_text_of_a_mismatched_teacher_is_found_in_a_mixture_as_well(plan: Plan) -> None:
    """Over all tokens, its gap and that of the student's own responses cancel."""

    def stream(u: int, gap: float) -> UpdateDone:
        figures = {"logprob_gap": 0.0, "logprob_gap_student": -6.0, "logprob_gap_text": gap}
        return update(u, on_policy_fraction=0.5, teachers={"code": figures})

    assert watched(plan, [stream(u, 6.0) for u in range(1, 9)]) == [(2, "mismatched_teacher", "code")]
    # A student that also learns from its teachers' text needs no cold start.
    assert watched(plan, [stream(u, 1.0) for u in range(1, 9)]) == []


def test_likely_tokens_may_be_few_at_first_and_on_text_of_others(plan: Plan) -> None:
    """Shared mass that rises, that falls with a new share of the student's responses, or without any."""

    def rising(u: int) -> UpdateDone:
        return update(u, teachers={"code": shared(min(0.9, 0.1 + u / 50), 0.9)})

    def ramp(u: int) -> UpdateDone:
        return update(u, on_policy_fraction=min(u / 20, 1.0), teachers={"code": shared(1.0 - u / 50, 0.9)})

    def cold_start(u: int) -> UpdateDone:
        figures = ON_TEXT | shared(0.1, 0.1)
        return update(u, on_policy_fraction=0.0, teachers={"code": figures})

    for stream in (rising, ramp, cold_start):
        assert watched(plan, [stream(u) for u in range(1, 26)]) == []


def test_a_ramp_towards_own_responses_raises_nothing_but_a_rising_gap_on_them_does(plan: Plan) -> None:
    """Over all text the divergence grows with the share of the student's responses."""

    def stream(u: int, gap: float) -> UpdateDone:
        figures = {"divergence": {"reverse_kl": 0.2 + u / 10}, "logprob_gap_student": gap}
        return update(u, on_policy_fraction=u / 40, teachers={"code": figures})

    assert watched(plan, [stream(u, -2.0) for u in range(1, 40)]) == []
    # The running mean of the estimate passes 2 + 2 soon after update 20.
    (alarm,) = watched(plan, [stream(u, -2.0 if u < 20 else -5.0) for u in range(1, 40)])
    assert alarm[1:] == ("divergence_rising", "code")
    assert 24 <= alarm[0] <= 32


@pytest.mark.parametrize("name", BAD)
def test_each_alarm_is_raised_once_at_its_update(plan: Plan, name: str) -> None:
    stream, (number, subject) = BAD[name]
    assert watched(plan, [stream(u) for u in range(1, 40)]) == [(number, name, subject)]


def test_healthy_runs_raise_nothing(plan: Plan) -> None:
    """Noise of 30 %, a base that rambles at first, a rare reward, a phase whose divergence starts higher."""
    noise = random.Random(0)
    events = []
    for u in range(1, 101):
        value = (0.4 if u < 20 else 2.0 if u < 40 else 0.3) * noise.uniform(0.7, 1.3)
        rambling = max(0.0, 1.0 - u / 10)
        own = {
            "truncated_fraction": rambling,
            "repetition": rambling,
            "mean_length": 64 * rambling + 30 * (1 - rambling),
            "reward": float(u % 15 == 0) / 10,
        }
        phase = {"phase": "merge" if u >= 20 else "cold_start", "on_policy_fraction": float(u >= 20)}
        grad = 2.0 * noise.uniform(0.3, 3.0)
        teachers = {name: kl(value) for name in DOMAINS}
        events.append(
            update(u, grad_norm=grad, domains=dict.fromkeys(DOMAINS, own), teachers=teachers, **phase)
        )
    assert watched(plan, events) == []


def test_an_alarm_comes_back_after_it_cleared(plan: Plan) -> None:
    def is_dead(u: int) -> bool:
        return u <= 12 or 16 <= u <= 20 or u >= 31  # the second gap is long enough

    events = [update(u, grad_norm=0.0 if is_dead(u) else 1.0) for u in range(1, 41)]
    assert watched(plan, events) == [(5, "zero_gradient", ""), (35, "zero_gradient", "")]


def test_a_missing_domain_starves_only_if_enough_prompts_were_drawn(plan: Plan) -> None:
    few = [update(u, domains={"chat": None, "code": {"num_rollouts": 1}, "math": {"num_rollouts": 1}}) for u in range(1, 16)]  # fmt: skip
    assert watched(plan, few[:14]) == []
    assert watched(plan, few) == [(15, "starved_domain", "chat")]


def test_a_resume_restores_what_was_seen(plan: Plan) -> None:
    """Split at every update, files and later events raise what an uninterrupted run raises."""

    def stream(u: int) -> UpdateDone:
        dead, spike = {"reward": 0.0}, 2.0 if u % 18 < 12 else 50.0
        return update(
            u, grad_norm=spike, domains={"code": dead}, teachers={"math": kl(0.5 + max(0, u - 12) / 4)}
        )

    events = [stream(u) for u in range(1, 41)]
    whole = watched(plan, events)
    assert {name for _, name, _ in whole} == {"gradient_spike", "dead_domain", "divergence_rising"}
    for split in range(0, 41, 4):
        first = Kept()
        before = AlarmWatch(plan, {}, first)
        for event in events[:split]:
            before.emit(event)
        lines = [UPDATES.validate_json(json_text(update_record(event))) for event in events[:split]]
        kept = Kept()
        watch = AlarmWatch(plan, {}, kept)
        watch.replay(lines, (), [e for e in first.events if isinstance(e, AlarmRaised)])
        for event in events[split:]:
            watch.emit(event)
        assert first.alarms + kept.alarms == whole
        assert {(s.name, s.subject) for s in watch.summaries} == {(n, s) for _, n, s in whole}


def test_actions(plan: Plan) -> None:
    events = [BAD["zero_gradient"][0](u) for u in range(1, 20)]
    off = plan.model_copy(update={"alarms": plan.alarms.model_copy(update={"action": "off"})})
    assert watched(off, events) == []
    own = plan.alarms.zero_gradient.model_copy(update={"action": "stop", "updates": 2})
    stops = plan.model_copy(update={"alarms": plan.alarms.model_copy(update={"zero_gradient": own})})
    watch = AlarmWatch(stops, {}, Kept())
    reasons = []
    for event in events:
        watch.emit(event)
        reasons.append(watch.take_stop())
    assert reasons == [None] * 4 + ["zero_gradient"] + [None] * 14
    watch = AlarmWatch(plan, {}, Kept())
    for event in events:
        watch.emit(event)
    assert watch.take_stop() is None


def test_inputs_and_evaluations_raise_alarms(plan: Plan) -> None:
    def measured(u: int, **values: float) -> AccuracyMeasured:
        return AccuracyMeasured(
            u, {n: Estimate(v, max(0.0, v - 0.1), v + 0.1) for n, v in values.items()}, {"code": 50}
        )

    events = [
        START,
        # What is forgotten of `facts`, a suite without an expert, is no alarm.
        measured(0, math=0.5, code=0.0, facts=0.9),
        measured(10, math=0.35, code=0.2, facts=0.0),  # intervals of math overlap
        measured(20, math=0.2, code=0.0, facts=0.0),
    ]
    assert watched(plan, events, eval_math=3, eval_code=0) == [
        (0, "overlap", "eval_math"),
        (20, "below_base", "math"),
        (20, "dead_domain", "code"),
    ]


def test_the_result_is_judged_and_names_all_alarms(plan: Plan) -> None:
    kept = Kept()
    watch = AlarmWatch(plan, {"eval_math": 2}, kept)
    watch.emit(START)
    accuracies = {
        "math": {"base": 0.4, "expert/math": 0.9, "merged": 0.2},
        "code": {"base": 0.5, "expert/code": 0.5, "merged": 0.6},
        "chat": {"base": 0.0, "expert/chat": 0.7, "merged": 0.0},
    }
    measured = result_of(accuracies)
    facts = replace(measured.suites["math"], expert=None)  # forgotten, which is no alarm
    result = watch.judge(replace(measured, suites={**measured.suites, "facts": facts}))
    expected = [
        ("overlap", "eval_math"),
        ("below_base", "math"),
        ("weak_teacher", "code"),
        ("dead_domain", "chat"),
    ]
    assert [(a.name, a.subject) for a in result.alarms] == expected
    assert [a.update for a in result.alarms] == [0, 100, 100, 100]
    assert "-20.0 points" in result.alarms[1].finding
    assert watch.judge(result).alarms == result.alarms  # as after an interrupted evaluation
    assert len(kept.alarms) == 4


def test_every_alarm_has_a_text_and_a_section_in_the_documents() -> None:
    assert set(TEXTS) == set(ALARMS)
    page = (Path(__file__).parents[3] / "docs" / "alarms.md").read_text(encoding="utf-8")
    assert [name for name in ALARMS if f"| `{name}` |" not in page] == []
    line = json.loads(json_text(asdict(AlarmRaised(3, "overlap", "x", "f", *TEXTS["overlap"], stops=False))))
    assert line["remedy"] == TEXTS["overlap"][1]
