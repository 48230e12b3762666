"""Describe schemas and values in plain words, for messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergeopd.config.schema import Schema
from mergeopd.config.values import FUNCTION_PATTERN, NAME_PATTERN, REVISION_PATTERN
from mergeopd.messages import joined

_PATTERNS = {
    NAME_PATTERN: "a name (letters, digits, _ . -)",
    REVISION_PATTERN: "a branch, a tag or a commit",
    FUNCTION_PATTERN: "a function as package.module:function",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def options(schema: Schema) -> Iterator[Schema]:
    """Yield the alternatives of a schema. A tagged union is one alternative."""
    if "anyOf" not in schema:
        yield schema
    for part in schema.get("anyOf", ()):
        yield from options(part)


def discriminator(schema: Schema) -> tuple[str, Mapping[str, Schema]]:
    """Return the tag (`kind`) of a tagged union and its branches; empty if no alternative is one."""
    for option in options(schema):
        if "discriminator" in option:
            return option["discriminator"]["propertyName"], option["discriminator"]["mapping"]
    return "", {}


def below(schema: Schema, step: str | int) -> Schema | None:
    """Return the schema of the value under a key or an index, None if the schema defines none."""
    for option in options(schema):
        if isinstance(step, int):
            if step < len(option.get("prefixItems", ())):
                return dict(option["prefixItems"][step])
            if "items" in option:
                return dict(option["items"])
        elif step in option.get("properties", {}):
            return dict(option["properties"][step])
        else:
            for pattern, part in option.get("patternProperties", {}).items():
                if re.fullmatch(pattern, step):
                    return dict(part)
    return None


def allowed_keys(schema: Schema) -> tuple[str, ...]:
    """Return the keys that a mapping may have here."""
    return tuple(key for option in options(schema) for key in option.get("properties", {}))


def literals(schema: Schema) -> tuple[str, ...]:
    """Return the literal strings that are allowed here."""
    allowed: list[str] = []
    for option in options(schema):
        values = option.get("enum", [option["const"]] if "const" in option else [])
        allowed += [value for value in values if isinstance(value, str)]
    return tuple(dict.fromkeys((*allowed, *discriminator(schema)[1])))


def purpose(schema: Schema) -> str:
    """Describe a value by its own description, that of its model, or its expected form."""
    for part in (schema, *options(schema)):
        if "description" in part:
            return str(part["description"]).split("\n")[0].rstrip(".")
    return expected(schema)


def expected(schema: Schema) -> str:
    """Describe the accepted values: `a number >= 0`, `student, teacher or a mapping with otherwise`."""
    words = dict.fromkeys(word for option in options(schema) for word in _words(option))
    return joined(tuple(words), "or")


def _words(option: Schema) -> list[str]:
    if "const" in option or "enum" in option:
        return [str(value) for value in option.get("enum", [option.get("const")])]
    if "discriminator" in option:
        return [f"a mapping with {option['discriminator']['propertyName']}"]
    kind = option.get("type")
    if kind in ("integer", "number"):
        return [("a whole number" if kind == "integer" else "a number") + _range(option)]
    if kind == "string":
        return [_PATTERNS.get(option.get("pattern", ""), "text")]
    if kind == "boolean":
        return ["true or false"]
    if kind == "array":
        return [f"a list of {len(option['prefixItems'])} values" if "prefixItems" in option else "a list"]
    if kind == "object":
        required = option.get("required", [])
        if "oneOf" in option:  # one of several keys
            return [f"a mapping with {joined([part['required'][0] for part in option['oneOf']], 'or')}"]
        return [f"a mapping with {joined(required, 'and')}" if required else "a mapping"]
    return []  # null: messages suggest leaving the key out instead


def _range(option: Schema) -> str:
    ends = [
        f"{sign} {option[key]:{'d' if isinstance(option[key], int) else 'g'}}"
        for key, sign in _BOUNDS.items()
        if key in option
    ]
    return f" {' and '.join(ends)}" if ends else ""


def value_text(value: Any) -> str:
    """Format a value from a YAML file for messages."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
        case dict():
            return "a mapping" if value else "an empty mapping"
        case []:
            return "an empty list"
        case list():
            return f"a list with {len(value)} {'entry' if len(value) == 1 else 'entries'}"
        case _:
            return str(value)
