"""Policy-gradient terms: advantages, ratio clipping and importance weights.

All terms are (ratio, advantage) pairs of one clipped surrogate; docs/objectives.md has the formulas.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mergeopd.config.values import (
    Flag,
    Fraction,
    OpenFraction,
    Positive,
    PositiveInt,
    Strict,
    Weight,
    kind_shorthand,
)
from mergeopd.recipe.routing import Routing


class WeightRamp(Strict):
    """A weight that moves linearly from `start` to `end` during the first `updates` of the phase."""

    start: Weight = Field(description="weight at the phase's first update")
    end: Weight = Field(description="weight after the ramp")
    updates: PositiveInt = Field(description="length of the ramp, in updates of the phase")


Amount = Weight | WeightRamp


def amount_at(amount: float | WeightRamp, updates_done: int) -> float:
    """A weight, or the value of its ramp, after `updates_done` updates of the phase."""
    if not isinstance(amount, WeightRamp):
        return amount
    return amount.start + (amount.end - amount.start) * min(updates_done / amount.updates, 1.0)


class Term(Strict):
    """A term with parameters. Shorthand: its weight."""

    weight: Amount = Field(default=1.0, description="weight of the term, or a ramp {start, end, updates}")


class TeacherTerm(Term):
    """A term that compares the student with teachers. Shorthand: its weight, also as a ramp."""

    teachers: Routing | None = None
    """teachers of this term, on every prompt of the phase: a name, names, or names with weights, which are
    multiplied by the teachers' own; default: the teachers of each prompt"""


def weight_shorthand(value: Any) -> Any:
    """Expand a number, or a ramp, to a term of that weight."""
    is_ramp = isinstance(value, dict) and bool(value) and value.keys() <= WeightRamp.model_fields.keys()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"weight": value} if is_ramp or is_number else value


class SampledTerm(TeacherTerm):
    """Single-sample reverse KL: the log-ratio `log p_T - log p_S` of the sampled token is its advantage."""

    bound: Positive | None = None
    """clip each token's log-ratio to plus or minus this value, in nats (MOPD); null: no clipping"""
    discount: Fraction = 0.0
    """discount factor with which later tokens' log-ratios are added to a token's advantage (MiniLLM); 0:
    off"""
    future_only: Flag = False
    """leave out the token's own log-ratio, because an exact `reverse_kl` beside this term covers it
    (MiniLLM's single-step decomposition)"""
    per_remaining_token: Flag = False
    """divide the discounted sum by the number of tokens it covers (MiniLLM)"""
    early_gain: Weight = 0.0
    """extra weight of early tokens (IW-OPD): the weight falls from 1 + `early_gain` at the first token to
    about 1 at the last, in proportion to the sum of absolute log-ratios already passed; 0: off"""

    @model_validator(mode="after")
    def _agrees(self) -> SampledTerm:
        if not self.discount and (self.future_only or self.per_remaining_token):
            raise ValueError(
                "`future_only` and `per_remaining_token` have no effect without a `discount`: give it a "
                "positive value, or remove them"
            )
        if self.discount and self.early_gain:
            raise ValueError("`discount` and `early_gain` both weight tokens by position: choose one")
        return self

    @property
    def needs_full_responses(self) -> bool:
        """Whether a token's advantage depends on other tokens of its response."""
        return bool(self.discount or self.early_gain)


class TrustRegion(Strict):
    """Put the teacher into the denominator of the clipped ratio (RLAD); the reward sets the direction."""

    kind: Literal["trust_region"] = Field(description="how the teacher shapes the outcome")
    alpha: Fraction = 0.5
    """exponent of the old policy in the denominator `pi_old^alpha T^(1 - alpha)`; 1 is GRPO"""


class Credit(Strict):
    """Scale each token's outcome advantage by the teacher's log-ratio, without changing its sign (RLSD)."""

    kind: Literal["credit"] = Field(description="how the teacher shapes the outcome")
    mix: Amount = 0.5
    """fraction of the advantage that is scaled, or a ramp; 0 is GRPO"""
    bound: OpenFraction = 0.2
    """the scale factor is clipped to 1 - bound ... 1 + bound"""


class OutcomeTerm(Term):
    """Group advantage of the verifier's reward, relative to the other responses to the same prompt."""

    std: Literal["unbiased", "biased", "none"] = "unbiased"
    """normalise by the group's standard deviation with n - 1 (`unbiased`) or n (`biased`), or not at all
    (`none`, Dr. GRPO)"""
    answers: Literal["all", "right"] = "all"
    """responses whose advantage counts: all, or only correct ones (`right`: SRPO)"""
    teacher: Annotated[TrustRegion | Credit, Field(discriminator="kind")] | None = None
    """how the teacher's log-probabilities shape the outcome; null: not at all"""


Sampled = Annotated[
    SampledTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Amount | SampledTerm)
]
Outcome = Annotated[
    OutcomeTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Amount | OutcomeTerm)
]

POLICY_TERMS = ("sampled_reverse_kl", "outcome")


class ClipRatio(Strict):
    """PPO clipping range of the ratio pi / pi_old in policy terms."""

    low: OpenFraction = 0.2
    """lower bound is 1 - low"""
    high: Positive = Field(default=0.28, description="upper bound is 1 + high")
    dual: Annotated[float, Field(gt=1.0, allow_inf_nan=False, strict=True)] | None = None
    """upper bound of the ratio for negative advantages (dual-clip PPO); null: no bound"""


class NoCorrection(Strict):
    """No importance weights: responses are treated as sampled by the policy in training."""

    kind: Literal["none"] = Field(description="correction kind")


class Band(Strict):
    """Bounds of the importance ratio pi_old / behaviour policy."""

    low: Weight
    high: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Band:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}: give both bounds, low < high")
        return self


class Truncate(Band):
    """Truncated importance sampling: the weight is the ratio, clipped to [low, high]."""

    kind: Literal["truncate"] = Field(description="correction kind")
    low: Weight = Field(default=0.0, description="minimum weight")
    high: Positive = Field(default=2.0, description="maximum weight")


class Mask(Band):
    """The weight is the ratio inside [low, high], and 0 outside (IcePop, GLM-5, MiMo, Nemotron)."""

    kind: Literal["mask"] = Field(description="correction kind")
    low: Weight = Field(default=0.5, description="smallest ratio that is not masked")
    high: Positive = Field(default=2.0, description="largest ratio that is not masked")


class SequenceMask(Band):
    """The weight is the ratio; responses whose geometric mean ratio is outside [low, high] are masked."""

    kind: Literal["sequence_mask"] = Field(description="correction kind")
    low: Weight = Field(default=0.999, description="smallest mean ratio that is not masked")
    high: Positive = Field(default=1.002, description="largest mean ratio that is not masked")


_Correction = Annotated[NoCorrection | Truncate | Mask | SequenceMask, Field(discriminator="kind")]
_CorrectionKind = Literal["none", "truncate", "mask", "sequence_mask"]
Correction = Annotated[
    _Correction, BeforeValidator(kind_shorthand, json_schema_input_type=_CorrectionKind | _Correction)
]
