"""Convert pydantic's validation errors to problems with plain messages and source locations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mergeopd.config.locate import Origins
from mergeopd.config.schema import Schema, model_schema
from mergeopd.config.schema_text import (
    allowed_keys,
    below,
    expected,
    literals,
    options,
    purpose,
    tagged,
    value_text,
)
from mergeopd.config.suggest import closest, did_you_mean
from mergeopd.config.tree import Keys
from mergeopd.config.values import Strict
from mergeopd.errors import Problem
from mergeopd.messages import joined

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def problems_of(
    model: type[Strict],
    data: Any,
    origins: Origins,
    prefix: Keys = (),
    *,
    complete: bool = True,
    also_allowed: tuple[str, ...] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
    hints: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Problem, ...]:
    """Validate `data` as a `model` and return one problem per mistake.

    Args:
        prefix: the path of `data` in the recipe.
        complete: False if parts of the document could not be read; missing keys are then not reported.
        also_allowed: top-level keys that are not fields of the model (`extends`).
        renamed: new names of keys from earlier versions.
        hints: remedies for unknown keys and choices, by `word` or, in one section only, by `section.word`.
    """
    try:
        model.model_validate(data)
    except ValidationError as error:
        findings = [
            _finding(e, model, data, also_allowed, renamed, hints) for e in error.errors(include_url=False)
        ]
    else:
        return ()
    kept = _without_echoes([f for f in findings if f is not None])
    return tuple(
        origins.problem((*prefix, *f.path), f.message, f.remedy, key=f.on_key)
        for f in kept
        if complete or f.missing is None
    )


@dataclass(frozen=True)
class _Finding:
    path: Keys
    message: str
    remedy: str = ""
    on_key: bool = False
    missing: str | None = None
    meant: str | None = None  # for an unknown key: the most similar known one


@dataclass(frozen=True)
class _Union:
    """A union on an error's path; `deeper`: the error is below it, not at it."""

    path: Keys
    schema: Schema
    value: Any
    deeper: bool


@dataclass(frozen=True)
class _Spot:
    """Position of a pydantic error: its `loc` without tags and union branch labels."""

    path: Keys
    schema: Schema
    value: Any
    parent: Schema
    parent_value: Any
    unions: tuple[_Union, ...]


def _spot(loc: tuple[int | str, ...], root: Schema, data: Any) -> _Spot:
    path: list[int | str] = []
    schema = parent = root
    value = parent_value = data
    unions: list[_Union] = []
    for number, step in enumerate(loc):
        union = tagged(schema, root)
        if union is not None and step in union["discriminator"]["mapping"]:
            schema = {"$ref": union["discriminator"]["mapping"][step]}
            continue
        inside, known = _inside(value, step), below(schema, step, root)
        branch = next((o for o in options(schema, root) if o.get("type") == "object"), None)
        if not inside and known is None and branch is not None:
            # Neither in the data nor in the schema: a union branch label, or an invalid short form, expanded.
            unions.append(_Union(tuple(path), schema, value, number < len(loc) - 1))
            schema = branch
            continue
        path.append(step)
        parent, parent_value = schema, value
        schema, value = known or {}, inside[0] if inside else None
    return _Spot(tuple(path), schema, value, parent, parent_value, tuple(unions))


def _inside(value: Any, step: int | str) -> tuple[Any, ...]:
    """Return the value under a key or index as a tuple of one, empty if there is none."""
    if isinstance(value, dict) and step in value:
        return (value[step],)
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return (value[step],)
    return ()


def _finding(
    error: ErrorDetails,
    model: type[Strict],
    data: Any,
    also_allowed: tuple[str, ...],
    renamed: Mapping[str, str],
    hints: Mapping[str, str],
) -> _Finding | None:
    """Convert one of pydantic's errors; None if it only repeats another."""
    root, kind, loc = model_schema(model), error["type"], error["loc"]
    on_key = bool(loc) and loc[-1] == "[key]"
    spot = _spot(loc[:-1] if on_key else loc, root, data)
    for union in spot.unions:
        if not isinstance(union.value, dict):
            return _unexpected(union.path, union.schema, union.value, root)
        if not union.deeper and kind != "value_error":
            return None  # another branch than the intended one
    if on_key:
        message = f"'{spot.path[-1]}' is not a valid name"
        return _Finding(spot.path, message, "use letters, digits, _ . -", on_key=True)
    if kind == "extra_forbidden":
        return _unknown_key(spot, root, also_allowed if len(spot.path) == 1 else (), renamed, hints)
    if kind == "missing" and isinstance(spot.parent_value, dict):
        return _missing_key(spot.path, purpose(spot.schema, root))
    if kind == "missing":  # too few entries in a list of fixed length
        return _unexpected(spot.path[:-1], spot.parent, spot.parent_value, root)
    if kind == "union_tag_invalid" and isinstance(spot.value, dict):
        union_schema = tagged(spot.schema, root) or {}
        tag = union_schema["discriminator"]["propertyName"]
        return _unexpected((*spot.path, tag), {"enum": literals(union_schema, root)}, spot.value[tag], root)
    if kind == "union_tag_invalid":
        return _unexpected(spot.path, {"enum": literals(spot.schema, root)}, spot.value, root)
    if kind == "union_tag_not_found" and isinstance(spot.value, dict):
        return _missing_tag(spot, root)
    if kind == "value_error":
        return _Finding(spot.path, str(error["ctx"]["error"]))
    if kind == "too_short" and spot.value:
        return None  # pydantic counts valid entries only; the invalid ones have separate errors
    if kind == "too_short":
        return _Finding(spot.path, f"expected at least one entry, found {value_text(spot.value)}")
    finding = _unexpected(spot.path, spot.schema, spot.value, root)
    return finding if finding.remedy else replace(finding, remedy=_hint(spot.path, spot.value, hints))


def _hint(path: Keys, word: Any, hints: Mapping[str, str]) -> str:
    return (hints.get(f"{path[0]}.{word}") or hints.get(str(word), "")) if path else ""


def _missing_key(path: Keys, what_for: str) -> _Finding:
    name = str(path[-1])
    return _Finding(path, f"missing key '{name}'", f"add it: {what_for}", missing=name, on_key=True)


def _missing_tag(spot: _Spot, root: Schema) -> _Finding:
    """Report a tagged union without its tag (`kind`) as misspelt or missing."""
    union = tagged(spot.schema, root) or {}
    tag = union["discriminator"]["propertyName"]
    known = {key for branch in union["oneOf"] for key in allowed_keys(branch, root)}
    near = closest(tag, [key for key in spot.value if key not in known])
    if near is None:
        return _missing_key((*spot.path, tag), joined(literals(union, root), "or"))
    remedy = f"did you mean '{tag}'?"
    return _Finding((*spot.path, near), f"unknown key '{near}'", remedy, on_key=True, meant=tag)


def _unknown_key(
    spot: _Spot,
    root: Schema,
    also_allowed: tuple[str, ...],
    renamed: Mapping[str, str],
    hints: Mapping[str, str],
) -> _Finding:
    name = str(spot.path[-1])
    message = f"unknown key '{name}'"
    allowed = (*also_allowed, *allowed_keys(spot.parent, root))
    if hint := _hint(spot.path, name, hints):
        meant = next((key for key in allowed if f"`{key}`" in hint), None)
        return _Finding(spot.path, message, hint, on_key=True, meant=meant)
    meant = renamed.get(name)
    if meant not in allowed:
        absent = [key for key in allowed if key not in spot.parent_value]
        meant = closest(name, absent) or closest(name, allowed)
    remedy = f"did you mean '{meant}'?" if meant else f"allowed here: {', '.join(allowed)}"
    return _Finding(spot.path, message, remedy, on_key=True, meant=meant)


def _unexpected(path: Keys, schema: Schema, value: Any, root: Schema) -> _Finding:
    wanted = {option.get("type") for option in options(schema, root)}
    remedy = ""
    if value is None:
        remedy = "give it a value, or leave the key out"
    elif isinstance(value, str):
        unquoted = _NUMBER.fullmatch(value) and wanted & {"integer", "number"}
        remedy = "write it without quotes" if unquoted else did_you_mean(value, literals(schema, root))
    elif isinstance(value, list) and any("patternProperties" in o for o in options(schema, root)):
        first = next((entry for entry in value if isinstance(entry, str)), "")
        named = f"{PurePath(first).stem}: {first}" if first else "NAME: ..."
        remedy = f"name each entry: `{named}` instead of `- {first or '...'}`"
    elif wanted == {"string"} and not literals(schema, root) and isinstance(value, bool | int | float):
        remedy = "put it in quotes"
    return _Finding(path, f"expected {expected(schema, root)}, found {value_text(value)}", remedy)


def _without_echoes(findings: list[_Finding]) -> list[_Finding]:
    """Drop duplicates, and missing keys that are misspelt (all, if `extends` is misspelt)."""
    misspelt = {(f.path[:-1], f.meant) for f in findings if f.meant is not None}
    return [
        f
        for f in dict.fromkeys(findings)
        if f.missing is None or misspelt.isdisjoint({((), "extends"), (f.path[:-1], f.missing)})
    ]
