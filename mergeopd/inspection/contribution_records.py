"""Build the records of contribution.json from what a run and its inspection measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from mergeopd.inspection.changes import Rows, changed_responses, domain_change, rest_nats, teacher_change
from mergeopd.inspection.contribution import BothStudents, MeasuredTeacher, sampled_responses
from mergeopd.inspection.contribution_summary import summary_of
from mergeopd.inspection.finished_run import FinishedRun
from mergeopd.messages import shown
from mergeopd.reporting.contribution import (
    Change,
    ChangedResponse,
    Contribution,
    DomainChange,
    MeasuredOn,
    TeacherChange,
    TeacherContribution,
)
from mergeopd.reporting.inspection import VERSION
from mergeopd.reporting.page.html import name_of
from mergeopd.reporting.result import Estimate, SuiteResult


@dataclass(frozen=True, slots=True)
class _Measured:
    """The responses of both students to the prompts of a suite or domain."""

    name: str
    measured_on: MeasuredOn
    base: Rows
    merged: Rows


def contribution_of(
    run: FinishedRun,
    students: BothStudents,
    measured: Mapping[str, MeasuredTeacher],
    seconds: Mapping[str, float],
) -> Contribution:
    """Return the record of what a run changed."""
    settings, plan = students.base.settings, run.inputs.plan
    teachers = _teachers(run, students, measured)
    domains, responses = _domains(run, students)
    forgotten = tuple(domain.name for domain in domains if domain.pass_rate.sign < 0)
    return Contribution(
        version=VERSION,
        run=shown(run.folder),
        name=name_of(run.data),
        plan_hash=run.plan_hash,
        base=_shown_model(plan.student.model),
        merged=shown(run.export),
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        settings={
            "prompts": len(students.base.prompts),
            "samples": settings.samples,
            "top_k": settings.top_k,
            "responses": settings.responses,
        },
        summary=summary_of(teachers, domains),
        teachers=teachers,
        domains=domains,
        forgotten=forgotten,
        responses=responses,
        notes=(*run.notes, *run.inputs.notes),
        seconds=dict(seconds),
    )


def _teachers(
    run: FinishedRun, students: BothStudents, measured: Mapping[str, MeasuredTeacher]
) -> tuple[TeacherContribution, ...]:
    plans, prompts = run.inputs.plan.teachers, students.base.prompts
    by_domain: dict[str, dict[str, TeacherChange]] = {}
    nats: dict[tuple[str, str], float] = {}
    totals: dict[str, TeacherChange] = {}
    for name, one in measured.items():
        if one.base is None or one.merged is None or not one.members:
            continue
        totals[name] = teacher_change(one.base, one.merged, one.graded, one.members)
        by_domain[name] = {}
        for domain in dict.fromkeys(prompts[i].domain for i in one.members):
            members = [i for i in one.members if prompts[i].domain == domain]
            by_domain[name][domain] = teacher_change(one.base, one.merged, one.graded, members)
            rest = rest_nats(one.merged.on_student, members)
            if rest is not None and name not in students.followers:
                nats[name, domain] = rest
    sum_of_rests = sum(nats.values())
    if sum_of_rests > 0:
        for name, domain in nats:
            share = nats[name, domain] / sum_of_rests
            by_domain[name][domain] = replace(by_domain[name][domain], rest_share=share)
        for name in {name for name, _ in nats}:
            rest = sum(value for (own, _), value in nats.items() if own == name)
            totals[name] = replace(totals[name], rest_share=rest / sum_of_rests)
    return tuple(
        TeacherContribution(
            name,
            _shown_model(plan.model) if plan.api is None else plan.api.model,
            totals.get(name),
            by_domain.get(name, {}),
            _fault(run, measured, name),
            measured[name].notes if name in measured else (),
        )
        for name, plan in plans.items()
    )


def _fault(run: FinishedRun, measured: Mapping[str, MeasuredTeacher], name: str) -> str | None:
    if name in run.faults:
        return run.faults[name]
    one = measured[name]
    if one.fault is None and not one.members:
        return "reads no prompts of this run, only documents"
    return one.fault


def _shown_model(model: str | None) -> str:
    return "" if model is None else shown(Path(model))


def _domains(
    run: FinishedRun, students: BothStudents
) -> tuple[tuple[DomainChange, ...], tuple[ChangedResponse, ...]]:
    """Return the changes by suite of the evaluation; domains that it lacks are those of the sample."""
    trained = {source.domain for source in run.inputs.plan.sources}
    tokenizer, number = run.inputs.student.tokenizer, students.base.settings.responses
    suites = {} if run.data.result is None else dict(run.data.result.suites)
    domains, responses = [], []
    for one in [*_evaluated(run, suites), *_sampled(run, students, suites)]:
        own = domain_change(
            one.name,
            one.base,
            one.merged,
            tokenizer,
            one.measured_on,
            is_trained=one.merged[0].domain in trained,
        )
        if one.measured_on == "evaluation":
            own = replace(own, pass_rate=_accuracy(suites[one.name]))
        domains.append(own)
        responses += changed_responses(one.name, one.base, one.merged, one.measured_on, number)
    # Runs before responses were kept have accuracies only.
    known = {domain.name for domain in domains if domain.measured_on == "evaluation"}
    domains += [
        DomainChange(name, row.domain, "evaluation", row.domain in trained, row.num_prompts, _accuracy(row))
        for name, row in suites.items()
        if name not in known and "merged" in row.accuracy and "base" in row.accuracy
    ]
    return tuple(domains), tuple(responses)


def _accuracy(row: SuiteResult) -> Change:
    unknown = Estimate(None)
    return Change(row.accuracy.get("base", unknown), row.accuracy.get("merged", unknown), row.over_base)


def _evaluated(run: FinishedRun, suites: Mapping[str, SuiteResult]) -> list[_Measured]:
    base, merged = (run.data.responses.get(key, ()) for key in ("base", "merged"))
    measured = [_Measured(name, "evaluation", _of(base, name), _of(merged, name)) for name in suites]
    return [one for one in measured if one.base and one.merged]


def _of(rows: Rows, suite: str) -> Rows:
    return [row for row in rows if (row.suite or row.domain) == suite]


def _sampled(run: FinishedRun, students: BothStudents, suites: Mapping[str, SuiteResult]) -> list[_Measured]:
    known = {suites[one.name].domain or one.name for one in _evaluated(run, suites)}
    base, merged = sampled_responses(students.base), sampled_responses(students.merged)
    return [
        _Measured(domain, "sample", own, [row for row in merged if row.domain == domain])
        for domain in dict.fromkeys(row.domain for row in base)
        if domain not in known and (own := [row for row in base if row.domain == domain])
    ]
