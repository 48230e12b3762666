"""JSON Schemas of strict models, used by messages and by editors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from mergeopd.config.values import Strict

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"


@cache
def model_schema(model: type[Strict]) -> Schema:
    """Return the JSON Schema of a model's input, short forms included. Cached: do not modify it."""
    return tidied(model.model_json_schema(mode="validation"))


def input_schema(model: type[Strict]) -> Schema:
    """Return `model_schema` with every reference replaced by the definition that it names."""
    schema = model_schema(model)
    return _inlined(schema, schema["$defs"])


def _inlined(schema: Schema, defs: Schema) -> Schema:
    if "$ref" in schema:
        target = _inlined(defs[schema["$ref"].removeprefix("#/$defs/")], defs)
        return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    result = mapped(schema, lambda part: _inlined(part, defs))
    if "discriminator" in schema:
        mapping = schema["discriminator"]["mapping"]
        branches = {tag: _inlined({"$ref": target}, defs) for tag, target in mapping.items()}
        result["discriminator"] = {**schema["discriminator"], "mapping": branches}
    return result


def mapped(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """Return a copy of a schema with `change` applied to every schema directly below it."""
    result = dict(schema)
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs"):
            result[key] = {name: change(part) for name, part in value.items()}
        elif key in ("anyOf", "oneOf", "prefixItems"):
            result[key] = [change(part) for part in value]
        elif key == "items":
            result[key] = change(value)
    return result


def tidied(schema: Schema) -> Schema:
    """Drop pydantic's titles and the line breaks of fields' docstrings; forbid keys that match no pattern."""
    tidy = mapped({key: value for key, value in schema.items() if key != "title"}, tidied)
    for field in tidy.get("properties", {}).values():
        if "description" in field:
            field["description"] = " ".join(field["description"].split())
    return {**tidy, "additionalProperties": False} if "patternProperties" in tidy else tidy
