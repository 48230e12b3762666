"""Training settings: phases, optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mergeopd.config.values import AnyName, Flag, Fraction, Name, Positive, PositiveInt, Strict, Weight
from mergeopd.recipe.loss_terms import LossOrTerm
from mergeopd.recipe.policy_terms import ClipRatio, Correction, NoCorrection, WeightRamp, amount_at
from mergeopd.recipe.rollout import PhaseRollout
from mergeopd.recipe.routing import Routing
from mergeopd.recipe.selection import Select
from mergeopd.types import Origin


class Ramp(WeightRamp):
    """A value that moves linearly from `start` to `end` during the first `updates` of the phase."""

    start: Fraction = Field(description="value at the phase's first update")
    end: Fraction = Field(description="value after the ramp")


class TextMixture(Strict):
    """Mix on-policy responses with off-policy ones."""

    on_policy_fraction: Fraction | Ramp
    """fraction of prompts to which the student responds (lambda in GKD)"""
    otherwise: Literal["teacher", "dataset"] = Field(description="origin of the other responses")


Text = Literal["student", "teacher", "dataset"] | TextMixture
Keep = Literal["all", "right"] | Annotated[float, Field(gt=0.0, le=1.0, strict=True)]


class PassRate(Strict):
    """Weight of a prompt's distillation loss: p^a (1 - p)^b, with p the mean reward of its responses."""

    a: Weight = 1.0
    """exponent of p: larger values reduce the weight of prompts that are rarely solved"""
    b: Weight = 1.0
    """exponent of 1 - p: larger values reduce the weight of prompts that are mostly solved"""


class Balance(Strict):
    """Distribution of the loss over domains, prompts and responses."""

    tokens: Literal["off", "equal"] | dict[Name, Weight] = "off"
    """domain shares of the loss, independent of response lengths (Open-MOPD M1): `equal`, or a target share
    per domain"""
    follow_gap: Annotated[float, Field(ge=0.0, le=2.0, strict=True)] = 0.0
    """exponent with which a domain's weight follows its remaining teacher-student gap (Open-MOPD M2); 0:
    off"""
    pass_rate: PassRate | None = None
    """weight prompts by how often the student solves them (PACED); null: off"""
    distill_on: Literal["all", "wrong", "failed_groups"] = "all"
    """responses with a distillation loss: `all`, only incorrect ones (`wrong`), or only those of prompts with
    no correct response (`failed_groups`)"""


def sources_shorthand(value: Any) -> Any:
    """Expand names to a mapping without shares: those of the sources."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return value
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"source '{twice[0]}' is named twice: name it once, or give shares")
    return dict.fromkeys(names)


_Names = Annotated[list[AnyName], Field(min_length=1)]
_Shares = Annotated[dict[AnyName, Positive | None], Field(min_length=1)]
PhasePrompts = Annotated[
    _Shares,
    BeforeValidator(sources_shorthand, json_schema_input_type=AnyName | _Names | _Shares),
]


class Phase(Strict):
    """A training phase with one origin of text and one loss."""

    name: Name = Field(description="phase name, unique in the recipe")
    updates: PositiveInt = Field(description="number of optimizer updates")
    text: Text = "student"
    """origin of the responses: `student` (on-policy), `teacher`, `dataset`, or a mixture"""
    prompts: PhasePrompts | None = None
    """sources to draw from: names (with the sources' own shares), or names with shares; default: all"""
    select: Select | None = None
    """prompts of these sources to draw from, chosen once when the phase starts; default: all"""
    teachers: Routing | None = None
    """teachers of this phase: a name, names, or names with weights; default: those of each source. A teacher
    keeps to the sources that are routed to it, with the product of both weights; one that none of the phase's
    sources is routed to teaches all their prompts"""
    rollout: PhaseRollout = PhaseRollout()
    """sampling settings of this phase, for the student's and for teachers' responses"""
    keep: Keep = "all"
    """teachers' responses to learn from: `all`, only correct ones (`right`), or those with at least this
    reward. A prompt without any is replaced by others of its domain"""
    loss: LossOrTerm = Field(description="loss to minimise")
    prompts_per_round: PositiveInt = Field(default=64, description="prompts per round")
    updates_per_round: PositiveInt = Field(default=1, description="optimizer updates per round")
    reduce: Literal["token", "sequence"] = "token"
    """`token`: mean over all tokens of an update; `sequence`: mean over responses of each response's token
    mean"""
    balance: Balance = Balance()
    """distribution of the loss over domains, prompts and responses"""
    clip_ratio: ClipRatio | None = ClipRatio()
    """PPO clipping of policy terms; null: no clipping"""
    correction: Correction = NoCorrection(kind="none")
    """importance weights pi_old / behaviour policy for policy terms, which correct for responses sampled by a
    slightly different policy; shorthand: the kind"""
    lr_scale: Weight = Field(default=1.0, description="factor on the learning rate during this phase")

    def shares(self, own: Mapping[str, float]) -> dict[str, float]:
        """Share of each source that the phase draws from; `own` are the shares of all sources by name."""
        if self.prompts is None:
            return dict(own)
        return {name: own[name] if share is None else share for name, share in self.prompts.items()}

    @property
    def num_prompts(self) -> int:
        """Number of prompts that the phase draws."""
        return self.num_drawn(self.updates)

    def num_drawn(self, updates_done: int) -> int:
        """Number of prompts drawn in the rounds before update number `updates_done` (from 0) of the phase."""
        return updates_done // self.updates_per_round * self.prompts_per_round


class Optimizer(Strict):
    """AdamW; the learning-rate schedule spans all phases."""

    lr: Weight = Field(default=1e-6, description="peak learning rate")
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """decay rates of the running means of the gradient and of its square"""
    eps: Positive = 1e-8
    """constant added to the denominator"""
    weight_decay: Weight = 0.0
    """decoupled weight decay of matrices; biases and norms are not decayed"""
    warmup_updates: Annotated[int, Field(ge=0, strict=True)] = 0
    """updates of linear warm-up"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning-rate schedule after the warm-up, until the last update"""
    final_lr_fraction: Fraction = 0.0
    """final learning rate of `linear` and `cosine`, as a fraction of `lr`"""
    clip_grad: Positive | None = 1.0
    """maximum gradient norm; null: no clipping"""
    offload: Flag = False
    """keep AdamW's moments in host memory; they visit the GPU one parameter at a time in each update"""


def on_policy_fraction(phase: Phase, updates_done: int) -> float:
    """Fraction of prompts to which the student responds after `updates_done` updates of the phase."""
    if isinstance(phase.text, TextMixture):
        return amount_at(phase.text.on_policy_fraction, updates_done)
    return 1.0 if phase.text == "student" else 0.0


def off_policy_origin(phase: Phase) -> Origin | None:
    """Origin of the responses that the student does not generate; None if it generates all."""
    if isinstance(phase.text, TextMixture):
        return phase.text.otherwise
    return None if phase.text == "student" else phase.text


def only_student(phase: Phase) -> bool:
    """Whether the student generates every response of a phase."""
    return _first_and_last_fraction(phase) == {1.0}


def never_student(phase: Phase) -> bool:
    """Whether the student generates no response of a phase."""
    return _first_and_last_fraction(phase) == {0.0}


def _first_and_last_fraction(phase: Phase) -> set[float]:
    mixed = phase.text.on_policy_fraction if isinstance(phase.text, TextMixture) else None
    return {mixed.start, mixed.end} if isinstance(mixed, Ramp) else {on_policy_fraction(phase, 0)}


def reads_teachers(phase: Phase) -> bool:
    """Whether teachers generate some responses of a phase."""
    return off_policy_origin(phase) == "teacher" and not only_student(phase)


def needs_routed(phase: Phase) -> bool:
    """Whether the prompts of a phase need teachers: to score or generate responses, or to be selected."""
    selects = phase.select is not None and bool(phase.select.teacher_rules)
    return phase.loss.uses_routed or reads_teachers(phase) or selects


def reads_dataset(phase: Phase) -> bool:
    """Whether some responses of a phase come from the prompt files."""
    return off_policy_origin(phase) == "dataset" and not only_student(phase)
