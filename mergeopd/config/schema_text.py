"""Describe schemas and values in plain words, for messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mergeopd.config.schema import Schema
from mergeopd.config.values import FUNCTION_PATTERN, NAME_PATTERN, REVISION_PATTERN
from mergeopd.messages import joined

_PATTERNS = {
    NAME_PATTERN: "a name (letters, digits, _ . -)",
    REVISION_PATTERN: "a branch, a tag or a commit",
    FUNCTION_PATTERN: "a function as package.module:function",
}


def options(schema: Schema, root: Schema) -> Iterator[Schema]:
    """Yield the alternatives of a schema, with references resolved. A tagged union is one alternative."""
    if "$ref" in schema:
        yield from options(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    elif "anyOf" in schema:
        for part in schema["anyOf"]:
            yield from options(part, root)
    else:
        yield schema


def tagged(schema: Schema, root: Schema) -> Schema | None:
    """Return the alternative that is a tagged union (by `kind`), None if there is none."""
    return next((option for option in options(schema, root) if "discriminator" in option), None)


def below(schema: Schema, step: str | int, root: Schema) -> Schema | None:
    """Return the schema of the value under a key or an index, None if the schema defines none."""
    for option in options(schema, root):
        if isinstance(step, int):
            if "prefixItems" in option and step < len(option["prefixItems"]):
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


def allowed_keys(schema: Schema, root: Schema) -> tuple[str, ...]:
    """Return the keys that a mapping may have here."""
    return tuple(key for option in options(schema, root) for key in option.get("properties", {}))


def literals(schema: Schema, root: Schema) -> tuple[str, ...]:
    """Return the literal strings that are allowed here."""
    allowed: list[str] = []
    for option in options(schema, root):
        values = option.get("enum", [option["const"]] if "const" in option else [])
        allowed += [value for value in values if isinstance(value, str)]
        if "discriminator" in option:
            allowed += list(option["discriminator"]["mapping"])
    return tuple(dict.fromkeys(allowed))


def purpose(schema: Schema, root: Schema) -> str:
    """Describe a value by its own description, that of its model, or its expected form."""
    if "description" in schema:
        return str(schema["description"])
    for option in options(schema, root):
        if "description" in option:
            return str(option["description"]).split("\n")[0].rstrip(".")
    return expected(schema, root)


def expected(schema: Schema, root: Schema) -> str:
    """Describe the accepted values: `a number >= 0`, `student, teacher or a mapping with otherwise`."""
    words: list[str] = []
    for option in options(schema, root):
        for word in _words(option):
            if word not in words:
                words.append(word)
    return joined(words, "or")


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
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
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
