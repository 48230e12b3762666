"""JSON Schema of recipes and teacher cards, for editors (`docs/schema/`) and for `mergeopd schema`.

The first line of a recipe references it: `# yaml-language-server: $schema=../docs/schema/recipe.schema.json`.
"""

from __future__ import annotations

import copy

from mergeopd.config.schema import DIALECT, Schema, mapped, model_schema
from mergeopd.recipe.models import TeacherCard
from mergeopd.recipe.schema import NAMED, Recipe

_VARIABLE: Schema = {
    "type": "string",
    "pattern": r"\$\{",
    "description": "environment variable: ${NAME} or ${NAME:-default}",
}
_EXTENDS: Schema = {
    "description": "recipe or recipes to build on, relative to this file; later ones win, this file over all",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def recipe_schema() -> Schema:
    """Return the JSON Schema of a recipe file. Recipes with `extends` have no required keys."""
    schema = copy.deepcopy(model_schema(Recipe))
    defs: Schema = schema.pop("$defs")
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    partial = _partial(schema, defs)
    for section in NAMED:
        for name, entry in partial["properties"][section]["patternProperties"].items():
            removed = {"type": "null", "description": "remove the entry of the extended recipe"}
            partial["properties"][section]["patternProperties"][name] = {"anyOf": [entry, removed]}
    document = {
        "$schema": DIALECT,
        "title": "mergeopd recipe",
        "description": schema["description"],
        "type": "object",
        "if": {"required": ["extends"]},
        "then": {"$ref": "#/$defs/ExtendingRecipe"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": {**defs, "Recipe": schema, "ExtendingRecipe": partial},
    }
    document["$defs"] = {name: _with_variables(part) for name, part in sorted(document["$defs"].items())}
    document["$defs"]["Variable"] = _VARIABLE
    return document


def card_schema() -> Schema:
    """Return the JSON Schema of a teacher card."""
    schema = _with_variables(copy.deepcopy(model_schema(TeacherCard)))
    defs = {**schema["$defs"], "Variable": _VARIABLE}
    return {**schema, "$schema": DIALECT, "title": "mergeopd teacher card", "$defs": defs}


def _with_variables(schema: Schema) -> Schema:
    """Also allow `${VARIABLE}` for every typed value, except for discriminating tags."""
    if schema.get("type") not in ("integer", "number", "boolean") and not schema.keys() & {"enum", "pattern"}:
        return mapped(schema, _with_variables)
    outer: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in outer}
    return {**outer, "anyOf": [inner, {"$ref": "#/$defs/Variable"}]}


def _partial(schema: Schema, defs: Schema) -> Schema:
    """Make all keys optional, down to lists, where merging stops.

    Adds optional variants of the referenced definitions to `defs`, as `Partial<Name>`.
    """
    # `oneOf` without a tag requires one of several keys.
    demands = {"required"} if "discriminator" in schema else {"required", "oneOf"}
    part = {key: value for key, value in schema.items() if key not in demands}
    for key in ("properties", "patternProperties"):
        if key in part:
            part[key] = {name: _partial(below, defs) for name, below in part[key].items()}
    if "anyOf" in part:
        part["anyOf"] = [_partial(below, defs) for below in part["anyOf"]]
    if "$ref" in part:
        name = part["$ref"].removeprefix("#/$defs/")
        target = defs[name]
        variant = _partial(target, defs)
        if variant != target:
            defs[f"Partial{name}"] = variant
            part["$ref"] = f"#/$defs/Partial{name}"
    return part
