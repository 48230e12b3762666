"""JSON Schemas of strict models, used by messages and by editors."""

from __future__ import annotations

from functools import cache
from typing import Any

from mergeopd.config.values import Strict

Schema = dict[str, Any]


@cache
def model_schema(model: type[Strict]) -> Schema:
    """Return the JSON Schema of a model's input, short forms included. Cached: do not modify it."""
    schema: Schema = _tidied(model.model_json_schema(mode="validation"))
    return schema


def input_schema(model: type[Strict]) -> Schema:
    """Return `model_schema` with every reference replaced by the definition that it names."""
    schema = model_schema(model)
    inlined: Schema = _inlined(schema, schema["$defs"])
    return inlined


def _inlined(schema: Any, defs: Schema) -> Any:
    if isinstance(schema, list):
        return [_inlined(part, defs) for part in schema]
    if isinstance(schema, str) and schema.startswith("#/$defs/"):  # in the mapping of a tagged union
        return _inlined(defs[schema.removeprefix("#/$defs/")], defs)
    if not isinstance(schema, dict):
        return schema
    target = _inlined(schema["$ref"], defs) if "$ref" in schema else {}
    own = {key: _inlined(part, defs) for key, part in schema.items() if key not in ("$ref", "$defs")}
    return {**target, **own}


def _tidied(schema: Any) -> Any:
    """Drop pydantic's titles and the line breaks of fields' docstrings; forbid keys that match no pattern."""
    if isinstance(schema, list):
        return [_tidied(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    tidy = {
        key: {name: _tidied(part) for name, part in value.items()}
        if key in ("properties", "$defs", "patternProperties")
        else _tidied(value)
        for key, value in schema.items()
        if key != "title"
    }
    for field in tidy.get("properties", {}).values():
        if "description" in field:
            field["description"] = " ".join(field["description"].split())
    if "patternProperties" in tidy:
        tidy["additionalProperties"] = False
    return tidy
