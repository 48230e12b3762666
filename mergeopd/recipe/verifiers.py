"""How an answer is checked."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from mergeopd.config.values import FunctionPath, Strict, Weight

_MAX_PATTERN = 10_000


class ExactVerifier(Strict):
    """Right when the answer, stripped of outer white space, equals the reference."""

    kind: Literal["exact"] = Field(description="names the verifier")
    ignore_case: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="compare without regard to upper and lower case"
    )


class RegexVerifier(Strict):
    """Right when the pattern matches; with a group named `answer`, that group must equal the reference."""

    kind: Literal["regex"] = Field(description="names the verifier")
    pattern: str = Field(description="Python regular expression, searched in the whole answer")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        if len(pattern) > _MAX_PATTERN:
            raise ValueError(f"a regular expression of more than {_MAX_PATTERN:,} characters")
        try:
            re.compile(pattern)
        except RecursionError:
            raise ValueError("not a regular expression: nested too deeply") from None
        except (re.error, OverflowError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class NumberVerifier(Strict):
    """Right when the final number equals the reference's final number (after `####` where there is one)."""

    kind: Literal["number"] = Field(description="names the verifier")
    tolerance: Weight = Field(default=0.0, description="largest absolute difference that still counts")


class JsonVerifier(Strict):
    """Right when the answer is JSON and equal to the reference, key order and white space apart."""

    kind: Literal["json"] = Field(description="names the verifier")
    schema_file: str | None = Field(
        default=None, description="JSON Schema file; then the answer must satisfy it and needs no reference"
    )


class UserVerifier(Strict):
    """A function `(answer: str, reference: str | None) -> float` in [0, 1], named in `allow_code`."""

    kind: Literal["user"] = Field(description="names the verifier")
    function: FunctionPath = Field(description="the function, as it stands in `allow_code`")


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
