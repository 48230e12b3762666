"""Settings of alarms, the signs that a run goes wrong; `mergeopd/alarms` detects them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mergeopd.config.values import Fraction, Positive, PositiveInt, Strict

Action = Literal["off", "warn", "stop"]


class Alarm(Strict):
    """An alarm without a threshold."""

    action: Action | None = None
    """`off`, `warn`, or `stop` the run after a checkpoint; default: `alarms.action`"""


class Lasting(Alarm):
    """An alarm that is raised once its sign was seen in several updates in a row."""

    updates: PositiveInt = Field(default=3, description="updates in a row with the sign")


class ZeroGradient(Lasting):
    """The gradient vanishes: nothing is learned any more."""

    updates: PositiveInt = Field(default=5, description="updates in a row with the sign")
    below: Positive = Field(default=1e-6, description="gradient norm below which it counts as zero")


class GradientSpike(Lasting):
    """The gradient norm is far above its recent median."""

    factor: Positive = Field(default=10.0, description="multiple of the median of the 32 updates before")


class DivergenceRising(Lasting):
    """A teacher's divergence is above the lowest that was reached in the phase."""

    updates: PositiveInt = Field(default=5, description="updates in a row with the sign")
    factor: Positive = Field(default=2.0, description="multiple of the lowest mean over about 4 updates")
    margin: Positive = Field(default=1.0, description="least rise, in the divergence's unit")


class EntropyCollapse(Lasting):
    """The student is certain of every token while the teacher disagrees."""

    below: Positive = Field(default=0.02, description="student entropy, in nats per token")
    divergence: Positive = Field(default=0.5, description="divergence above which the teacher disagrees")


class LengthCollapse(Lasting):
    """Responses become much shorter than those before."""

    fraction: Fraction = Field(default=0.4, description="share of the longest mean length of the domain")


class Truncation(Alarm):
    """Responses end at the length limit, and not less often than before."""

    updates: PositiveInt = Field(default=6, description="updates over which the share is high")
    share: Fraction = Field(default=0.5, description="share of responses that are truncated")


class Repetition(Alarm):
    """Responses repeat themselves, and not less than before."""

    updates: PositiveInt = Field(default=6, description="updates over which the share is high")
    share: Fraction = Field(default=0.6, description="share of 4-grams that occurred earlier in a response")


class DeadDomain(Alarm):
    """No response of a domain is correct."""

    responses: PositiveInt = Field(default=300, description="graded responses in a row without a reward")


class StarvedDomain(Alarm):
    """A domain has hardly any weight in the loss."""

    updates: PositiveInt = Field(default=5, description="updates over which the share is measured")
    share: Fraction = Field(default=0.1, description="share of the weight that equal domains would have")


class RolloutGap(Lasting):
    """Rollouts and training disagree on log-probabilities; needs a policy term."""

    nats: Positive = Field(default=0.1, description="mean |log pi_old - log behaviour| per token")


class IdenticalTeacher(Alarm):
    """A teacher equals the student at the start, so there is nothing to learn from it."""

    below: Positive = Field(default=1e-4, description="divergence before the first update")


class MismatchedTeacher(Lasting):
    """Teacher and student disagree about text that the student did not generate, from the first update on."""

    updates: PositiveInt = Field(default=2, description="first updates of the run with the sign")
    nats: Positive = Field(default=3.0, description="|log p of teacher minus student| per token")


class NoColdStart(Lasting):
    """The student's first responses are improbable under the teacher."""

    updates: PositiveInt = Field(
        default=3, description="first updates on the student's responses with the sign"
    )
    nats: Positive = Field(default=5.0, description="log p of student minus teacher, per token")


class LowSharedMass(Lasting):
    """Student and teacher consider different tokens on the student's responses, and this does not change.

    Measured by the smaller probability of either model on the common tokens of their 16 likeliest ones.
    """

    after: PositiveInt = Field(default=8, description="updates of a phase before the first judgement")
    share: Fraction = Field(default=0.5, description="probability below which they have little in common")
    rise: Fraction = Field(default=0.1, description="rise since the phase's first update that is enough")


class SharedMassFalling(Lasting):
    """Student and teacher have ever less probability on their common likely tokens."""

    fall: Fraction = Field(default=0.25, description="fall below the phase's highest mean of about 4 updates")


class EntropyGapRising(Lasting):
    """The entropies of student and teacher move apart."""

    factor: Positive = Field(default=2.0, description="multiple of the lowest mean over about 4 updates")
    margin: Positive = Field(default=0.5, description="least rise, in nats per token")


def action_shorthand(value: Any) -> Any:
    """Expand an action to the settings of an alarm with that action."""
    return {"action": value} if isinstance(value, str) else value


def _or_action(kind: type[Alarm]) -> BeforeValidator:
    return BeforeValidator(action_shorthand, json_schema_input_type=Action | kind)


class Alarms(Strict):
    """Signs that a run goes wrong, each with its thresholds or just its action (`repetition: stop`)."""

    action: Action = "warn"
    """what alarms do that have no `action` of their own: `warn`, `stop` the run after a checkpoint, or
    `off`"""
    zero_gradient: Annotated[ZeroGradient, _or_action(ZeroGradient)] = ZeroGradient()
    """the gradient is zero"""
    gradient_spike: Annotated[GradientSpike, _or_action(GradientSpike)] = GradientSpike()
    """the gradient norm is far above its recent median"""
    divergence_rising: Annotated[DivergenceRising, _or_action(DivergenceRising)] = DivergenceRising()
    """a teacher's divergence rises instead of falling"""
    entropy_collapse: Annotated[EntropyCollapse, _or_action(EntropyCollapse)] = EntropyCollapse()
    """the student is certain of tokens that the teacher would not choose"""
    length_collapse: Annotated[LengthCollapse, _or_action(LengthCollapse)] = LengthCollapse()
    """responses become much shorter"""
    truncation: Annotated[Truncation, _or_action(Truncation)] = Truncation()
    """responses end at the length limit"""
    repetition: Annotated[Repetition, _or_action(Repetition)] = Repetition()
    """responses repeat themselves"""
    dead_domain: Annotated[DeadDomain, _or_action(DeadDomain)] = DeadDomain()
    """no response of a domain is correct, in training or in evaluations"""
    starved_domain: Annotated[StarvedDomain, _or_action(StarvedDomain)] = StarvedDomain()
    """a domain has hardly any weight in the loss"""
    rollout_gap: Annotated[RolloutGap, _or_action(RolloutGap)] = RolloutGap()
    """rollouts and training disagree on log-probabilities"""
    identical_teacher: Annotated[IdenticalTeacher, _or_action(IdenticalTeacher)] = IdenticalTeacher()
    """a teacher equals the student at the start"""
    mismatched_teacher: Annotated[MismatchedTeacher, _or_action(MismatchedTeacher)] = MismatchedTeacher()
    """a teacher is of another domain, template or family than the student"""
    no_cold_start: Annotated[NoColdStart, _or_action(NoColdStart)] = NoColdStart()
    """the student cannot respond yet when on-policy training starts"""
    low_shared_mass: Annotated[LowSharedMass, _or_action(LowSharedMass)] = LowSharedMass()
    """student and teacher consider different tokens, and this does not improve"""
    shared_mass_falling: Annotated[SharedMassFalling, _or_action(SharedMassFalling)] = SharedMassFalling()
    """student and teacher have ever less in common"""
    entropy_gap_rising: Annotated[EntropyGapRising, _or_action(EntropyGapRising)] = EntropyGapRising()
    """the entropies of student and teacher move apart"""
    weak_teacher: Annotated[Alarm, _or_action(Alarm)] = Alarm()
    """an expert is not better than the base on its domain; needs an evaluation"""
    below_base: Annotated[Alarm, _or_action(Alarm)] = Alarm()
    """the student is worse than the base, beyond the intervals; needs an evaluation"""
    overlap: Annotated[Alarm, _or_action(Alarm)] = Alarm()
    """evaluation prompts are also trained on (`allow_overlap`)"""

    def action_of(self, name: str) -> Action:
        """Return the action of the alarm with this name."""
        return self._of(name).action or self.action

    def updates_of(self, name: str) -> int:
        """Return in how many updates in a row the sign of this alarm must be seen."""
        alarm = self._of(name)
        return alarm.updates if isinstance(alarm, Lasting) else 1

    def _of(self, name: str) -> Alarm:
        alarm: Alarm = getattr(self, name)
        return alarm


ALARMS = tuple(name for name in Alarms.model_fields if name != "action")
"""Names of all alarms."""
