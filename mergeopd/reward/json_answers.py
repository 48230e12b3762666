"""The verifier of JSON, against a reference or a schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import JsonVerifier, pattern_problem
from mergeopd.reward.protocol import Verify, fenced_blocks, required, short
from mergeopd.strict_json import finite, is_equal, parse_json

_MAX_SCHEMA_BYTES = 1_000_000


def json_problem(spec: JsonVerifier, reference: str) -> str | None:
    """Return why a reference is not JSON."""
    if spec.schema_file is None:
        try:
            parse_json(reference)
        except (ValueError, RecursionError) as error:
            return f"the reference {short(reference)} is not JSON: {error}"
    return None


def build_json(spec: JsonVerifier, allow_code: Collection[str]) -> Verify:
    if spec.schema_file is not None:
        return _build_json_schema(Path(spec.schema_file))

    def verify(response: str, reference: str | None, /, *, truncated: bool = False) -> float:
        text = required("json", reference)
        try:
            expected = parse_json(text)
        except (ValueError, RecursionError):
            raise VerifierError(f"verifier 'json': {json_problem(spec, text)}") from None
        try:
            return float(is_equal(_answer_json(response), expected))
        except (ValueError, RecursionError):
            return 0.0

    return verify


def _build_json_schema(path: Path) -> Verify:
    import referencing.exceptions

    try:
        content = path.read_bytes()
        if len(content) > _MAX_SCHEMA_BYTES:
            raise VerifierError(f"{path}: {len(content):,} bytes are too many for a JSON Schema")
        schema = json.loads(content)
    except OSError as error:
        raise VerifierError(f"{path}: the JSON Schema cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise VerifierError(f"{path}: not JSON: {error}") from error
    validator = schema_validator(schema, str(path))

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


def schema_validator(schema: Any, place: str) -> Any:
    """Return jsonschema's validator of a schema. Raises VerifierError that begins with `place`."""
    import jsonschema
    import referencing

    try:
        if not isinstance(schema, dict | bool):
            raise VerifierError(f"{place}: not a JSON Schema: it must be an object, or true or false")
        for pattern in _patterns(schema):
            problem = pattern_problem(pattern)
            if problem is not None:
                raise VerifierError(f"{place}: pattern {short(pattern)}: {problem}")
        validator_class = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        validator_class.check_schema(schema)
    except RecursionError as error:
        raise VerifierError(f"{place}: not JSON: {error}") from error
    except jsonschema.SchemaError as error:
        raise VerifierError(f"{place}: not a JSON Schema: {error.json_path}: {error.message}") from error
    # With an empty registry, a $ref to a web address is not fetched.
    return validator_class(schema, registry=referencing.Registry())


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
        for language, content in reversed(fenced_blocks(response)):
            if language in ("", "json"):
                return parse_json(content, parse_float)
        raise
