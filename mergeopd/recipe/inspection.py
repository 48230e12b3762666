"""Settings of `mergeopd inspect`: the size of its sample, and the thresholds of its verdicts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mergeopd.config.values import Fraction, Positive, PositiveInt, Strict, Weight


class InspectionThresholds(Strict):
    """Thresholds of the verdicts. All are heuristics: the literature has no values for most of them."""

    identical_kl: Weight = 1e-3
    """nothing new: reverse KL, in nats per token, below which teacher and student are the same model"""
    pass_margin: Fraction = 0.05
    """nothing new: pass rate by which a teacher must be above the student; also the tolerance of two equal
    pass rates"""
    uniform_entropy: Fraction = 0.8
    """wrong teacher: entropy of the teacher, as a share of that of a uniform distribution, above which its
    head is not trained"""
    least_pass_rate: Fraction = 0.1
    """wrong teacher: pass rate of the teacher below which it does not know the domain"""
    wrong_logprob_gap: Positive = 2.0
    """wrong teacher: nats per token by which the student's log-probability of the responses of a teacher that
    solves nothing is below the teacher's own; a weaker teacher of the same kind is nearer"""
    template_gain: Fraction = 0.15
    """template mismatch: rise of the teacher's pass rate with another rendering of the prompts"""
    first_token_kl: Positive = 1.0
    """template mismatch: reverse KL at the first token of responses, in nats, above which the teacher expects
    another beginning"""
    first_token_share: Fraction = 0.5
    """template mismatch: what is left of it with another rendering, as a share"""
    template_kept: Fraction = 0.8
    """template mismatch: pass rate of the teacher with that rendering, as a share of that as configured"""
    foreign_ends: Fraction = 0.5
    """template mismatch: share of the student's responses that end with a token that the teacher does not
    use"""
    truncated: Fraction = 0.5
    """template mismatch: share of the teacher's responses that do not end, where the student's do"""
    noise_factor: Positive = 3.0
    """noisy: factor by which the teacher's entropy on its own responses rises beyond a token"""
    noise_nats: Positive = 0.3
    """noisy: least rise of that entropy, in nats per token"""
    cold_pass_rate: Fraction = 0.05
    """cold start: pass rate of the student below which it hardly ever meets a correct response"""
    cold_logprob_gap: Positive = 1.0
    """cold start: nats per token by which the student's log-probability of the teacher's responses is below
    the teacher's own"""
    cold_overlap: Fraction = 0.6
    """cold start: overlap of the likeliest tokens below which student and teacher think differently; 0.72
    rose to 0.91 in runs that succeeded (2604.13016)"""


class GradientSettings(Strict):
    """Budget of `mergeopd inspect --gradients`: tokens at which the student finishes its responses again."""

    nodes: PositiveInt = 96
    """tokens in each domain, half of them from correct responses, if there are any"""
    candidates: PositiveInt = 4
    """likeliest next tokens that are compared at each; all others count as one more"""
    continuations: Annotated[int, Field(ge=2, strict=True)] = 4
    """responses of the student per candidate, on average"""


class InspectionSettings(Strict):
    """The sample from which `mergeopd inspect` measures the teachers. Not part of a run's identity."""

    prompts: PositiveInt = 64
    """number of prompts, from all sources in equal parts; at least 8 for each teacher"""
    samples: PositiveInt = 4
    """responses of the student, and of each teacher, to a prompt"""
    top_k: PositiveInt = 16
    """number of likeliest tokens whose overlap is measured; 16 in 2604.13016"""
    responses: PositiveInt = 4
    """responses per teacher that are shown token by token"""
    gradients: GradientSettings = Field(
        default=GradientSettings(), description="budget of the alignment of gradients"
    )
    thresholds: InspectionThresholds = Field(
        default=InspectionThresholds(), description="thresholds of the verdicts"
    )

    @property
    def values(self) -> dict[str, float | int]:
        """Every number by its name, as an inspection shows them."""
        sizes = self.model_dump(exclude={"thresholds", "gradients"})
        budget = {f"gradient_{name}": value for name, value in self.gradients.model_dump().items()}
        return {**sizes, **budget, **self.thresholds.model_dump()}
