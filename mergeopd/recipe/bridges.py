"""How a teacher with another tokenizer is listened to. What each bridge approximates: docs/objectives.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mergeopd.config.values import PositiveInt, Strict, Weight

Merge = Literal["observed", "bayesian"]
_MERGE = (
    "which of a group's rows keeps its whole distribution: the first (`observed`) or the last (`bayesian`); "
    "the others count with the probability of their token"
)


class GoldBridge(Strict):
    """Tokens of both vocabularies by identity, the others by rank (GOLD)."""

    beta: Annotated[float, Field(gt=0.0, lt=1.0, strict=True)] = Field(
        default=0.5, description="weight of the teacher in the mixture of the Jensen-Shannon divergence"
    )
    merge: Merge = Field(default="observed", description=_MERGE)
    weights: tuple[Weight, Weight] | None = Field(
        default=None,
        description="of the part by identity and of the part by rank; default: the share of the teacher's "
        "vocabulary that is matched, and the rest",
    )

    @model_validator(mode="after")
    def _some_weight(self) -> GoldBridge:
        if self.weights is not None and not any(self.weights):
            raise ValueError("both weights are zero: give at least one part a positive weight")
        return self


class UldBridge(Strict):
    """All tokens by rank (ULD): how certain the models are, not of what."""

    merge: Merge = Field(default="observed", description=_MERGE)


class ProjectionBridge(Strict):
    """The student's probabilities carried into the teacher's vocabulary by a sparse map (X-Token)."""

    direction: Literal["forward", "reverse"] = Field(
        default="forward", description="which KL: forward is KL(teacher || student)"
    )
    top_k: PositiveInt | None = Field(
        default=None, description="compare only so many of the teacher's likeliest tokens; null: all"
    )
    pieces: PositiveInt = Field(
        default=4, description="teacher tokens that one of the student's is spread over, at most"
    )


class PiecesBridge(Strict):
    """The teacher's next token cut into the student's tokens, compared with the student's next token."""

    jsd: Annotated[float, Field(gt=0.0, lt=1.0, strict=True)] | None = Field(
        default=None,
        description="take a generalised Jensen-Shannon divergence with this beta, in place of "
        "KL(teacher || student); its gradient is about beta (1 - beta) as large",
    )


class SpanBridge(Strict):
    """The log-ratio of each aligned group as an advantage: exact, needs no map, one sample a group."""

    bound: Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] | None = Field(
        default=None, description="log-ratios of groups are brought to plus or minus this, in nats"
    )


class Bridge(Strict):
    """One of the kinds. Shorthand: its name."""

    pieces: PiecesBridge | None = Field(
        default=None,
        description="the teacher's tokens cut into the student's, in the student's vocabulary",
    )
    gold: GoldBridge | None = Field(
        default=None, description="shared tokens by identity (generalised JSD), the others by rank (GOLD)"
    )
    uld: UldBridge | None = Field(default=None, description="all tokens by rank (ULD)")
    projection: ProjectionBridge | None = Field(
        default=None, description="KL in the teacher's vocabulary, over a sparse map (X-Token)"
    )
    span: SpanBridge | None = Field(
        default=None,
        description="log-ratio of each aligned group as its tokens' advantage; for the student's own text",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Bridge:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, not {len(given)}")
        return self

    @property
    def kind(self) -> Literal["pieces", "gold", "uld", "projection", "span"]:
        """Its name."""
        return next(name for name in KINDS if getattr(self, name) is not None)


KINDS: tuple[Literal["pieces", "gold", "uld", "projection", "span"], ...] = (
    "pieces",
    "gold",
    "uld",
    "projection",
    "span",
)


def _bridge_shorthand(value: Any) -> Any:
    """A name stands for that bridge with its defaults, and a kind without a value likewise."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict):
        return {key: {} if inner is None else inner for key, inner in value.items()}
    return value


_Kind: Any = Literal[KINDS]
BridgeOrKind = Annotated[Bridge, BeforeValidator(_bridge_shorthand, json_schema_input_type=_Kind | Bridge)]
