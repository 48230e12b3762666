"""The schema in plain words: what is expected at a place, what was found, what is allowed."""

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
    """The alternatives of a schema, references followed; a union by a tag stays one alternative."""
    if "$ref" in schema:
        yield from options(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    elif "anyOf" in schema:
        for part in schema["anyOf"]:
            yield from options(part, root)
    else:
        yield schema


def tagged(schema: Schema, root: Schema) -> Schema | None:
    """The alternative that is a union by a tag (`kind`), None if there is none."""
    return next((option for option in options(schema, root) if "discriminator" in option), None)


def below(schema: Schema, step: str | int, root: Schema) -> Schema | None:
    """The schema of the value under a key or an index, None where the schema knows none."""
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
    """The keys that a mapping may have here."""
    return tuple(key for option in options(schema, root) for key in option.get("properties", {}))


def literals(schema: Schema, root: Schema) -> tuple[str, ...]:
    """The fixed texts that may stand here."""
    found: list[str] = []
    for option in options(schema, root):
        values = option.get("enum", [option["const"]] if "const" in option else [])
        found += [value for value in values if isinstance(value, str)]
        if "discriminator" in option:
            found += list(option["discriminator"]["mapping"])
    return tuple(dict.fromkeys(found))


def purpose(schema: Schema, root: Schema) -> str:
    """What a value is for: its own description, that of its model, or what it looks like."""
    if "description" in schema:
        return str(schema["description"])
    for option in options(schema, root):
        if "description" in option:
            return str(option["description"]).split("\n")[0].rstrip(".")
    return expected(schema, root)


def expected(schema: Schema, root: Schema) -> str:
    """`a number >= 0`, `student, teacher, dataset or a mapping with on_policy_fraction and otherwise`."""
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
    return []  # null: how to leave something out is by not writing it


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


def found(value: Any) -> str:
    """A value from a YAML file, as messages show it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
        case dict():
            return "a mapping" if value else "an empty mapping"
        case list():
            return (
                f"a list with {len(value)} {'entry' if len(value) == 1 else 'entries'}"
                if value
                else "an empty list"
            )
        case _:
            return str(value)
