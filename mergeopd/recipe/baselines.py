"""Settings of static merges, the baselines that an evaluation compares with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mergeopd.config.values import Strict

_Density = Annotated[float, Field(gt=0.0, le=1.0, strict=True)]
_Scale = Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)]


class WeightAverage(Strict):
    """The mean of the experts' weights."""

    kind: Literal["weight_average"] = Field(description="kind of static merge")


class TaskArithmetic(Strict):
    """The base plus the scaled sum of the experts' differences from it (2212.04089)."""

    kind: Literal["task_arithmetic"] = Field(description="kind of static merge")
    scale: _Scale = Field(default=0.4, description="factor of the sum of all differences")


class Ties(Strict):
    """Task arithmetic with small differences removed and signs agreed on (2306.01708)."""

    kind: Literal["ties"] = Field(description="kind of static merge")
    density: _Density = Field(default=0.2, description="share of each tensor's differences that is kept")
    scale: _Scale = Field(default=1.0, description="factor of the merged difference")


class Dare(Strict):
    """Task arithmetic with randomly dropped and rescaled differences (2311.03099)."""

    kind: Literal["dare"] = Field(description="kind of static merge")
    density: _Density = Field(default=0.5, description="probability with which a difference is kept")
    scale: _Scale = Field(default=0.4, description="factor of the sum of all differences")


class Slerp(Strict):
    """Spherical interpolation of the experts' weights, tensor by tensor."""

    kind: Literal["slerp"] = Field(description="kind of static merge")


StaticMerge = Annotated[WeightAverage | TaskArithmetic | Ties | Dare | Slerp, Field(discriminator="kind")]


def static_merge_shorthand(value: Any) -> Any:
    """Expand a kind to that merge with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


StaticMergeOrKind = Annotated[
    StaticMerge,
    BeforeValidator(
        static_merge_shorthand,
        json_schema_input_type=Literal["weight_average", "task_arithmetic", "ties", "dare", "slerp"]
        | StaticMerge,
    ),
]
