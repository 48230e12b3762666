"""Loss terms of a phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mergeopd.config.values import OpenFraction, Positive, PositiveInt, Strict, Weight
from mergeopd.recipe.policy_terms import (
    POLICY_TERMS,
    Amount,
    Outcome,
    Sampled,
    TeacherTerm,
    Term,
    TrustRegion,
    WeightRamp,
    amount_at,
    weight_shorthand,
)
from mergeopd.recipe.routing import TeacherWeights
from mergeopd.recipe.term_display import TermDisplay

if TYPE_CHECKING:
    from mergeopd.loss.divergence import Divergence


class PlainTerm(TeacherTerm):
    """A divergence without parameters."""


class JsdTerm(TeacherTerm):
    """Generalised Jensen-Shannon divergence `beta KL(T||M) + (1-beta) KL(S||M)`, M = beta T + (1-beta) S."""

    beta: OpenFraction = 0.5
    """weight of the teacher in M; the divergence vanishes at 0 and 1, so both are refused"""


class SkewTerm(TeacherTerm):
    """A KL divergence against a mixture of both distributions, which bounds its gradient (DistiLLM)."""

    alpha: Annotated[float, Field(ge=0.0, lt=1.0, strict=True)] = 0.1
    """weight of the KL's first argument in the mixture; 0 is the plain KL"""

    @model_validator(mode="after")
    def _can_be_computed(self) -> SkewTerm:
        if 0.0 < self.alpha < 0.001:
            raise ValueError("alpha below 0.001 is lost in float32: use 0 (the plain KL), or 0.001 and more")
        return self


class AlphaTerm(TeacherTerm):
    """Alpha divergence, between reverse KL (alpha -> 0) and forward KL (alpha -> 1)."""

    alpha: OpenFraction = 0.5
    """order of the divergence; at 1/2 it is 4 times the squared Hellinger distance"""


class ClipTerm(TeacherTerm):
    """Forward KL with capped entries (OPSD); can be negative."""

    bound: Positive = 0.05
    """maximum contribution of one vocabulary entry, in nats"""


Plain = Annotated[PlainTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Amount | PlainTerm)]
Jsd = Annotated[JsdTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Amount | JsdTerm)]
Skew = Annotated[SkewTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Amount | SkewTerm)]
Alpha = Annotated[AlphaTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Amount | AlphaTerm)]
Clip = Annotated[ClipTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Amount | ClipTerm)]


@dataclass(frozen=True, slots=True)
class LossTerm(TermDisplay):
    """One loss term: how it is shown, and for divergences the class in `mergeopd.loss` that computes it."""

    kernel: str = ""


TERMS: Mapping[str, LossTerm] = {
    "reverse_kl": LossTerm("Reverse KL", "reverse KL", "KL(student ‖ teacher)", kernel="ReverseKL"),
    "forward_kl": LossTerm("Forward KL", "forward KL", "KL(teacher ‖ student)", kernel="ForwardKL"),
    "tvd": LossTerm("TVD", "TVD", "total variation distance", "mean per token", 0.3, "TVD"),
    "jsd": LossTerm("JSD", "JSD", "generalised Jensen-Shannon divergence", colour_scale=0.2, kernel="JSD"),
    "skew_forward_kl": LossTerm(
        "Skew forward KL", "skew fwd KL", "KL(teacher ‖ mixture)", kernel="SkewForwardKL"
    ),
    "skew_reverse_kl": LossTerm(
        "Skew reverse KL", "skew rev KL", "KL(student ‖ mixture)", kernel="SkewReverseKL"
    ),
    "alpha_divergence": LossTerm(
        "Alpha divergence",
        "alpha div",
        "between reverse KL and forward KL",
        "mean per token",
        kernel="AlphaDivergence",
    ),
    "clipped_forward_kl": LossTerm(
        "Clipped forward KL",
        "clipped KL",
        "forward KL with capped entries",
        colour_scale=0.1,
        kernel="ClippedForwardKL",
    ),
    "sampled_reverse_kl": LossTerm(
        "Reverse KL, sampled", "sampled KL", "k3 estimate from the sampled tokens"
    ),
    "outcome": LossTerm("Reward", "reward", "mean over the responses that a verifier checked", ""),
    "nll": LossTerm("NLL of the text", "NLL", "-log p of the student, for text of any origin"),
}
"""Every term of a loss, by its key. Responses are coloured by the first divergence that their loss has."""

PLAIN_KLS = ("reverse_kl", "forward_kl")
DIVERGENCE_TERMS = tuple(key for key, term in TERMS.items() if term.kernel)
TEACHER_TERMS = (*DIVERGENCE_TERMS, "sampled_reverse_kl")


class Support(Strict):
    """Restrict divergences to the most probable tokens, without renormalising their probabilities."""

    top_k: PositiveInt = Field(description="number of tokens")
    of: Literal["student", "teacher", "union"] = "student"
    """whose most probable tokens: `student` covers the mass that reverse KL weighs, `teacher` the mass that
    forward KL weighs. With `teacher`, only its top k are kept instead of hidden states"""
    rest: Literal["tail", "generalised"] = "tail"
    """`tail`: all other tokens form one extra category; `generalised`: generalised KL for unnormalised
    masses, p log(p/q) - p + q, for `reverse_kl` and `forward_kl` only"""


class Loss(Strict):
    """Weighted sum of terms per response token. Shorthand for one term with weight 1: its name."""

    reverse_kl: Plain | None = None
    """KL(student || teacher), mode seeking; shorthand: its weight"""
    forward_kl: Plain | None = None
    """KL(teacher || student), mass covering; shorthand: its weight"""
    tvd: Plain | None = None
    """total variation distance, half the sum of |S - T|; shorthand: its weight"""
    jsd: Jsd | None = None
    """generalised Jensen-Shannon divergence; shorthand: its weight"""
    skew_forward_kl: Skew | None = None
    """KL(T || alpha T + (1 - alpha) S); shorthand: its weight"""
    skew_reverse_kl: Skew | None = None
    """KL(S || (1 - alpha) T + alpha S); shorthand: its weight"""
    alpha_divergence: Alpha | None = None
    """alpha divergence, between the two KLs; shorthand: its weight"""
    clipped_forward_kl: Clip | None = None
    """forward KL with capped entries; shorthand: its weight"""
    sampled_reverse_kl: Sampled | None = None
    """single-sample reverse KL as a policy gradient: the sampled token's log-ratio is its advantage;
    shorthand: its weight"""
    outcome: Outcome | None = None
    """policy gradient from the verifier's reward (GRPO); shorthand: its weight"""
    nll: Weight = 0.0
    """negative log-likelihood of the text; only for text that the student did not generate"""
    temperature: Annotated[float, Field(gt=0.0, le=100.0, strict=True)] = 1.0
    """softmax temperature of both models in the divergences; the loss is multiplied by its square (Hinton
    2015). Not the sampling temperature"""

    support: Support | None = None
    """tokens over which divergences are computed; null: the whole vocabulary, exactly"""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Loss:
        if not (self.has_divergence or self.nll or self.has_policy):
            raise ValueError("all weights are zero: give at least one term a positive weight")
        if self.nll and self.temperature != 1.0:
            raise ValueError("nll is defined at temperature 1: remove the temperature or the nll term")
        if self.has_policy and self.temperature != 1.0:
            raise ValueError(
                "policy terms are defined at temperature 1: remove the temperature, or "
                + " and ".join(term for term in POLICY_TERMS if self.uses(term))
            )
        anchor = self.outcome.teacher if self.outcome is not None else None
        if isinstance(anchor, TrustRegion) and self.uses("sampled_reverse_kl"):
            raise ValueError(
                "outcome.teacher: trust_region uses the teacher in the ratio, sampled_reverse_kl in the "
                "advantage: choose one"
            )
        sampled = self.sampled_reverse_kl
        if sampled is not None and sampled.future_only and not self.uses("reverse_kl"):
            raise ValueError(
                "sampled_reverse_kl.future_only leaves out each token's own log-ratio: add `reverse_kl` with "
                "the same weight, which covers it"
            )
        return self

    @model_validator(mode="after")
    def _support_fits(self) -> Loss:
        if self.support is None:
            return self
        if not self.has_divergence:
            raise ValueError("support applies to divergences, and the loss has none: remove it")
        others = [term for term in DIVERGENCE_TERMS if self.uses(term) and term not in PLAIN_KLS]
        if self.support.rest == "generalised" and others:
            raise ValueError(
                f"rest: generalised is defined for {' and '.join(PLAIN_KLS)} only: use `rest: tail`, or "
                f"remove {' and '.join(others)}"
            )
        return self

    @property
    def term_teachers(self) -> dict[str, TeacherWeights]:
        """Teachers of the used terms that have teachers of their own, with weights."""
        terms = {term: getattr(self, term) for term in TEACHER_TERMS if self.uses(term)}
        return {term: value.teachers for term, value in terms.items() if value.teachers is not None}

    @property
    def uses_routed(self) -> bool:
        """Whether the prompts' own teachers have to score the responses."""
        own = self.term_teachers
        return self.is_shaped or any(self.uses(term) and term not in own for term in TEACHER_TERMS)

    @property
    def is_shaped(self) -> bool:
        """Whether teachers shape the outcome term."""
        return self.has_outcome and self.outcome is not None and self.outcome.teacher is not None

    def divergence(self, term: str) -> Divergence:
        """Build the kernel's divergence of a term that the loss uses. Imports torch."""
        from mergeopd import loss as kernel

        settings, kind = getattr(self, term), TERMS[term].kernel
        parameters = settings.model_dump(exclude={"weight", "teachers"}) if isinstance(settings, Term) else {}
        if isinstance(settings, SkewTerm) and not settings.alpha:
            kind, parameters = kind.removeprefix("Skew"), {}
        divergence: Divergence = getattr(kernel, kind)(**parameters)
        return divergence

    def weight(self, term: str, updates_done: int) -> float:
        """Weight of a divergence or policy term after `updates_done` updates of the phase; 0 if unused."""
        value: Term | None = getattr(self, term)
        return 0.0 if value is None else float(amount_at(value.weight, updates_done))

    def uses(self, term: str) -> bool:
        """Whether a divergence or policy term has a positive weight at some point of the phase."""
        value: Term | None = getattr(self, term)
        amount = 0.0 if value is None else value.weight
        return bool(amount) if not isinstance(amount, WeightRamp) else bool(amount.start or amount.end)

    @property
    def has_divergence(self) -> bool:
        """Whether a teacher's distributions are needed, not only text or single log-probabilities."""
        return any(self.uses(term) for term in DIVERGENCE_TERMS)

    @property
    def has_policy(self) -> bool:
        """Whether responses of the student are needed, with their log-probabilities."""
        return any(self.uses(term) for term in POLICY_TERMS)

    @property
    def has_outcome(self) -> bool:
        """Whether rewards are needed."""
        return self.uses("outcome")

    @property
    def has_teacher_term(self) -> bool:
        """Whether there is a distillation loss, independent of rewards."""
        return self.has_divergence or self.uses("sampled_reverse_kl")

    @property
    def needs_teacher(self) -> bool:
        """Whether teachers have to score the responses, if only to shape the outcome term."""
        return self.has_teacher_term or self.is_shaped


SHORT_TERMS = tuple(key for key in TERMS if Loss.model_fields[key].default is None)
"""Terms with parameters for which a recipe may give a number alone: their weight."""


def loss_shorthand(value: Any) -> Any:
    """Expand the name of a term to that term with weight 1."""
    return {value: 1.0} if isinstance(value, str) else value


_TermName: Any = Literal[(*DIVERGENCE_TERMS, *POLICY_TERMS, "nll")]
LossOrTerm = Annotated[Loss, BeforeValidator(loss_shorthand, json_schema_input_type=_TermName | Loss)]
