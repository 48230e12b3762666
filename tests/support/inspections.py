"""A made-up inspection with every kind of verdict and every part of the record.

Seven teachers: one ready, one that needs a cold start, one with another template, one that is noisy at depth, one
with another tokenizer that is wrong, one with nothing new, and one that was not run. The numbers are plausible and
keyed by names, so they are the same every time; the texts include what must be escaped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from inspected_signals import estimate, fraction, gradient_alignment, signal
from report_pages import EVIL

from mergeopd.reporting.estimate import Estimate as RunEstimate
from mergeopd.reporting.estimate import Grid, MemoryPart, PhaseEstimate, StageMemory, StageTime
from mergeopd.reporting.inspection import (
    AlignmentRank,
    CheckpointRank,
    Compatibility,
    Conflict,
    DiffSpan,
    DomainBudget,
    Finding,
    InspectedResponse,
    InspectedToken,
    Inspection,
    Reason,
    Rendering,
    TeacherInspection,
    TemplateDiff,
    TokenCandidate,
    Verdict,
)
from mergeopd.reporting.result import Estimate

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


def reason(text: str, threshold: str, value: float | None, limit: float) -> Reason:
    """Return a reason that is met above its limit, or below it for the thresholds that are upper bounds."""
    is_bound = threshold in ("cold_pass_rate", "cold_overlap", "identical_kl", "least_pass_rate")
    return Reason(text, threshold, value, limit, value is not None and (value < limit) == is_bound)


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


_GAIN = "pass rate of the teacher, minus the student's"
_VERDICTS: dict[str, Verdict] = {
    "math": Verdict(
        "ready",
        "can teach: pass rate 42% -> 63%, 0.08 nats per token to learn",
        (reason(_GAIN, "pass_margin", 0.21, 0.05),),
    ),
    "code": Verdict(
        "cold_start",
        "can teach, but the student is far from it: it solves 4%, and 1.31 nats per token separate it from the "
        "teacher's responses",
        (
            reason("pass rate of the student", "cold_pass_rate", 0.04, 0.05),
            reason(
                "nats by which the student finds its responses less likely", "cold_logprob_gap", 1.31, 1.0
            ),
            reason("overlap of the 16 likeliest tokens", "cold_overlap", 0.71, 0.6),
        ),
        "begin with a phase with `text: teacher`, then let the student generate",
    ),
    "chat": Verdict(
        "template_mismatch",
        "does better with the student's template: pass rate 58% -> 81%",
        (
            reason(
                "pass rate with the student's template, minus that as configured", "template_gain", 0.23, 0.15
            ),
        ),
        "compare the templates, and correct `template` or `template_arguments` in the teacher's card",
    ),
    "agent": Verdict(
        "noisy",
        "is noisy beyond token 1024: its entropy on its own responses rises from 0.38 to 1.40 nats per token",
        (
            reason("rise of the teacher's entropy, as a factor", "noise_factor", 3.7, 3.0),
            reason("rise of the teacher's entropy, nats per token", "noise_nats", 1.02, 0.3),
        ),
        "set `rollout.max_new_tokens` to 1024, or use a teacher trained on longer responses",
        beyond=1024,
    ),
    "sql": Verdict(
        "wrong_teacher",
        "solves 3% of these prompts: it does not know this domain, or cannot read them",
        (reason("pass rate of the teacher", "least_pass_rate", 0.03, 0.1),),
        "route these prompts to another teacher, and check this one's weights and template",
    ),
    "summary": Verdict(
        "nothing_new",
        "has the student's distributions (reverse KL 0.0004 nats per token)",
        (reason("reverse KL, nats per token", "identical_kl", 0.0004, 0.001),),
        "choose a teacher that was trained further",
    ),
    "legal": Verdict("unknown", "was not measured: no prompt of the recipe uses it"),
}
_SIGNALS: dict[str, tuple[float, float | None, tuple[float, float]]] = {
    "math": (0.78, 0.084, (0.42, 0.63)),
    "code": (0.71, 0.61, (0.04, 0.55)),
    "chat": (0.52, 0.92, (0.50, 0.58)),
    "agent": (0.71, 0.15, (0.22, 0.47)),
    "sql": (0.49, None, (0.44, 0.03)),
    "summary": (0.97, 0.0004, (0.71, 0.71)),
}


_RENDERINGS = {
    "chat": (Rendering("the student's template", fraction(0.81), estimate(0.14), estimate(0.06)),),
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
        by_domain[name] = signal(0.85, 0.05, (0.52, 0.81), num_prompts=48)
        by_domain["algebra, second year"] = signal(0.55, 0.3, (0.12, 0.10), num_prompts=16)
        domain_verdicts["algebra, second year"] = Verdict(
            "nothing_new",
            "is no better than the student: pass rate 12% -> 10%",
            (reason(_GAIN, "pass_margin", -0.02, 0.05),),
            "leave this teacher out, or give it harder prompts",
        )
    texts = {0: "", 1: f"It is {EVIL} {CONTROL_CHARACTERS} done. ", 2: ""} if name == "math" else {}
    return TeacherInspection(
        name=name,
        model=f"models/{name}-8b",
        licence="apache-2.0" if name != "sql" else "llama3.1",
        verdict=_VERDICTS[name],
        compatibility=_compatibility(name),
        signal=signal(overlap, reverse_kl, passes, beyond, renderings=_RENDERINGS.get(name, ())),
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
            "samples": 4,
            "top_k": 16,
            "seed": 0,
            "pass_margin": 0.05,
            "cold_overlap": 0.6,
            "noise_factor": 3.0,
            "template_gain": 0.15,
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
        alignments=tuple(
            AlignmentRank(domain, teacher, estimate(value, 0.08), estimate(best - value, 0.05), value == best)
            for domain, best, values in (("math", 0.34, (0.34, 0.31)), ("code", 0.41, (-0.12, 0.41)))
            for teacher, value in zip(("math", "code"), values, strict=True)
        ),
        conflicts=(
            Conflict("math", "code", 12_400, Estimate(0.62, 0.58, 0.66), Estimate(0.011, 0.009, 0.013)),
            Conflict("math", "chat", 12_400, Estimate(-0.21, -0.27, -0.15), Estimate(0.17, 0.15, 0.19)),
            Conflict("code", "chat", 9_900, Estimate(0.05, -0.02, 0.12), Estimate(0.08, 0.07, 0.09)),
        ),
        checkpoints=tuple(
            CheckpointRank(
                "math",
                checkpoint,
                fraction(rate),
                estimate(kl),
                _VERDICTS[like],
                is_best,
                estimate(0.63 - rate, 0.04),
            )
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
        cost=cost(),
    )


def cost() -> RunEstimate:
    """Return what a run costs that does not fit."""
    parts = (("weights", 6.1), ("moments and main weights", 24.5), ("KV cache", 71.0), ("loss chunk", 0.2))
    return RunEstimate(
        recipe="five-experts.yaml",
        hardware="h100x8",
        device="NVIDIA H100 SXM5 80 GB",
        sources=(),
        num_processes=8,
        num_machines=1,
        backend="megatron",
        grid=Grid(tensor=4, pipeline=2, context=1, expert=1, data=1),
        micro_batch_tokens=16384,
        memory=(
            StageMemory("rollout", tuple(MemoryPart(name, size * 2**30) for name, size in parts)),
            StageMemory("update", (MemoryPart("weights", 6.1 * 2**30),)),
        ),
        limit_bytes=74.4 * 2**30,
        host_limit_bytes=1800.0 * 2**30,
        phases=(
            PhaseEstimate(
                name="merge",
                updates=800,
                rounds=200,
                responses=1024.0,
                tokens=9.6e5,
                stages=(
                    StageTime("rollout", {"memory": 310.0, "matrix products": 12.0}),
                    StageTime("teachers", {"matrix products": 41.0, "disk": 8.0}),
                    StageTime("update", {"matrix products": 66.0}),
                ),
                teachers=(),
                bytes_read=8.1e10,
                flops={},
                text_s=0.0,
            ),
        ),
        evaluation_s=900.0,
        obstacles=("needs 101.8 GiB of 74.4 GiB at its peak: rollout; the nearest that fits: batch_size 32",),
    )
