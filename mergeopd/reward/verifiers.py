"""Verifiers: functions from a response, and a reference if needed, to a reward in [0, 1]."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import (
    ExactVerifier,
    JsonVerifier,
    MathVerifier,
    NumberVerifier,
    RegexVerifier,
    UserVerifier,
    Verifier,
    pattern_problem,
)
from mergeopd.reward.numbers import final_number, last_boxed, reference_number
from mergeopd.strict_json import finite, is_equal, parse_json


class Verify(Protocol):
    """Function from a response to a reward in [0, 1]."""

    def __call__(self, response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        """Verify one response; `truncated`: it ended at the length limit."""


_MAX_SCHEMA_BYTES = 1_000_000
_FENCE = re.compile(r"^[ \t]*```(?P<language>[^\n`]*)$", re.MULTILINE)


def build_verifier(spec: Verifier, allow_code: Collection[str]) -> Verify:
    """Build the function that `spec` describes.

    Raises VerifierError for an invalid schema, and for a function that is not in `allow_code` or cannot be
    imported. The verifier raises it for a missing or unusable reference.
    """
    return BUILDERS[spec.kind](spec, allow_code)


def reference_problem(spec: Verifier, reference: str) -> str | None:
    """Return why no response can match `reference`; None if one can."""
    if isinstance(spec, NumberVerifier) and reference_number(reference) is None:
        return f"the reference {_short(reference)} is not one number"
    if isinstance(spec, JsonVerifier) and spec.schema_file is None:
        try:
            parse_json(reference)
        except (ValueError, RecursionError) as error:
            return f"the reference {_short(reference)} is not JSON: {error}"
    return None


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else f"{text[: limit - 3]}...")


def _required(kind: str, reference: str | None) -> str:
    if reference is None:
        raise VerifierError(
            f"verifier {kind!r} needs a reference, and the prompt has none; see reference_field"
        )
    return reference


# --------------------------------------------------------------------------------- exact, regex, number


def _build_exact(spec: ExactVerifier, allow_code: Collection[str]) -> Verify:
    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        a, b = response.strip(), _required("exact", reference).strip()
        return float(a.casefold() == b.casefold() if spec.ignore_case else a == b)

    return verify


def _build_regex(spec: RegexVerifier, allow_code: Collection[str]) -> Verify:
    pattern = re.compile(spec.pattern)
    compares = "answer" in pattern.groupindex

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        expected = _required("regex", reference).strip() if compares else ""
        match = pattern.search(response)
        if match is None or not compares:
            return float(match is not None)
        answer = match["answer"]
        return float(answer is not None and answer.strip() == expected)

    return verify


def _build_number(spec: NumberVerifier, allow_code: Collection[str]) -> Verify:
    tolerance = Fraction(repr(spec.tolerance))  # 0.1 is exactly one tenth

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        text = _required("number", reference)
        expected = reference_number(text)
        if expected is None:
            raise VerifierError(
                f"verifier 'number': {reference_problem(spec, text)}; correct the prompt file"
            )
        number = final_number(response, truncated=truncated)
        return float(number is not None and abs(number - expected) <= tolerance)

    return verify


# ------------------------------------------------------------------------------------------------- json


def _build_json(spec: JsonVerifier, allow_code: Collection[str]) -> Verify:
    if spec.schema_file is not None:
        return _build_json_schema(Path(spec.schema_file))

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        text = _required("json", reference)
        try:
            expected = parse_json(text)
        except (ValueError, RecursionError):
            raise VerifierError(f"verifier 'json': {reference_problem(spec, text)}") from None
        try:
            return float(is_equal(_answer_json(response), expected))
        except (ValueError, RecursionError):
            return 0.0

    return verify


def _build_json_schema(path: Path) -> Verify:
    import jsonschema
    import referencing.exceptions

    try:
        content = path.read_bytes()
        if len(content) > _MAX_SCHEMA_BYTES:
            raise VerifierError(f"{path}: {len(content):,} bytes are too many for a JSON Schema")
        schema = json.loads(content)
        if not isinstance(schema, dict | bool):
            raise VerifierError(f"{path}: not a JSON Schema: it must be an object, or true or false")
        for pattern in _patterns(schema):
            problem = pattern_problem(pattern)
            if problem is not None:
                raise VerifierError(f"{path}: pattern {_short(pattern)}: {problem}")
        validator_class = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        validator_class.check_schema(schema)
    except OSError as error:
        raise VerifierError(f"{path}: the JSON Schema cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise VerifierError(f"{path}: not JSON: {error}") from error
    except jsonschema.SchemaError as error:
        raise VerifierError(f"{path}: not a JSON Schema: {error.json_path}: {error.message}") from error
    # With an empty registry, a $ref to a web address is not fetched.
    validator = validator_class(schema, registry=referencing.Registry())

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        try:
            return float(validator.is_valid(_answer_json(response, finite)))
        except referencing.exceptions.Unresolvable as error:
            raise VerifierError(
                f"{path}: $ref {error.ref!r} is not in the file; copy it into $defs"
            ) from error
        except (ValueError, RecursionError):
            return 0.0

    return verify


def _patterns(schema: object) -> Iterator[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _patterns(item)
    elif isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        if isinstance(schema.get("patternProperties"), dict):
            yield from schema["patternProperties"]
        for item in schema.values():
            yield from _patterns(item)


def _answer_json(response: str, parse_float: Callable[[str], Any] = Decimal) -> Any:
    """Parse the whole response, or else its last fenced block (```json or bare), or raise ValueError."""
    try:
        return parse_json(response, parse_float)
    except ValueError:
        fences = list(_FENCE.finditer(response))
        # Fences come in pairs; an odd one at the end was truncated by the length limit.
        for opening, closing in reversed(list(zip(fences[::2], fences[1::2], strict=False))):
            if opening["language"].strip().lower() in ("", "json"):
                return parse_json(response[opening.end() : closing.start()], parse_float)
        raise


# ------------------------------------------------------------------------------------------------- math


def _build_math(spec: MathVerifier, allow_code: Collection[str]) -> Verify:
    from math_verify import parse
    from math_verify import verify as equal

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        text = _required("math", reference).strip()
        boxed = last_boxed(text)
        written = text.rpartition("####")[2].strip() if boxed is None else f"\\boxed{{{boxed}}}"
        # The library's time limit uses signals; the worker process has its own.
        expected = parse(written if "$" in written or boxed else f"${written}$", parsing_timeout=None)
        if not expected:
            raise VerifierError(f"the reference {_short(text)} is not a mathematical expression")
        answer = last_boxed(response)
        if answer is None and truncated:
            return 0.0
        parsed = parse(response if answer is None else f"\\boxed{{{answer}}}", parsing_timeout=None)
        return float(equal(expected, parsed, timeout_seconds=None))

    return verify


# ------------------------------------------------------------------------------------------------- user


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
        "exact": _build_exact,
        "regex": _build_regex,
        "number": _build_number,
        "json": _build_json,
        "math": _build_math,
        "user": _build_user,
    }
)
