"""Terms of the policy gradient: what a token's advantage is made of, and how far its ratio may go.

All of them are (ratio, advantage) pairs under one clipped surrogate; docs/objectives.md has the formulas.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mergeopd.config.values import Fraction, Positive, PositiveInt, Strict, Weight


class WeightRamp(Strict):
    """A weight that moves linearly from `start` to `end` during the first `updates` of the phase."""

    start: Weight = Field(description="weight at the phase's first update")
    end: Weight = Field(description="weight from then on")
    updates: PositiveInt = Field(description="length of the ramp, in updates of the phase")

    def at(self, updates_done: int) -> float:
        """The weight after `updates_done` updates of the phase."""
        progress = min(updates_done / self.updates, 1.0)
        return self.start + (self.end - self.start) * progress


Amount = Weight | WeightRamp


def amount_at(amount: float | WeightRamp, updates_done: int) -> float:
    """A weight, or where its ramp stands after `updates_done` updates of the phase."""
    return amount.at(updates_done) if isinstance(amount, WeightRamp) else amount


class Term(Strict):
    """A term with parameters. Shorthand: its weight."""

    weight: Amount = Field(default=1.0, description="weight of the term, or a ramp {start, end, updates}")


def weight_shorthand(value: Any) -> Any:
    """A number stands for a term of that weight."""
    return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class SampledTerm(Term):
    """Reverse KL by its value at the written token alone: `log p_T - log p_S` is the token's advantage."""

    bound: Positive | None = Field(
        default=None, description="largest absolute log-ratio of one token, in nats (MOPD); null: none"
    )
    discount: Fraction = Field(
        default=0.0, description="how much of the later tokens' log-ratios a token is credited with (MiniLLM)"
    )
    future_only: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        description="leave out the token's own log-ratio, which an exact reverse_kl beside it takes "
        "(MiniLLM's single-step decomposition)",
    )
    per_remaining_token: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="divide what is credited by the number of tokens it comes from (MiniLLM)"
    )
    early_gain: Weight = Field(
        default=0.0,
        description="early tokens count up to 1 + this, the last about 1, by the share of the answer's "
        "absolute log-ratios that lie behind them (IW-OPD)",
    )

    @model_validator(mode="after")
    def _agrees(self) -> SampledTerm:
        if not self.discount and (self.future_only or self.per_remaining_token):
            raise ValueError(
                "without a discount no later token counts: give `discount` a positive value, or remove "
                "`future_only` and `per_remaining_token`"
            )
        if self.discount and self.early_gain:
            raise ValueError("`discount` and `early_gain` both weigh tokens by position: choose one")
        return self

    @property
    def needs_whole_answers(self) -> bool:
        """Whether a token's advantage depends on other tokens of its answer."""
        return bool(self.discount or self.early_gain)


class TrustRegion(Strict):
    """The teacher holds one end of the ratio that is clipped (RLAD): the reward says where to go."""

    kind: Literal["trust_region"] = Field(description="names what the teacher is for")
    alpha: Annotated[float, Field(ge=0.0, le=1.0, strict=True)] = Field(
        default=0.5, description="share of the old policy in the ratio's denominator; 1 is GRPO"
    )


class Credit(Strict):
    """The teacher says how much each token gets of its answer's advantage, never its sign (RLSD)."""

    kind: Literal["credit"] = Field(description="names what the teacher is for")
    mix: Amount = Field(
        default=0.5, description="share of the advantage that is shaped, or a ramp; 0 is GRPO"
    )
    bound: Annotated[float, Field(gt=0.0, lt=1.0, strict=True)] = Field(
        default=0.2, description="a token gets 1 - bound to 1 + bound of it"
    )


class OutcomeTerm(Term):
    """The verifier's reward, relative to the other answers to the same prompt, as every token's advantage."""

    std: Literal["unbiased", "biased", "none"] = Field(
        default="unbiased",
        description="divide by the group's standard deviation with n - 1 (unbiased) or n (biased), or not at "
        "all (Dr. GRPO)",
    )
    answers: Literal["all", "right"] = Field(
        default="all", description="answers whose advantage counts (`right`: SRPO)"
    )
    teacher: Annotated[TrustRegion | Credit, Field(discriminator="kind")] | None = Field(
        default=None, description="what the teacher's log-probabilities do to the outcome; null: nothing"
    )


Sampled = Annotated[
    SampledTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Weight | SampledTerm)
]
Outcome = Annotated[
    OutcomeTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Weight | OutcomeTerm)
]

POLICY_TERMS = ("sampled_reverse_kl", "outcome")


class ClipRatio(Strict):
    """Bounds of pi / pi_old beyond which a policy term no longer pulls (PPO)."""

    low: Annotated[float, Field(gt=0.0, lt=1.0, strict=True)] = Field(
        default=0.2, description="the ratio counts down to 1 - low"
    )
    high: Positive = Field(default=0.28, description="the ratio counts up to 1 + high")
    dual: Annotated[float, Field(gt=1.0, allow_inf_nan=False, strict=True)] | None = Field(
        default=None, description="with a negative advantage the ratio counts up to this; null: without bound"
    )


class NoCorrection(Strict):
    """Answers are taken as if the policy in training had written them."""

    kind: Literal["none"] = Field(description="names the correction")


class Band(Strict):
    """Bounds of pi_old / behaviour policy."""

    low: Weight
    high: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Band:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}: give both bounds, low < high")
        return self


class Truncate(Band):
    """Truncated importance sampling: the weight is the ratio, brought into [low, high]."""

    kind: Literal["truncate"] = Field(description="names the correction")
    low: Weight = Field(default=0.0, description="smallest weight")
    high: Positive = Field(default=2.0, description="largest weight")


class Mask(Band):
    """The weight is the ratio inside [low, high] and 0 outside (IcePop, GLM-5, MiMo, Nemotron)."""

    kind: Literal["mask"] = Field(description="names the correction")
    low: Weight = Field(default=0.5, description="smallest ratio that counts")
    high: Positive = Field(default=2.0, description="largest ratio that counts")


class SequenceMask(Band):
    """The weight is the ratio; answers whose mean ratio (geometric) leaves [low, high] do not count."""

    kind: Literal["sequence_mask"] = Field(description="names the correction")
    low: Weight = Field(default=0.999, description="smallest mean ratio that counts")
    high: Positive = Field(default=1.002, description="largest mean ratio that counts")


def correction_shorthand(value: Any) -> Any:
    """A kind stands for that correction with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


Correction = Annotated[
    Annotated[NoCorrection | Truncate | Mask | SequenceMask, Field(discriminator="kind")],
    BeforeValidator(
        correction_shorthand,
        json_schema_input_type=Literal["none", "truncate", "mask", "sequence_mask"]
        | Annotated[NoCorrection | Truncate | Mask | SequenceMask, Field(discriminator="kind")],
    ),
]
