"""Settings of verifiers, which grade responses."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator

from mergeopd.config.values import Flag, FunctionPath, Strict, Weight, kind_shorthand

MAX_PATTERN_LENGTH = 10_000

Timeout = Annotated[
    float,
    Field(
        gt=0.0,
        allow_inf_nan=False,
        strict=True,
        description="seconds per response, in a worker process; a response that takes longer has no reward",
    ),
]


def pattern_problem(pattern: str) -> str | None:
    """Return why a text is not a usable regular expression, or None."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"a regular expression of more than {MAX_PATTERN_LENGTH:,} characters"
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        return f"not a regular expression: {error}"
    except RecursionError:
        return "not a usable regular expression: groups are nested too deeply"
    return None


class ExactVerifier(Strict):
    """Correct when the response, stripped of surrounding white space, equals the reference."""

    kind: Literal["exact"] = Field(description="verifier kind")
    ignore_case: Flag = False
    """compare case-insensitively"""


class RegexVerifier(Strict):
    """Correct when the pattern matches; if it has a group named `answer`, that group must equal the
    reference.
    """

    kind: Literal["regex"] = Field(description="verifier kind")
    pattern: str = Field(description="Python regular expression, searched in the whole response")
    timeout_s: Timeout = 2.0

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        problem = pattern_problem(pattern)
        if problem is not None:
            raise ValueError(problem)
        return pattern


class NumberVerifier(Strict):
    """Correct when the final number equals the reference, which must be one number.

    The final number is that after `####`, else in `\\boxed{}`, else after "answer is", else the last one.
    Of a response that was cut off, only a complete `####` line or box counts.
    """

    kind: Literal["number"] = Field(description="verifier kind")
    tolerance: Weight = Field(default=0.0, description="largest absolute difference that counts as equal")


class JsonVerifier(Strict):
    """Correct when the response is JSON and equal to the reference, ignoring key order and white space."""

    kind: Literal["json"] = Field(description="verifier kind")
    schema_file: str | None = None
    """JSON Schema file; the response must then satisfy the schema, and no reference is needed"""
    timeout_s: Timeout = 2.0


class MathVerifier(Strict):
    """Correct when the response's answer equals the reference as a mathematical expression (math-verify).

    Requires `pip install 'mergeopd[math]'`.
    """

    kind: Literal["math"] = Field(description="verifier kind")
    timeout_s: Timeout = 5.0


class UserVerifier(Strict):
    """A function `(answer: str, reference: str | None) -> float` in [0, 1], listed in `allow_code`."""

    kind: Literal["user"] = Field(description="verifier kind")
    function: FunctionPath = Field(description="function path, as listed in `allow_code`")
    timeout_s: Timeout = 10.0


IsolatedVerifier = RegexVerifier | JsonVerifier | MathVerifier | UserVerifier
"""Verifiers that run in worker processes, because patterns and code may not terminate."""

Verifier = Annotated[
    ExactVerifier | RegexVerifier | NumberVerifier | JsonVerifier | MathVerifier | UserVerifier,
    Field(discriminator="kind"),
]


KINDS: tuple[str, ...] = tuple(
    get_args(model.model_fields["kind"].annotation)[0] for model in get_args(get_args(Verifier)[0])
)
"""Values of `verifier.kind`."""


_ShortKind = Literal["exact", "number", "json", "math"]  # those that need no settings
VerifierOrKind = Annotated[
    Verifier, BeforeValidator(kind_shorthand, json_schema_input_type=_ShortKind | Verifier)
]
