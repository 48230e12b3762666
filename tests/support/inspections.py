"""A made-up inspection with every kind of verdict and every part of the record.

Seven teachers: one ready, one that needs a cold start, one with another template, one that is noisy at depth, one
with another tokenizer that is wrong, one with nothing new, and one that was not run. The numbers are plausible and
keyed by names, so they are the same every time; the texts include what must be escaped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise

from report_pages import EVIL

from mergeopd.reporting.inspection import (
    CheckpointRank,
    Compatibility,
    Conflict,
    DiffSpan,
    DomainBudget,
    Finding,
    GradientAlignment,
    InspectedResponse,
    InspectedToken,
    Inspection,
    PositionBucket,
    Reason,
    Signal,
    TeacherInspection,
    TemplateDiff,
    TokenCandidate,
    Verdict,
    VerdictKind,
)
from mergeopd.reporting.result import Estimate

UNKNOWN = Estimate(None)
CONTROL_CHARACTERS = "\u202egnirts lanretxe\u202c \u0007\u001b[31m\u200b\u0000 é"

_MATH = (
    "We need the remainder of 7^2026 divided by 10.\nThe last digits of the powers of 7 repeat: 7, 9, 3, 1.\n"
    "Since 2026 = 4 · 506 + 2, the last digit is the second one, 9.\nSo the answer is \\boxed{9}.\n"
)
_CODE = (
    "```python\ndef merge(left, right):\n    result = []\n    while left and right:\n"
    "        source = left if left[0] <= right[0] else right\n        result.append(source.pop(0))\n"
    "    return result + left + right\n```\nEach element is moved once, so this takes linear time.\n"
)
_TEXTS = {"math": _MATH, "code": _CODE}
_PROMPTS = {
    "math": "What is the last digit of 7^2026? Put it in a box.",
    "code": "Write a function that merges two sorted lists.",
    "chat": "My plane leaves at 6:40 and the train takes 55 minutes. When should I leave?",
    "agent": "Find the cheapest flight from Oslo to Lisbon on the 3rd and book it with the tools.",
    "sql": "Which customers ordered more than twice in March? Table orders(customer, day).",
    "summary": "Summarise the minutes of the meeting in two sentences.",
}


def estimate(value: float | None, half_width: float = 0.03) -> Estimate:
    """Return an estimate with a symmetric interval."""
    return UNKNOWN if value is None else Estimate(value, value - half_width, value + half_width)


def fraction(value: float, half_width: float = 0.05) -> Estimate:
    """Return an estimate of a fraction, whose interval stays between 0 and 1."""
    return Estimate(value, max(0.0, value - half_width), min(1.0, value + half_width))


def signal(
    overlap: float,
    reverse_kl: float | None,
    passes: tuple[float, float],
    beyond: int | None = None,
    num_prompts: int = 64,
) -> Signal:
    """Return a signal with the given overlap, divergence, and pass rates of student and teacher."""
    return Signal(
        num_prompts=num_prompts,
        num_responses=4 * num_prompts,
        num_tokens=410 * 4 * num_prompts,
        k=16,
        overlap=fraction(overlap, 0.02),
        overlap_advantage=estimate(-0.4 * (1 - overlap), 0.01),
        entropy_gap=estimate(0.5 * (1 - overlap) + 0.02, 0.015),
        entropy_S=estimate(0.62),
        entropy_T=estimate(0.41),
        shared_mass_S=fraction(0.90 + 0.09 * overlap, 0.004),
        shared_mass_T=fraction(0.88 + 0.11 * overlap, 0.005),
        reverse_kl=estimate(reverse_kl, 0.02),
        forward_kl=estimate(None if reverse_kl is None else 1.3 * reverse_kl, 0.03),
        logprob_gap=estimate(-0.8 * (1 - overlap), 0.02),
        pass_rate_S=fraction(passes[0]),
        pass_rate_T=fraction(passes[1]),
        teacher_logprob_gap=estimate(-1.1 * (1 - overlap), 0.03),
        num_frontier=round(num_prompts * min(passes[0], 1 - passes[0]) * 1.4),
        positions=positions(overlap, reverse_kl, beyond),
    )


def positions(overlap: float, reverse_kl: float | None, beyond: int | None) -> tuple[PositionBucket, ...]:
    """Return buckets that double from 16 to 4,096 tokens; a teacher is noisy `beyond` a token."""
    edges = [0, *(16 * 2**i for i in range(9))]
    buckets = []
    for i, (start, stop) in enumerate(pairwise(edges)):
        is_noisy = beyond is not None and start >= beyond
        wave = 0.05 * random.Random(i).uniform(-1, 1)
        divergence = (
            None if reverse_kl is None else reverse_kl * (3.0 if is_noisy else 1.25 - 0.06 * i + wave)
        )
        buckets.append(
            PositionBucket(
                start=start,
                stop=stop,
                num_tokens=(stop - start) * max(8, 256 >> (i // 2)),
                reverse_kl=divergence,
                overlap=overlap * (0.6 if is_noisy else 0.95 + 0.01 * i + wave / 5),
                entropy_S=0.75 - 0.03 * i + wave,
                entropy_T=1.4 if is_noisy else 0.5 - 0.02 * i + wave,
                advantage=-0.4 * (1 - overlap) * (2.5 if is_noisy else 1.0 + wave),
            )
        )
    return tuple(buckets)


def gradient_alignment() -> GradientAlignment:
    """Return cosines of gradients that agree more on incorrect responses, and less at depth."""
    return GradientAlignment(
        num_nodes=96,
        num_skipped=31,
        num_rollouts=6144,
        score=Estimate(0.34, 0.27, 0.41),
        on_correct=Estimate(0.08, -0.05, 0.21),
        on_incorrect=Estimate(0.47, 0.38, 0.56),
        positions=tuple(
            PositionBucket(start, stop, 24, None, None, None, None, alignment=value)
            for start, stop, value in ((0, 64, 0.41), (64, 256, 0.37), (256, 1024, 0.28), (1024, 4096, -0.06))
        ),
    )


def verdict(kind: VerdictKind, sentence: str, *, remedy: str = "", beyond: int | None = None) -> Verdict:
    """Return a verdict whose reasons fail where the kind says so."""
    reasons = (
        Reason(
            "The teacher's pass rate exceeds the student's", "min_gain", 0.21, 0.05, kind != "nothing_new"
        ),
        Reason("The likeliest tokens overlap", "min_overlap", 0.41, 0.5, kind != "cold_start"),
        Reason("Reverse KL is high enough to teach", "min_reverse_kl", 0.084, 0.01, kind != "nothing_new"),
        Reason("Late divergence is close to early divergence", "max_noise_ratio", 2.9, 2.0, kind != "noisy"),
        Reason(
            "The template renders equal prompts", "max_template_diff", None, 0.0, kind != "template_mismatch"
        ),
    )
    return Verdict(kind, sentence, reasons, remedy, beyond)


def response(
    domain: str,
    seed: int,
    num_tokens: int,
    *,
    num_candidates: int = 5,
    is_foreign: bool = False,
    text: str = "",
) -> InspectedResponse:
    """Return a student's response with candidates of both models at every token."""
    rng = random.Random(f"{domain}/{seed}")
    body = text or _TEXTS.get(domain, _MATH)
    pieces = re.findall(r"\s?\w+|\s|[^\w\s]", body * (num_tokens // 20 + 1))[:num_tokens]
    words = sorted(set(pieces))
    tokens = []
    for i, piece in enumerate(pieces):
        divergence = min(9.0, rng.expovariate(12.0) + (rng.random() < 0.06) * rng.uniform(0.5, 4.0))
        tokens.append(
            InspectedToken(
                text="" if seed == 1 and i == 7 else piece,
                reverse_kl=None if is_foreign and i % 9 == 4 else divergence,
                advantage=None if is_foreign and i % 9 == 4 else -rng.expovariate(8.0),
                candidates_S=_candidates(rng, piece, words, num_candidates, 0.8),
                candidates_T=_candidates(rng, piece, words, num_candidates, 0.8 / (1.0 + divergence)),
            )
        )
    is_correct = None if domain == "chat" else seed % 3 == 0
    return InspectedResponse(
        prompt=_PROMPTS.get(domain, _PROMPTS["math"]),
        domain=domain,
        is_correct=is_correct,
        tokens=tuple(tokens),
        teacher_response=None if seed == 2 else body.replace("We need", "Let us find"),
        teacher_is_correct=None if is_correct is None or seed == 2 else True,
    )


def _candidates(
    rng: random.Random, token: str, words: Sequence[str], count: int, first: float
) -> tuple[TokenCandidate, ...]:
    rest = 1.0 - first
    texts = [token, *rng.sample(words, min(count - 1, len(words)))]
    shares = [first, *(rest * 0.6 * 0.4**i for i in range(count - 1))]
    pairs = sorted(zip(shares, texts, strict=False), key=lambda pair: -pair[0])
    return tuple(TokenCandidate(text, probability) for probability, text in pairs)


_SAME_TEMPLATE = TemplateDiff(
    "a prompt",
    (DiffSpan("<|user|>\nHello<|end|>\n<|assistant|>\n", "<|user|>\nHello<|end|>\n<|assistant|>\n"),),
)
_OTHER_TEMPLATES = (
    TemplateDiff(
        "a prompt",
        (
            DiffSpan("", "<|system|>\nYou are a helpful assistant.<|end|>\n"),
            DiffSpan("<|user|>\nHello<|end|>\n<|assistant|>\n", "<|user|>\nHello<|end|>\n<|assistant|>\n"),
            DiffSpan("", "<think>\n\n</think>\n\n"),
        ),
        ("system default", "thinking tags"),
    ),
    TemplateDiff(
        "a prompt with tools",
        (
            DiffSpan("<|system|>\n", "<|system|>\n"),
            DiffSpan(
                '<tools>[{"name": "search"}]</tools>', "You may call these functions:\n- search(query)\n"
            ),
            DiffSpan("<|end|>\n<|user|>\nHello<|end|>\n", "<|end|>\n<|user|>\nHello<|end|>\n"),
        ),
        ("tools",),
    ),
)
_OK = (
    Finding("vocabulary", "ok", "Both have 151,936 rows and the same 151,669 tokens; 267 rows are padding."),
    Finding("end_tokens", "ok", "Both end a response with <|end|>."),
    Finding("context", "ok", "The longest prompt and response have 5,120 tokens; the teacher reads 32,768."),
)


def _compatibility(name: str) -> Compatibility:
    if name == "chat":
        problem = Finding(
            "template",
            "problem",
            "The teacher's template adds a system message and empty thinking tags.",
            "Set `template: student` for this teacher, or `system: You are a helpful assistant.`",
        )
        return Compatibility((problem, *_OK), _OTHER_TEMPLATES)
    if name == "sql":
        notes = (
            Finding("vocabulary", "note", "Another tokenizer: 128,256 tokens, 84.8 % of them in both."),
            Finding("licence", "note", "The licence llama3.1 asks for a notice in models that it improved."),
        )
        return Compatibility((*notes, *_OK[1:]), (_SAME_TEMPLATE,), Estimate(0.913, 0.905, 0.921))
    return Compatibility(_OK, (_SAME_TEMPLATE,))


_READY = "The teacher passes 21 points more often than the student, and both prefer the same tokens."
_VERDICTS: dict[str, Verdict] = {
    "math": verdict("ready", _READY),
    "code": verdict(
        "cold_start",
        "The teacher is better, but the student rarely prefers its tokens: 41 % overlap.",
        remedy="Add a phase with `text: teacher` before the on-policy phase.",
    ),
    "chat": verdict(
        "template_mismatch",
        "The teacher reads another prompt than the student; its divergence is mostly in the first tokens.",
        remedy="Set `template: student` for this teacher.",
    ),
    "agent": verdict(
        "noisy",
        "Beyond token 1,024 the teacher's divergence triples and its overlap falls.",
        remedy="Limit `rollout.max_new_tokens` to 1024, or weight late tokens less.",
        beyond=1024,
    ),
    "sql": verdict("wrong_teacher", "The teacher passes less often than the student on these prompts."),
    "summary": verdict(
        "nothing_new", "Student and teacher have nearly the same distributions and pass rates."
    ),
    "legal": Verdict("unknown", "No prompt of the recipe uses this teacher, so its signal is unknown."),
}
_SIGNALS: dict[str, tuple[float, float | None, tuple[float, float]]] = {
    "math": (0.78, 0.084, (0.42, 0.63)),
    "code": (0.41, 0.61, (0.18, 0.55)),
    "chat": (0.52, 0.92, (0.50, 0.58)),
    "agent": (0.71, 0.15, (0.22, 0.47)),
    "sql": (0.49, None, (0.44, 0.31)),
    "summary": (0.97, 0.006, (0.71, 0.72)),
}


def inspected_teacher(
    name: str, num_responses: int = 3, num_tokens: int = 120, num_candidates: int = 5
) -> TeacherInspection:
    """Return one of the teachers of `inspection`."""
    measured = _SIGNALS.get(name)
    if measured is None:
        return TeacherInspection(name, f"models/{name}-8b", None, _VERDICTS[name], _compatibility(name))
    overlap, reverse_kl, passes = measured
    beyond = _VERDICTS[name].beyond
    by_domain = {name: signal(*measured, beyond=beyond, num_prompts=48)}
    domain_verdicts: dict[str, Verdict] = {}
    if name == "math":
        by_domain["algebra, second year"] = signal(0.55, 0.3, (0.12, 0.10), num_prompts=16)
        domain_verdicts["algebra, second year"] = verdict(
            "wrong_teacher", "The teacher passes no more often than the student on these prompts."
        )
    texts = {0: "", 1: f"It is {EVIL} {CONTROL_CHARACTERS} done. ", 2: ""} if name == "math" else {}
    return TeacherInspection(
        name=name,
        model=f"models/{name}-8b",
        licence="apache-2.0" if name != "sql" else "llama3.1",
        verdict=_VERDICTS[name],
        compatibility=_compatibility(name),
        signal=signal(overlap, reverse_kl, passes, beyond),
        by_domain=by_domain,
        domain_verdicts=domain_verdicts,
        gradients=gradient_alignment() if name in ("math", "code") else None,
        responses=tuple(
            response(
                name,
                seed,
                num_tokens,
                num_candidates=num_candidates,
                is_foreign=name == "sql",
                text=texts.get(seed, ""),
            )
            for seed in range(num_responses)
        ),
    )


def inspection(num_responses: int = 3, num_tokens: int = 120, num_candidates: int = 5) -> Inspection:
    """Return an inspection with every part; the sizes are of each teacher's responses."""
    names = tuple(_VERDICTS)
    lengths = {"math": 610.0, "code": 380.0, "chat": 140.0, "agent": 2100.0, "sql": 90.0, "summary": 120.0}
    total = sum(lengths.values())
    return Inspection(
        version=1,
        recipe="five-experts",
        plan_hash="3f9a1c77d2b4",
        student="models/base-8b",
        created="2026-01-02T03:04:05+00:00",
        settings={
            "prompts": 64,
            "responses": 4,
            "k": 16,
            "seed": 0,
            "min_overlap": 0.5,
            "min_gain": 0.05,
            "min_reverse_kl": 0.01,
            "max_noise_ratio": 2.0,
            "max_template_diff": 0,
        },
        teachers=tuple(inspected_teacher(name, num_responses, num_tokens, num_candidates) for name in names),
        domains=tuple(
            DomainBudget(
                domain=name,
                num_prompts=2000 if name == "math" else 1000,
                share=(2 if name == "math" else 1) / (len(lengths) + 1),
                mean_length=length,
                token_share=length / total,
                balanced_share=1 / len(lengths),
                pass_rate=fraction(_SIGNALS[name][2][0]),
                num_frontier=signal(*_SIGNALS[name]).num_frontier,
                truncated_fraction=0.18 if name == "agent" else 0.01,
            )
            for name, length in lengths.items()
        ),
        conflicts=(
            Conflict("math", "code", 12_400, Estimate(0.62, 0.58, 0.66), Estimate(0.011, 0.009, 0.013)),
            Conflict("math", "chat", 12_400, Estimate(-0.21, -0.27, -0.15), Estimate(0.17, 0.15, 0.19)),
            Conflict("code", "chat", 9_900, Estimate(0.05, -0.02, 0.12), Estimate(0.08, 0.07, 0.09)),
        ),
        checkpoints=tuple(
            CheckpointRank("math", checkpoint, fraction(rate), estimate(kl), _VERDICTS[like], is_best)
            for checkpoint, rate, kl, like, is_best in (
                ("checkpoints/math/step-2000", 0.63, 0.084, "math", True),
                ("checkpoints/math/step-4000", 0.61, 0.21, "math", False),
                ("checkpoints/math/step-6000", 0.64, 0.66, "code", False),
            )
        ),
        notes=(
            "The teacher sql has another tokenizer: its divergences are over aligned groups of tokens.",
            "The domain chat has no verifier; its pass rates are judged by the reward model.",
        ),
        seconds={"rollout": 21.4, "teachers": 17.9, "gradients": 9.2, "total": 51.0},
    )
