"""How an answer is checked."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from mergeopd.recipe.values import FunctionPath, Strict, Weight


class ExactVerifier(Strict):
    """Correct when the response, stripped of surrounding white space, equals the reference."""

    kind: Literal["exact"] = Field(description="verifier kind")
    ignore_case: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="compare case-insensitively"
    )


class RegexVerifier(Strict):
    """Correct when the pattern matches; if it has a group named `answer`, that group must equal the
    reference.
    """

    kind: Literal["regex"] = Field(description="verifier kind")
    pattern: str = Field(description="Python regular expression, searched in the whole response")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class NumberVerifier(Strict):
    """Correct when the final number equals the reference's final number (after `####` if present)."""

    kind: Literal["number"] = Field(description="verifier kind")
    tolerance: Weight = Field(default=0.0, description="largest absolute difference that counts as equal")


class JsonVerifier(Strict):
    """Correct when the response is JSON and equal to the reference, ignoring key order and white space."""

    kind: Literal["json"] = Field(description="verifier kind")
    schema_file: str | None = Field(
        default=None,
        description="JSON Schema file; the response must then satisfy the schema, and no reference is needed",
    )


class UserVerifier(Strict):
    """A function `(answer: str, reference: str | None) -> float` in [0, 1], listed in `allow_code`."""

    kind: Literal["user"] = Field(description="verifier kind")
    function: FunctionPath = Field(description="function path, as listed in `allow_code`")


Verifier = Annotated[
    ExactVerifier | RegexVerifier | NumberVerifier | JsonVerifier | UserVerifier, Field(discriminator="kind")
]


def kind_shorthand(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


VerifierOrKind = Annotated[
    Verifier,
    BeforeValidator(
        kind_shorthand,
        json_schema_input_type=Literal["exact", "number", "json"] | Verifier,
    ),
]
