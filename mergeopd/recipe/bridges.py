"""Settings of bridges, the losses for teachers with another tokenizer (see docs/objectives.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from mergeopd.config.values import OpenFraction, Positive, PositiveInt, Strict, Weight
from mergeopd.recipe.term_display import TermDisplay

BridgeKind = Literal["pieces", "gold", "uld", "projection", "span"]
KeptRow = Annotated[
    Literal["observed", "bayesian"],
    Field(
        description="row of a group that keeps its whole distribution: the first (`observed`) or the last "
        "(`bayesian`); the other rows contribute the probability of their token"
    ),
]


class GoldBridge(Strict):
    """Compare tokens that both vocabularies share by identity, and all others by rank (GOLD)."""

    beta: OpenFraction = 0.5
    """weight of the teacher in the mixture of the Jensen-Shannon divergence"""
    merge: KeptRow = "observed"
    weights: tuple[Weight, Weight] | None = None
    """weights of the identity part and of the rank part; default: the fraction of the teacher's vocabulary
    that is matched, and the remainder"""

    @model_validator(mode="after")
    def _some_weight(self) -> GoldBridge:
        if self.weights is not None and not any(self.weights):
            raise ValueError("both weights are zero: give at least one part a positive weight")
        return self


class UldBridge(Strict):
    """Compare all tokens by rank (ULD): only the shape of the distributions, not their tokens."""

    merge: KeptRow = "observed"


class ProjectionBridge(Strict):
    """Map the student's probabilities into the teacher's vocabulary with a sparse matrix (X-Token)."""

    direction: Literal["forward", "reverse"] = "forward"
    """KL direction: `forward` is KL(teacher || student)"""
    top_k: PositiveInt | None = None
    """compare only the teacher's k most probable tokens; null: all"""
    pieces: PositiveInt = 4
    """maximum number of teacher tokens to which one student token is mapped"""


class PiecesBridge(Strict):
    """Split the teacher's next token into student tokens, and compare with the student's next token."""

    jsd: OpenFraction | None = None
    """use a generalised Jensen-Shannon divergence with this beta instead of KL(teacher || student); its
    gradient is about beta (1 - beta) times as large"""


class SpanBridge(Strict):
    """Use the log-ratio of each aligned group as an advantage: unbiased, needs no vocabulary map, one
    sample per group.
    """

    bound: Positive | None = None
    """clip the log-ratio of each group to plus or minus this value, in nats"""


class Bridge(Strict):
    """Exactly one bridge. Shorthand: its name."""

    pieces: PiecesBridge | None = None
    """split the teacher's tokens into student tokens and compare in the student's vocabulary"""
    gold: GoldBridge | None = None
    """shared tokens by identity (generalised JSD), the others by rank (GOLD)"""
    uld: UldBridge | None = Field(default=None, description="all tokens by rank (ULD)")
    projection: ProjectionBridge | None = None
    """KL in the teacher's vocabulary through a sparse map (X-Token)"""
    span: SpanBridge | None = None
    """log-ratio of each aligned group as the advantage of its tokens; only for the student's own text"""

    @model_validator(mode="after")
    def _one_kind(self) -> Bridge:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, not {len(given)}")
        return self

    @property
    def kind(self) -> BridgeKind:
        """Name of the bridge."""
        return next(name for name in KINDS if getattr(self, name) is not None)


KINDS: tuple[BridgeKind, ...] = get_args(BridgeKind)

BRIDGES: Mapping[str, TermDisplay] = {
    "pieces": TermDisplay("KL of pieces", "pieces", "or JSD, in the student's vocabulary", "nats per group"),
    "gold": TermDisplay("GOLD", "GOLD", "JSD of shared tokens, the others by rank", "mean per group"),
    "uld": TermDisplay("ULD", "ULD", "probabilities by rank", "mean per group"),
    "projection": TermDisplay(
        "Projected KL", "projected KL", "in the teacher's vocabulary", "nats per group"
    ),
    "span": TermDisplay("Span log-ratio", "span", "student minus teacher, by group", "nats per group"),
}
"""How the measure of each bridge is shown."""


def _bridge_shorthand(value: Any) -> Any:
    """Expand a bridge name, or a kind without a value, to that bridge with its defaults."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict):
        return {key: {} if inner is None else inner for key, inner in value.items()}
    return value


BridgeOrKind = Annotated[
    Bridge, BeforeValidator(_bridge_shorthand, json_schema_input_type=BridgeKind | Bridge)
]
