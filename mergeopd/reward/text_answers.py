"""Verifiers that compare texts, numbers and expressions."""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import ExactVerifier, MathVerifier, NumberVerifier, RegexVerifier
from mergeopd.reward.numbers import final_number, last_boxed, reference_number
from mergeopd.reward.protocol import Verify, required, short


def build_exact(spec: ExactVerifier, allow_code: Collection[str]) -> Verify:
    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        a, b = response.strip(), required("exact", reference).strip()
        return float(a.casefold() == b.casefold() if spec.ignore_case else a == b)

    return verify


def build_regex(spec: RegexVerifier, allow_code: Collection[str]) -> Verify:
    pattern = re.compile(spec.pattern)
    compares = "answer" in pattern.groupindex

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        expected = required("regex", reference).strip() if compares else ""
        match = pattern.search(response)
        if match is None or not compares:
            return float(match is not None)
        answer = match["answer"]
        return float(answer is not None and answer.strip() == expected)

    return verify


def build_number(spec: NumberVerifier, allow_code: Collection[str]) -> Verify:
    tolerance = Fraction(repr(spec.tolerance))  # 0.1 is exactly one tenth

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        text = required("number", reference)
        expected = reference_number(text)
        if expected is None:
            raise VerifierError(f"verifier 'number': {number_problem(spec, text)}; correct the prompt file")
        number = final_number(response, truncated=truncated)
        return float(number is not None and abs(number - expected) <= tolerance)

    return verify


def number_problem(spec: NumberVerifier, reference: str) -> str | None:
    """Return why a reference is not one number."""
    return (
        None
        if reference_number(reference) is not None
        else f"the reference {short(reference)} is not one number"
    )


def build_math(spec: MathVerifier, allow_code: Collection[str]) -> Verify:
    from math_verify import parse
    from math_verify import verify as equal

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        text = required("math", reference).strip()
        boxed = last_boxed(text)
        written = text.rpartition("####")[2].strip() if boxed is None else f"\\boxed{{{boxed}}}"
        # The library's time limit uses signals; the worker process has its own.
        expected = parse(written if "$" in written or boxed else f"${written}$", parsing_timeout=None)
        if not expected:
            raise VerifierError(f"the reference {short(text)} is not a mathematical expression")
        answer = last_boxed(response)
        if answer is None and truncated:
            return 0.0
        parsed = parse(response if answer is None else f"\\boxed{{{answer}}}", parsing_timeout=None)
        return float(equal(expected, parsed, timeout_seconds=None))

    return verify
