"""Build the records of inspect.json from what an inspection measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from mergeopd.engine.rollouts import response_text
from mergeopd.engine.samples import TokenText, token_texts
from mergeopd.inspection.budget import DomainSample, domain_budgets, unknown_gaps
from mergeopd.inspection.compatibility import compatibility, licence_of
from mergeopd.inspection.inspector import Findings, Inspector, TeacherFindings
from mergeopd.inspection.measure import positions_of
from mergeopd.inspection.signal import signal_of, token_mean
from mergeopd.inspection.verdicts import over_domains, verdict_of
from mergeopd.intervals import Values
from mergeopd.messages import shown
from mergeopd.reporting.inspection import (
    VERSION,
    GradientAlignment,
    InspectedResponse,
    InspectedToken,
    Inspection,
    Signal,
    TeacherInspection,
    TokenCandidate,
)


def inspection_of(
    inspector: Inspector,
    findings: Findings,
    recipe: Path,
    seconds: Mapping[str, float],
) -> Inspection:
    """Return the record of an inspection."""
    inputs, samples = inspector.inputs, _domain_samples(inspector, findings.teachers)
    probed = () if inspector.probe is None else inspector.probe.notes
    return Inspection(
        version=VERSION,
        recipe=shown(recipe),
        plan_hash=inputs.plan.hash,
        student=shown(Path(inputs.plan.student.model)),
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        settings={**inspector.settings.values, "prompts": len(inspector.prompts)},
        teachers=tuple(teacher_inspection(inspector, one) for one in findings.teachers.values()),
        domains=domain_budgets(inputs.plan, samples),
        conflicts=tuple(findings.conflicts),
        alignments=() if inspector.gradients is None else tuple(inspector.gradients.ranks()),
        notes=(*inputs.notes, *unknown_gaps(inputs.plan, samples), *probed),
        seconds=dict(seconds),
    )


def _domain_samples(inspector: Inspector, findings: Mapping[str, TeacherFindings]) -> dict[str, DomainSample]:
    """Return the student's responses by domain; documents count with their own lengths."""
    student, inputs = inspector.student, inspector.inputs
    samples = {}
    for source in inputs.plan.sources:
        if source.text_field is not None:
            lengths = [len(p.document.ids) for p in inputs.prompts[source.name] if p.document is not None]
            samples[source.domain] = DomainSample(float(np.mean(lengths)), ())
    for domain in dict.fromkeys(prompt.domain for prompt in inspector.prompts):
        members = [i for i, prompt in enumerate(inspector.prompts) if prompt.domain == domain]
        own = [r.num_trained for r in student.rollouts if r.prompt.domain == domain]
        gaps = [_gap(inspector, one, members) for one in findings.values()]
        known = [gap for gap in gaps if gap is not None]
        gap = sum(known) if known else None
        samples[domain] = DomainSample(float(np.mean(own)), student.counted(members), gap)
    return samples


def _gap(inspector: Inspector, one: TeacherFindings, members: Sequence[int]) -> float | None:
    """Return a teacher's mean reverse KL on these prompts, times its weight there."""
    own = sorted(set(members) & set(one.members))
    if one.measured is None or not own:
        return None
    scored = [each for each in one.measured.on_student if each.prompt in own]
    mean = token_mean(scored, "reverse_kl").value
    weights = [inspector.weight(one.name, i) for i in inspector.student.of(own)]
    return None if mean is None else mean * float(np.mean(weights))


def teacher_inspection(inspector: Inspector, one: TeacherFindings) -> TeacherInspection:
    """Return the record of one teacher."""
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
    of_domains = {name: verdict_of(own, limits, comparison) for name, own in by_domain.items()}
    verdict = one.fault or over_domains(verdict_of(signal, limits, comparison), of_domains)
    return TeacherInspection(
        name=one.name,
        model=shown(plan.folder) if plan.api is None else plan.api.model,
        licence=licence_of(plan),
        verdict=verdict,
        compatibility=comparison,
        signal=signal,
        by_domain=by_domain,
        domain_verdicts=of_domains,
        gradients=_gradients(inspector, one.name),
        responses=_responses(inspector, one),
    )


def _gradients(inspector: Inspector, name: str) -> GradientAlignment | None:
    """Return the alignment of a teacher whose distributions over the student's tokens are known."""
    gradients = inspector.gradients
    return None if gradients is None or name not in gradients.teachers else gradients.of_teacher(name)


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
