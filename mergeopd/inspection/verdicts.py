"""The verdict on a teacher, from its signal and what is known without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergeopd.messages import joined
from mergeopd.recipe.inspection import InspectionThresholds
from mergeopd.reporting.inspection import Compatibility, Reason, Rendering, Signal, Verdict, VerdictKind
from mergeopd.reporting.result import Estimate

_GAIN = "pass rate of the teacher, minus the student's"
_GAP = "nats per token by which the student finds the teacher's responses less likely"
_NONE = Compatibility(())
_GRAVEST_FIRST: Sequence[VerdictKind] = (
    "template_mismatch",
    "wrong_teacher",
    "noisy",
    "nothing_new",
    "cold_start",
    "unknown",
    "ready",
)


@dataclass(frozen=True, slots=True)
class _Case:
    """What a rule judges: a teacher's signal, its compatibility, the thresholds."""

    signal: Signal
    compatibility: Compatibility
    limits: InspectionThresholds

    def below(self, text: str, value: float | None, threshold: str) -> Reason:
        limit = float(getattr(self.limits, threshold))
        return Reason(text, threshold, value, limit, value is not None and value < limit)

    def above(self, text: str, value: float | None, threshold: str) -> Reason:
        limit = float(getattr(self.limits, threshold))
        return Reason(text, threshold, value, limit, value is not None and value > limit)


Rule = Callable[[_Case], Iterator[Verdict]]


def verdict_of(
    signal: Signal | None, limits: InspectionThresholds, compatibility: Compatibility = _NONE
) -> Verdict:
    """Judge a teacher: the first rule that yields a verdict decides. No rule rests on overlap alone."""
    if signal is None or signal.num_tokens == 0:
        return Verdict("unknown", "nothing was measured: the student has no response that the teacher scores")
    case = _Case(signal, compatibility, limits)
    for rule in RULES:
        for verdict in rule(case):
            return verdict
    raise AssertionError("the last rule always yields a verdict")


def over_domains(pooled: Verdict, by_domain: Mapping[str, Verdict]) -> Verdict:
    """Return the verdict on a teacher: that over all its prompts, or the gravest where its domains differ."""
    if len({verdict.kind for verdict in by_domain.values()}) < 2:
        return pooled
    domain = min(by_domain, key=lambda name: _GRAVEST_FIRST.index(by_domain[name].kind))
    worst = by_domain[domain]
    rest = [f"{own.kind.replace('_', ' ')} for {name}" for name, own in by_domain.items() if name != domain]
    return replace(worst, sentence=f"for {domain}: {worst.sentence}; {joined(rest, 'and')}")


def _untrained(case: _Case) -> Iterator[Verdict]:
    """A teacher whose distributions are nearly uniform, even on its own responses."""
    signal = case.signal
    entropy = signal.own_entropy_T if signal.own_entropy_T.value is not None else signal.entropy_T
    if entropy.value is None or not signal.max_entropy:
        return
    share = entropy.value / signal.max_entropy
    reason = case.above("share of the largest possible entropy", share, "uniform_entropy")
    if reason.is_met:
        yield Verdict(
            "wrong_teacher",
            f"gives all tokens nearly the same probability (entropy {entropy.value:.2f} of at most "
            f"{signal.max_entropy:.2f} nats): its head is not trained, or damaged",
            (reason,),
            "check the weights of this teacher",
        )


def _identical(case: _Case) -> Iterator[Verdict]:
    """The student itself."""
    reason = case.below("reverse KL, nats per token", case.signal.reverse_kl.value, "identical_kl")
    if reason.is_met:
        yield Verdict(
            "nothing_new",
            f"has the student's distributions (reverse KL {case.signal.reverse_kl.value:.2g} nats per token)",
            (reason,),
            "choose a teacher that was trained further, or give this one a prompt with more information; "
            "as an anchor against forgetting it is right",
        )


def _other_rendering(case: _Case) -> Iterator[Verdict]:
    """A teacher that solves more, or agrees with the student from the first token, if it reads the prompts
    in another way.
    """
    for other in case.signal.renderings:
        reasons = _rendering_reasons(case, other)
        if reasons:
            yield Verdict(
                "template_mismatch",
                f"fits {other.name} better: {_rates(case.signal.pass_rate_T, other.pass_rate_T)}, "
                f"{_kls(case.signal.first_token_kl, other.first_token_kl)} at the first token",
                reasons,
                "compare the templates, and correct `template` or `template_arguments` in the teacher's card",
            )


def _rendering_reasons(case: _Case, other: Rendering) -> tuple[Reason, ...]:
    signal = case.signal
    gain = _difference(other.pass_rate_T, signal.pass_rate_T)
    better = case.above(f"pass rate with {other.name}, minus that as configured", gain, "template_gain")
    if better.is_met and _is_separate(signal.pass_rate_T, other.pass_rate_T):
        return (better,)
    first, left = signal.first_token_kl.value, other.first_token_kl.value
    if not first or left is None or gain is None:
        return ()
    share = 1.0 if gain >= 0 else 1.0 + gain / (signal.pass_rate_T.value or 1.0)
    reasons = (
        case.above("reverse KL at the first token, nats", first, "first_token_kl"),
        case.below(f"share of it that is left with {other.name}", left / first, "first_token_share"),
        case.above(f"pass rate with {other.name}, as a share of that as configured", share, "template_kept"),
    )
    return reasons if all(reason.is_met for reason in reasons) else ()


def _ends(case: _Case) -> Iterator[Verdict]:
    """End tokens that only one of the two uses."""
    signal = case.signal
    foreign = case.above(
        "share of the student's end tokens that the teacher does not use", signal.foreign_ends, "foreign_ends"
    )
    if foreign.is_met:
        yield Verdict(
            "template_mismatch",
            f"does not use the end token of {signal.foreign_ends:.0%} of the student's responses, so it "
            "cannot teach the student where to stop",
            (foreign,),
            "give student and teacher the same end token (`student.end_tokens`, or the template)",
        )


def _noise(case: _Case) -> Iterator[Verdict]:
    """A teacher that loses its way on its own responses beyond some token."""
    onset = case.signal.onset
    if onset is None:
        return
    factor = onset.after / onset.before if onset.before > 0 else None
    reasons = (
        case.above("rise of the teacher's entropy, as a factor", factor, "noise_factor"),
        case.above("rise of the teacher's entropy, nats per token", onset.after - onset.before, "noise_nats"),
    )
    if all(reason.is_met for reason in reasons):
        yield Verdict(
            "noisy",
            f"is noisy beyond token {onset.start}: its entropy on its own responses rises from "
            f"{onset.before:.2f} to {onset.after:.2f} nats per token",
            reasons,
            f"set `rollout.max_new_tokens` to {onset.start}, or use a teacher trained on longer responses",
            beyond=onset.start,
        )


def _other_text(case: _Case) -> Iterator[Verdict]:
    """A teacher that does not succeed, and reads other prompts than the student in a way that explains it."""
    topics = ("template", "special_tokens")
    problems = [f for f in case.compatibility.findings if f.level == "problem" and f.topic in topics]
    if not problems:
        return
    gain, first = case.signal.pass_gain.value, case.signal.first_token_kl.value
    if gain is not None:
        reason = case.below(_GAIN, gain, "pass_margin")
    else:
        reason = case.above("reverse KL at the first token, nats", first, "first_token_kl")
    if reason.is_met:
        yield Verdict(
            "template_mismatch",
            f"does not agree with the student, probably because of what it reads: {problems[0].text}",
            (reason,),
            problems[0].remedy or "correct `template` or `template_arguments` in the teacher's card",
        )


def _incapable(case: _Case) -> Iterator[Verdict]:
    """A teacher that does not solve these prompts."""
    rate, gap = case.signal.pass_rate_T, case.signal.teacher_logprob_gap.value
    reasons = (
        case.below("pass rate of the teacher", rate.value, "least_pass_rate"),
        case.above(_GAP, None if gap is None else -gap, "wrong_logprob_gap"),
    )
    if all(reason.is_met for reason in reasons):
        yield Verdict(
            "wrong_teacher",
            f"solves {_percent(rate)} of these prompts: it does not know this domain, or cannot read them",
            reasons,
            "route these prompts to another teacher, and check this one's weights and template",
        )


def _endless(case: _Case) -> Iterator[Verdict]:
    """A teacher that does not end its responses, where the student does."""
    signal = case.signal
    reason = case.above("share of the teacher's responses without an end", signal.truncated_T, "truncated")
    if reason.is_met and (signal.truncated_S or 0.0) <= case.limits.truncated:
        yield Verdict(
            "template_mismatch",
            f"does not end {signal.truncated_T:.0%} of its responses: its end token is not the configured "
            "one, or it reads the prompts in a template that it was not trained with",
            (reason,),
            "check the end tokens and the template of the teacher, and `rollout.max_new_tokens`",
        )


def _no_better(case: _Case) -> Iterator[Verdict]:
    """A teacher that solves no more than the student."""
    signal = case.signal
    reason = case.below(_GAIN, signal.pass_gain.value, "pass_margin")
    if reason.is_met:
        yield Verdict(
            "nothing_new",
            f"is no better than the student: {_rates(signal.pass_rate_S, signal.pass_rate_T)}",
            (reason,),
            "leave this teacher out, or give it harder prompts",
        )


def _cold(case: _Case) -> Iterator[Verdict]:
    """A student that hardly ever meets what the teacher could confirm."""
    signal = case.signal
    gap = signal.teacher_logprob_gap.value
    reasons = (
        case.below("pass rate of the student", signal.pass_rate_S.value, "cold_pass_rate"),
        case.above(
            _GAP,
            None if gap is None else -gap,
            "cold_logprob_gap",
        ),
        case.below(f"overlap of the {signal.k} likeliest tokens", signal.overlap.value, "cold_overlap"),
    )
    if sum(reason.is_met for reason in reasons) >= 2:
        far = "" if gap is None else f", and is {-gap:.2f} nats per token away from the teacher's responses"
        yield Verdict(
            "cold_start",
            f"can teach, but the student is far from it: it solves {_percent(signal.pass_rate_S)}{far}",
            reasons,
            "begin with a phase with `text: teacher`, then let the student generate",
        )


def _ready(case: _Case) -> Iterator[Verdict]:
    signal = case.signal
    gain = case.above(_GAIN, signal.pass_gain.value, "pass_margin")
    if signal.pass_gain.value is None:
        yield Verdict(
            "unknown",
            "gives a usable signal, but no verifier says whether it is better than the student",
            (gain,),
            "add a `verifier` to the prompts",
        )
        return
    kl = "" if signal.reverse_kl.value is None else f", {signal.reverse_kl.value:.2f} nats per token to learn"
    yield Verdict(
        "ready",
        f"can teach: {_rates(signal.pass_rate_S, signal.pass_rate_T)}{kl}",
        (gain,),
    )


RULES: Sequence[Rule] = (
    _identical,
    _untrained,
    _other_rendering,
    _ends,
    _noise,
    _other_text,
    _incapable,
    _endless,
    _no_better,
    _cold,
    _ready,
)
"""In the order in which they decide: causes before their symptoms."""


def _is_separate(low: Estimate, high: Estimate) -> bool:
    """Whether two estimates differ by more than either interval explains alone."""
    return (
        low.value is not None
        and high.value is not None
        and (high.low is None or high.low > low.value)
        and (low.high is None or low.high < high.value)
    )


def _difference(one: Estimate, other: Estimate) -> float | None:
    return None if one.value is None or other.value is None else one.value - other.value


def _percent(rate: Estimate) -> str:
    return "an unknown share" if rate.value is None else f"{rate.value:.0%}"


def _rates(before: Estimate, after: Estimate) -> str:
    return f"pass rate {_percent(before)} -> {_percent(after)}"


def _kls(before: Estimate, after: Estimate) -> str:
    if before.value is None or after.value is None:
        return "unknown reverse KL"
    return f"reverse KL {before.value:.2f} -> {after.value:.2f}"
