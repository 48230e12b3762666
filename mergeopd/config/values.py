"""Base model and field types of recipes and cards."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
ANY_NAME_PATTERN = r"^\S.*$"  # names that are derived from files
FUNCTION_PATTERN = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
# Each part of a revision begins with a letter or digit, because it becomes a path in the hub's cache.
REVISION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*(/[A-Za-z0-9][A-Za-z0-9_.+-]*)*$"
DIGEST_PATTERN = r"^[0-9a-f]{64}$"
VARIABLE_PATTERN = r"^[A-Z_][A-Z0-9_]*$"
GPUS_PATTERN = r"^\d+(,\d+)*$"

Name = Annotated[str, Field(pattern=NAME_PATTERN, description="letters, digits, _ . -")]
Revision = Annotated[str, Field(pattern=REVISION_PATTERN)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
AnyName = Annotated[str, Field(pattern=ANY_NAME_PATTERN)]
NonEmptyText = Annotated[str, Field(min_length=1)]
Flag = Annotated[bool, Field(strict=True)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, strict=True)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0, strict=True)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)]
FunctionPath = Annotated[str, Field(pattern=FUNCTION_PATTERN, description="`package.module:function`")]


class Strict(BaseModel):
    """Base model: immutable, and unknown keys are errors. A docstring below a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def kind_shorthand(value: Any) -> Any:
    """Expand a kind to the model of that kind with its defaults."""
    return {"kind": value} if isinstance(value, str) else value
