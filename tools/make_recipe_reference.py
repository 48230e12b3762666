"""Write docs/recipe.md, the reference of recipes and teacher cards, from the schema's descriptions.

Examples come from recipe_examples.yaml beside this file.

python tools/make_recipe_reference.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from mergeopd.config.schema import model_schema
from mergeopd.config.values import (
    ANY_NAME_PATTERN,
    DIGEST_PATTERN,
    FUNCTION_PATTERN,
    GPUS_PATTERN,
    NAME_PATTERN,
    REVISION_PATTERN,
    VARIABLE_PATTERN,
    Strict,
)
from mergeopd.recipe.models import TeacherCard
from mergeopd.recipe.schema import Recipe

EXAMPLES: Mapping[str, str] = YAML(typ="safe").load(Path(__file__).with_name("recipe_examples.yaml"))
OUT = Path(__file__).parents[1] / "docs" / "recipe.md"
INTRODUCTION = """\
# Recipe reference

Generated from the schema in `mergeopd/recipe/` by `tools/make_recipe_reference.py`; do not edit by hand.
[Writing recipes](writing-recipes.md) explains how the parts work together.

Rules for all files:

- **Strict types**: unknown keys are errors, a quoted number is text, and a boolean is not a number.
- **Paths** are relative to the project folder: the parent of the nearest folder named `recipes` (`teachers`
  for a card) above the file that contains the path, or else that file's own folder. `~` is the home folder.
- **Models** are folders, or hub ids that are in the local cache. Nothing is downloaded.
- **`extends: other.yaml`** at the top of a recipe uses another recipe, relative to this file, as its base. In
  a list, later entries win. Mappings are merged key by key; lists and values are replaced.
- **`${NAME}`** and `${NAME:-default}` are replaced by environment variables; `$${` is a literal `${`.
- **`--set key.path=value`** on the command line overrides the file. List entries are addressed by index:
  `--set phases.1.updates=40`.
- A **name** consists of letters, digits, `_`, `.` and `-`; a **function** is `package.module:function`.
"""

Schema = Mapping[str, Any]


def reference() -> str:
    """Return the whole document."""
    parts = [INTRODUCTION, *_document(Recipe, "Recipe", ""), *_document(TeacherCard, "Teacher card", "card:")]
    return "\n".join(parts)


def _document(model: type[Strict], title: str, prefix: str) -> Iterator[str]:
    """Yield the sections of a file format: its top level, then its definitions in order of first mention."""
    root = model_schema(model)
    definitions: Mapping[str, Schema] = root.get("$defs", {})
    places: dict[str, list[str]] = {}
    _visit(root, "", definitions, places)
    yield _section(title, root, [], prefix, EXAMPLES.get(model.__name__))
    for name, where in places.items():
        kind = definitions[name]["properties"].get("kind", {}).get("const")
        heading = f"`{where[0]}`" + (f" of kind `{kind}`" if kind else "")
        yield _section(heading, definitions[name], where[1:], name, EXAMPLES.get(name))


def _visit(
    schema: Schema, path: str, definitions: Mapping[str, Schema], places: dict[str, list[str]]
) -> None:
    """Collect the paths at which each definition is used."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        places.setdefault(name, []).append(path)
        _visit(definitions[name], path, definitions, places)
    for key, below in schema.get("properties", {}).items():
        _visit(below, f"{path}.{key}" if path else key, definitions, places)
    for below in schema.get("patternProperties", {}).values():
        _visit(below, f"{path}.NAME", definitions, places)
    if "items" in schema:
        _visit(schema["items"], f"{path}[]", definitions, places)
    for below in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        _visit(below, path, definitions, places)


def _section(heading: str, schema: Schema, elsewhere: list[str], anchor: str, example: str | None) -> str:
    lines = [f"## {heading}", ""]
    if anchor:
        lines.insert(0, f'<a id="{anchor.rstrip(":")}"></a>\n')
    also = f" Also at {', '.join(f'`{path}`' for path in elsewhere)}." if elsewhere else ""
    lines += [
        _joined(schema["description"]) + also,
        "",
        "| key | value | default | meaning |",
        "|---|---|---|---|",
    ]
    required = schema.get("required", ())
    for key, value in schema["properties"].items():
        default = "**required**" if key in required else _default(value["default"])
        cells = (f"`{key}`", _value(value), default, _joined(value["description"]))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    if example is not None:
        lines += ["", "```yaml", *example.splitlines(), "```"]
    return "\n".join([*lines, ""])


def _joined(text: str) -> str:
    return " ".join(text.split())


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return "its defaults" if value else "`{}`"
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def _value(schema: Schema) -> str:
    """Describe the accepted values in words."""
    if "$ref" in schema:
        return f"[mapping](#{schema['$ref'].removeprefix('#/$defs/')})"
    if "discriminator" in schema:
        kinds = schema["discriminator"]["mapping"].items()
        links = ", ".join(f"[`{kind}`](#{ref.removeprefix('#/$defs/')})" for kind, ref in kinds)
        return f"mapping of kind {links}"
    if "anyOf" in schema:
        # Where null is the default, it equals leaving the key out.
        null = {"type": "null"} if schema.get("default", "") is None else None
        return " or ".join(_value(option) for option in schema["anyOf"] if option != null)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if "patternProperties" in schema:
        (below,) = schema["patternProperties"].values()
        return f"{{name: {_value(below)}, ...}}"
    if "prefixItems" in schema:
        return f"[{', '.join(_value(item) for item in schema['prefixItems'])}]"
    if "items" in schema:
        return f"list of {_value(schema['items'])}"
    return _scalar(schema)


def _scalar(schema: Schema) -> str:
    if schema["type"] == "string":
        names = {
            None: "text",
            NAME_PATTERN: "name",
            ANY_NAME_PATTERN: "name",
            REVISION_PATTERN: "revision",
            FUNCTION_PATTERN: "function",
            DIGEST_PATTERN: "digest",
            VARIABLE_PATTERN: "variable",
            GPUS_PATTERN: "GPUs",
        }
        return names[schema.get("pattern")]
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    # A limit of 2^63 is left out: no user needs larger numbers.
    limits = [limit for limit in limits if "e+18" not in limit]
    return f"{schema['type']} {', '.join(limits)}".rstrip()


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
