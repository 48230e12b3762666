"""What a phase may minimise. `Strict` and the number types are the schema's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mergeopd.recipe.values import Strict, Weight


class Term(Strict):
    """A divergence with a parameter. Shorthand: its weight."""

    weight: Weight = Field(default=1.0, description="weight of the term")


class JsdTerm(Term):
    """Generalised Jensen-Shannon divergence `beta KL(T||M) + (1-beta) KL(S||M)`, M = beta T + (1-beta) S."""

    beta: Annotated[float, Field(gt=0.0, lt=1.0, strict=True)] = Field(
        default=0.5,
        description="weight of the teacher in M; at the ends, 0 and 1, the divergence would vanish",
    )


class SkewTerm(Term):
    """A KL against a mixture of both distributions, so that its gradient is bounded (DistiLLM)."""

    alpha: Annotated[float, Field(ge=0.0, lt=1.0, strict=True)] = Field(
        default=0.1, description="share of the KL's own first argument in the mixture; 0 is the plain KL"
    )


class ClipTerm(Term):
    """Forward KL whose large entries are capped (OPSD); can be negative."""

    bound: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] = Field(
        default=0.05, description="largest contribution of one vocabulary entry, in nats"
    )


def weight_shorthand(value: Any) -> Any:
    """A number stands for a term of that weight."""
    return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


Jsd = Annotated[JsdTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Weight | JsdTerm)]
Skew = Annotated[SkewTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Weight | SkewTerm)]
Clip = Annotated[ClipTerm, BeforeValidator(weight_shorthand, json_schema_input_type=Weight | ClipTerm)]

PLAIN_TERMS = ("reverse_kl", "forward_kl", "tvd")
PARAMETRIC_TERMS = ("jsd", "skew_forward_kl", "skew_reverse_kl", "clipped_forward_kl")
DIVERGENCE_TERMS = (*PLAIN_TERMS, *PARAMETRIC_TERMS)


class Loss(Strict):
    """Weighted sum of terms per response token. Shorthand for one term of weight 1: its name."""

    reverse_kl: Weight = Field(default=0.0, description="KL(student || teacher), mode seeking")
    forward_kl: Weight = Field(default=0.0, description="KL(teacher || student), mass covering")
    tvd: Weight = Field(default=0.0, description="total variation distance, half the sum of |S - T|")
    jsd: Jsd | None = Field(
        default=None, description="generalised Jensen-Shannon divergence; shorthand: its weight"
    )
    skew_forward_kl: Skew | None = Field(
        default=None, description="KL(T || alpha T + (1 - alpha) S); shorthand: its weight"
    )
    skew_reverse_kl: Skew | None = Field(
        default=None, description="KL(S || (1 - alpha) T + alpha S); shorthand: its weight"
    )
    clipped_forward_kl: Clip | None = Field(
        default=None, description="forward KL with capped entries; shorthand: its weight"
    )
    nll: Weight = Field(
        default=0.0,
        description="negative log-likelihood of the text; only for text the student did not write",
    )
    temperature: Annotated[float, Field(gt=0.0, le=100.0, strict=True)] = Field(
        default=1.0,
        description="divides both logits in divergences, which are multiplied by its square (Hinton 2015)",
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> Loss:
        if not (self.has_divergence or self.nll):
            raise ValueError("all weights are zero: give at least one term a positive weight")
        if self.nll and self.temperature != 1.0:
            raise ValueError("nll is defined at temperature 1: remove the temperature or the nll term")
        return self

    def weight(self, term: str) -> float:
        """Weight of one of `DIVERGENCE_TERMS`; 0 where it is not used."""
        value = getattr(self, term)
        if value is None:
            return 0.0
        return float(value.weight if isinstance(value, Term) else value)

    @property
    def has_divergence(self) -> bool:
        """True when a teacher's distribution is needed, not only text."""
        return any(self.weight(term) for term in DIVERGENCE_TERMS)


def loss_shorthand(value: Any) -> Any:
    """A name stands for that term with weight 1."""
    return {value: 1.0} if isinstance(value, str) else value


LossOrTerm = Annotated[
    Loss,
    BeforeValidator(
        loss_shorthand,
        json_schema_input_type=Literal[
            "reverse_kl",
            "forward_kl",
            "tvd",
            "jsd",
            "skew_forward_kl",
            "skew_reverse_kl",
            "clipped_forward_kl",
            "nll",
        ]
        | Loss,
    ),
]
