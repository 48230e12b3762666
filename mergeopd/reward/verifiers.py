"""Verifiers: functions from a response, and a reference if needed, to a reward in [0, 1]."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Collection, Sequence
from types import MappingProxyType
from typing import Any

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import CombinedVerifier, UserVerifier, Verifier
from mergeopd.reward.choices import build_choice, choice_problem
from mergeopd.reward.code import build_humaneval, build_python_tests, humaneval_problem, python_tests_problem
from mergeopd.reward.instructions import build_instructions, instructions_problem
from mergeopd.reward.json_answers import build_json, json_problem
from mergeopd.reward.protocol import Verify, reference_values
from mergeopd.reward.text_answers import (
    build_exact,
    build_math,
    build_number,
    build_regex,
    number_problem,
)
from mergeopd.reward.tool_calls import build_tool_call, tool_call_problem


def build_verifier(spec: Verifier, allow_code: Collection[str]) -> Verify:
    """Build the function that `spec` describes.

    Raises VerifierError for an invalid schema, for a function that is not in `allow_code` or cannot be
    imported, and where programs cannot be isolated. The verifier raises it for a missing or unusable
    reference.
    """
    return BUILDERS[spec.kind](spec, allow_code)


def reference_problem(spec: Verifier, reference: str) -> str | None:
    """Return why no response can match `reference`; None if one can."""
    if isinstance(spec, CombinedVerifier):
        problems = (
            f"verifier {each.verifier.kind!r}: {problem}"
            for each, part in zip(spec.of, _parts(spec, reference), strict=True)
            if part is not None and (problem := reference_problem(each.verifier, part))
        )
        return next(problems, None)
    find_problem = _PROBLEMS.get(spec.kind)
    return None if find_problem is None else find_problem(spec, reference)


def _build_combined(spec: CombinedVerifier, allow_code: Collection[str]) -> Verify:
    verifiers = [(build_verifier(each.verifier, allow_code), each.weight) for each in spec.of]
    total = sum(weight for _, weight in verifiers)

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        parts = [None] * len(verifiers) if reference is None else _parts(spec, reference)
        return sum(
            weight * one(response, part, truncated=truncated) / total
            for (one, weight), part in zip(verifiers, parts, strict=True)
        )

    return verify


def _parts(spec: CombinedVerifier, reference: str) -> Sequence[str | None]:
    """Return the reference of each verifier of a combination."""
    parts = reference_values(spec.kind, reference)
    if not isinstance(parts, list) or len(parts) != len(spec.of):
        raise VerifierError(f"verifier {spec.kind!r}: the reference is not a list of {len(spec.of)}")
    return [part if part is None or isinstance(part, str) else json.dumps(part) for part in parts]


def _build_user(spec: UserVerifier, allow_code: Collection[str]) -> Verify:
    name = spec.function
    if name not in allow_code:
        raise VerifierError(
            f"verifier function {name!r} is not allowed; add it to allow_code if you trust it"
        )
    function = _imported(name)

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        try:
            reward = function(response, reference)
        except Exception as error:
            raise VerifierError(
                f"verifier function {name!r} raised {type(error).__name__}: {error}"
            ) from error
        # An int is a valid float, as in typing; NaN fails the comparison.
        if not isinstance(reward, int | float) or not 0.0 <= reward <= 1.0:
            raise VerifierError(
                f"verifier function {name!r} returned {reward!r}; it must be a float in [0, 1]"
            )
        return float(reward)

    return verify


def _imported(name: str) -> Callable[[str, str | None], object]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise VerifierError(
            f"verifier function {name!r}: importing {module_name!r} raised {type(error).__name__}: {error}; "
            "the folder that holds it must be on PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise VerifierError(f"verifier function {name!r}: {module_name!r} has no function {attribute!r}")
    return function  # type: ignore[no-any-return]


BUILDERS: MappingProxyType[str, Callable[[Any, Collection[str]], Verify]] = MappingProxyType(
    {
        "exact": build_exact,
        "regex": build_regex,
        "number": build_number,
        "json": build_json,
        "math": build_math,
        "choice": build_choice,
        "instruction_following": build_instructions,
        "tool_call": build_tool_call,
        "python_tests": build_python_tests,
        "humaneval": build_humaneval,
        "user": _build_user,
        "combined": _build_combined,
    }
)
_PROBLEMS: MappingProxyType[str, Callable[[Any, str], str | None]] = MappingProxyType(
    {
        "number": number_problem,
        "json": json_problem,
        "choice": choice_problem,
        "instruction_following": instructions_problem,
        "tool_call": tool_call_problem,
        "python_tests": python_tests_problem,
        "humaneval": humaneval_problem,
    }
)
