"""Build the records of inspect.json from what an inspection measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mergeopd.engine.rollouts import response_text
from mergeopd.engine.samples import TokenText, token_texts
from mergeopd.inspection.compatibility import compatibility, licence_of
from mergeopd.inspection.inspector import Inspector, TeacherFindings
from mergeopd.inspection.measure import positions_of
from mergeopd.inspection.signal import signal_of
from mergeopd.inspection.verdicts import verdict_of
from mergeopd.intervals import Values
from mergeopd.messages import shown
from mergeopd.reporting.inspection import (
    VERSION,
    InspectedResponse,
    InspectedToken,
    Inspection,
    Signal,
    TeacherInspection,
    TokenCandidate,
    Verdict,
)


def inspection_of(
    inspector: Inspector,
    findings: Mapping[str, TeacherFindings],
    recipe: Path,
    seconds: Mapping[str, float],
) -> Inspection:
    """Return the record of an inspection."""
    inputs = inspector.inputs
    return Inspection(
        version=VERSION,
        recipe=shown(recipe),
        plan_hash=inputs.plan.hash,
        student=shown(Path(inputs.plan.student.model)),
        created=inputs.now.isoformat(timespec="seconds"),
        settings={**inspector.settings.values, "prompts": len(inspector.prompts)},
        teachers=tuple(_teacher(inspector, one) for one in findings.values()),
        notes=inputs.notes,
        seconds=dict(seconds),
    )


def _teacher(inspector: Inspector, one: TeacherFindings) -> TeacherInspection:
    inputs, limits = inspector.inputs, inspector.settings.thresholds
    plan = inputs.plan.teachers[one.name]
    comparison = compatibility(inputs, one.name)
    signal: Signal | None = None
    by_domain: dict[str, Signal] = {}
    if one.measured is not None:
        signal = signal_of(one.measured, one.members)
        for domain in dict.fromkeys(inspector.prompts[i].domain for i in one.members):
            members = [i for i in one.members if inspector.prompts[i].domain == domain]
            by_domain[domain] = signal_of(one.measured, members)
    verdict = verdict_of(signal, limits, comparison)
    if one.fault is not None:
        kind = verdict.kind if one.name not in inspector.teachers else "wrong_teacher"
        verdict = Verdict(kind, one.fault)
    return TeacherInspection(
        name=one.name,
        model=shown(plan.folder) if plan.api is None else plan.api.model,
        licence=licence_of(plan),
        verdict=verdict,
        compatibility=comparison,
        signal=signal,
        by_domain=by_domain,
        domain_verdicts={name: verdict_of(own, limits, comparison) for name, own in by_domain.items()},
        responses=_responses(inspector, one),
    )


def _responses(inspector: Inspector, one: TeacherFindings) -> tuple[InspectedResponse, ...]:
    """Return the chosen responses with their tokens as the teacher sees them."""
    student, inputs, compared = inspector.student, inspector.inputs, one.on_student
    if compared is None:
        return ()
    tokenizer = inputs.student.tokenizer
    responses = []
    for i in sorted(compared.shown & compared.figures.keys()):
        graded, rollout = student.graded[i], student.rollouts[i]
        prompt = inspector.prompts[graded.prompt]
        own = [] if one.own is None else [g for g in one.own.graded if g.prompt == graded.prompt]
        first = own[0] if own else None
        renderer = inputs.teachers[one.name]
        responses.append(
            InspectedResponse(
                prompt=tokenizer.decode(rollout.prompt_ids.tolist(), skip_special_tokens=False),
                domain=prompt.domain,
                is_correct=graded.is_correct,
                tokens=_tokens(inspector, one, i),
                teacher_response=None
                if first is None
                else response_text(
                    first.response.completion.response_ids, renderer.tokenizer, inputs.plan.rollout.stop
                ),
                teacher_is_correct=None if first is None else first.is_correct,
            )
        )
    return tuple(responses)


def _tokens(inspector: Inspector, one: TeacherFindings, i: int) -> tuple[InspectedToken, ...]:
    compared, rollout = one.on_student, inspector.student.rollouts[i]
    assert compared is not None
    tokenizer = inspector.inputs.student.tokenizer
    scored = compared.figures[i]
    places = {position: row for row, position in enumerate(scored.positions.tolist())}
    rows = {position: row for row, position in enumerate(positions_of(rollout).tolist())}
    candidates = compared.candidates.get(i)
    text_of = TokenText(tokenizer, int(rollout.prompt_ids[-1]))
    tokens = []
    for position, text in enumerate(token_texts(rollout.response_ids.tolist(), tokenizer)):
        row, place = rows.get(position), places.get(position)
        student: tuple[TokenCandidate, ...] = ()
        teacher: tuple[TokenCandidate, ...] = ()
        if candidates is not None and row is not None:
            student = _candidates(candidates.ids_S[row], candidates.logprobs_S[row], text_of)
            teacher = _candidates(candidates.ids_T[row], candidates.logprobs_T[row], text_of)
        kl, gap = (_value(scored.values.get(name), place) for name in ("reverse_kl", "logprob_gap"))
        tokens.append(InspectedToken(text, kl, gap, student, teacher))
    return tuple(tokens)


def _value(values: Values | None, row: int | None) -> float | None:
    if values is None or row is None or math.isnan(values[row]):
        return None
    return float(f"{values[row]:.6g}")


def _candidates(ids: list[int], logprobs: list[float], text_of: TokenText) -> tuple[TokenCandidate, ...]:
    return tuple(
        TokenCandidate(text_of[i], float(f"{math.exp(logprob):.6g}"))
        for i, logprob in zip(ids, logprobs, strict=True)
    )
