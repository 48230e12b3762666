"""How answers are sampled and what is learnt from them: rollout, phases, optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mergeopd.config.values import Fraction, Name, PositiveInt, Strict, Weight
from mergeopd.recipe.loss_terms import LossOrTerm
from mergeopd.recipe.policy_terms import ClipRatio, Correction, NoCorrection
from mergeopd.types import Origin


class LocalRollout(Strict):
    """Sampling inside the training process."""

    engine: Literal["local"] = Field(default="local", description="what writes the student's answers")
    samples_per_prompt: PositiveInt = Field(default=1, description="answers per prompt and round")
    temperature: Annotated[float, Field(gt=0.0, le=10.0, strict=True)] = Field(
        default=1.0, description="divides the logits that are sampled from"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0, strict=True)] = Field(
        default=1.0, description="sample from the fewest tokens that hold this much probability"
    )
    max_new_tokens: PositiveInt = Field(default=256, description="longest answer, in tokens")
    stop: tuple[str, ...] = Field(default=(), description="texts that end an answer, beside the EOS token")
    batch_size: PositiveInt = Field(default=256, description="sequences decoded together")


class Ramp(Strict):
    """A value that moves linearly from `start` to `end` during the first `updates` of the phase."""

    start: Fraction = Field(description="value at the phase's first update")
    end: Fraction = Field(description="value from then on")
    updates: PositiveInt = Field(description="length of the ramp, in updates of the phase")


class TextMixture(Strict):
    """Some prompts are answered by the student, the others come from elsewhere."""

    on_policy_fraction: Fraction | Ramp = Field(description="share of prompts that the student answers")
    otherwise: Literal["teacher", "dataset"] = Field(description="where the other answers come from")


Text = Literal["student", "teacher", "dataset"] | TextMixture


class PassRate(Strict):
    """A prompt's weight for its teachers, p^a (1 - p)^b with p the mean reward of its answers."""

    a: Weight = Field(default=1.0, description="how little prompts count that are never solved")
    b: Weight = Field(default=1.0, description="how little prompts count that are always solved")


class Balance(Strict):
    """How domains, prompts and answers share the loss."""

    tokens: Literal["off", "equal"] | dict[Name, Weight] = Field(
        default="off",
        description="`equal` or target shares: weigh domains so that each gets its share of the loss, "
        "whatever the answers' lengths (Open-MOPD M1)",
    )
    follow_gap: Annotated[float, Field(ge=0.0, le=2.0, strict=True)] = Field(
        default=0.0,
        description="exponent: domains whose teachers are further away get more (Open-MOPD M2); 0: off",
    )
    pass_rate: PassRate | None = Field(
        default=None, description="weigh prompts by how often the student solves them (PACED); null: off"
    )
    teach: Literal["all", "wrong", "failed_groups"] = Field(
        default="all",
        description="answers that teachers comment: all, wrong ones, or those of prompts without a right one",
    )


class Phase(Strict):
    """A stretch of training with one kind of text and one loss."""

    name: Name = Field(description="the phase's name, unique in the recipe")
    updates: PositiveInt = Field(description="optimizer updates")
    text: Text = Field(
        default="student",
        description="who writes the answers: student (on-policy), teacher, dataset, mixture",
    )
    loss: LossOrTerm = Field(description="what is minimised")
    prompts_per_round: PositiveInt = Field(default=64, description="prompts drawn and answered at a time")
    updates_per_round: PositiveInt = Field(default=1, description="optimizer updates made from one round")
    reduce: Literal["token", "sequence"] = Field(
        default="token", description="mean over all tokens, or over answers of each one's token mean"
    )
    balance: Balance = Field(default=Balance(), description="how domains, prompts and answers share the loss")
    clip_ratio: ClipRatio | None = Field(
        default=ClipRatio(), description="PPO's bounds for policy terms; null: none"
    )
    correction: Correction = Field(
        default=NoCorrection(kind="none"),
        description="what policy terms do about answers that a slightly other policy wrote: importance "
        "weights pi_old / behaviour policy; shorthand: the kind",
    )
    lr_scale: Weight = Field(default=1.0, description="multiplies the learning rate during the phase")


class Optimizer(Strict):
    """AdamW; the schedule spans all phases."""

    lr: Weight = Field(default=1e-6, description="peak learning rate")
    betas: tuple[Fraction, Fraction] = Field(
        default=(0.9, 0.95), description="decay of the running means of gradient and squared gradient"
    )
    eps: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] = Field(
        default=1e-8, description="added to the root of the mean squared gradient"
    )
    weight_decay: Weight = Field(
        default=0.0, description="decoupled decay of matrices; biases and norms have none"
    )
    warmup_updates: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=0, description="updates during which the learning rate rises linearly to its peak"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="the learning rate after the warm-up, until the last update"
    )
    final_lr_fraction: Fraction = Field(
        default=0.0, description="where linear and cosine end, relative to lr"
    )
    clip_grad: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] | None = Field(
        default=1.0, description="largest gradient norm; null: no clipping"
    )


def on_policy_fraction(phase: Phase, updates_done: int) -> float:
    """Share of prompts that the student answers after `updates_done` updates of the phase."""
    if not isinstance(phase.text, TextMixture):
        return 1.0 if phase.text == "student" else 0.0
    fraction = phase.text.on_policy_fraction
    if isinstance(fraction, Ramp):
        progress = min(updates_done / fraction.updates, 1.0)
        return fraction.start + (fraction.end - fraction.start) * progress
    return fraction


def off_policy_origin(phase: Phase) -> Origin | None:
    """Where the answers come from that the student does not write: teacher, dataset, or None."""
    if isinstance(phase.text, TextMixture):
        return phase.text.otherwise
    return None if phase.text == "student" else phase.text


def only_student(phase: Phase) -> bool:
    """Whether the student writes every answer of a phase."""
    if not isinstance(phase.text, TextMixture):
        return phase.text == "student"
    fraction = phase.text.on_policy_fraction
    return fraction.start == fraction.end == 1.0 if isinstance(fraction, Ramp) else fraction == 1.0


def never_student(phase: Phase) -> bool:
    """Whether the student writes no answer of a phase."""
    if not isinstance(phase.text, TextMixture):
        return phase.text != "student"
    fraction = phase.text.on_policy_fraction
    return fraction.start == fraction.end == 0.0 if isinstance(fraction, Ramp) else fraction == 0.0


def reads_dataset(phase: Phase) -> bool:
    """Whether some of a phase's answers come from the prompt files."""
    return off_policy_origin(phase) == "dataset" and not only_student(phase)
