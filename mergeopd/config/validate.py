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
from mergeopd.config.schema import Schema, input_schema
from mergeopd.config.schema_text import (
    allowed_keys,
    below,
    discriminator,
    expected,
    literals,
    options,
    purpose,
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
    hints: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Problem, ...]:
    """Validate `data` as a `model` and return one problem per mistake.

    Args:
        prefix: the path of `data` in the recipe.
        complete: False if parts of the document could not be read; missing keys are then not reported.
        also_allowed: top-level keys that are not fields of the model (`extends`).
        hints: remedies for unknown keys and choices, by `word` or, in one section only, by `section.word`.
    """
    try:
        model.model_validate(data)
    except ValidationError as error:
        root = _At((), input_schema(model), data)
        findings = [_finding(e, root, also_allowed, hints) for e in error.errors(include_url=False)]
    else:
        return ()
    return tuple(
        origins.problem((*prefix, *f.path), f.message, f.remedy, key=f.on_key)
        for f in _without_echoes([f for f in findings if f is not None])
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
class _At:
    """A value with its path and schema."""

    path: Keys
    schema: Schema
    value: Any


def _follow(loc: tuple[int | str, ...], root: _At) -> tuple[_At, _At, list[tuple[_At, bool]]]:
    """Follow the `loc` of a pydantic error, which also contains tags and the labels of union branches.

    Return the value, its parent, and the unions on the path, each with whether the error is below it.
    """
    here = parent = root
    unions: list[tuple[_At, bool]] = []
    for number, step in enumerate(loc):
        if step in (branches := discriminator(here.schema)[1]):
            here = replace(here, schema=branches[str(step)])
            continue
        inside, known = _inside(here.value, step), below(here.schema, step)
        branch = next((o for o in options(here.schema) if o.get("type") == "object"), None)
        if not inside and known is None and branch is not None:
            # Neither in the data nor in the schema: a union branch label, or an invalid short form, expanded.
            unions.append((here, number < len(loc) - 1))
            here = replace(here, schema=branch)
            continue
        if not inside and known is not None and number < len(loc) - 1:  # a short form, expanded
            here = replace(here, schema=known)
            continue
        parent, here = here, _At((*here.path, step), known or {}, inside[0] if inside else None)
    return here, parent, unions


def _inside(value: Any, step: int | str) -> tuple[Any, ...]:
    """Return the value under a key or index as a tuple of one, empty if there is none."""
    if isinstance(value, dict):
        return (value[step],) if step in value else ()
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return (value[step],)
    return ()


def _finding(
    error: ErrorDetails, root: _At, also_allowed: tuple[str, ...], hints: Mapping[str, str]
) -> _Finding | None:
    """Convert one of pydantic's errors; None if it only repeats another."""
    kind, loc = error["type"], error["loc"]
    on_key = bool(loc) and loc[-1] == "[key]"
    here, parent, unions = _follow(loc[:-1] if on_key else loc, root)
    for union, is_deeper in unions:
        if not isinstance(union.value, dict):
            return _unexpected(union)
        if not is_deeper and kind != "value_error":
            return None  # another branch than the intended one
    if on_key:
        message = f"'{here.path[-1]}' is not a valid name"
        return _Finding(here.path, message, "use letters, digits, _ . -", on_key=True)
    if kind == "extra_forbidden":
        return _unknown_key(here, parent, also_allowed if len(here.path) == 1 else (), hints)
    if kind == "missing" and isinstance(parent.value, dict):
        return _missing_key(here.path, purpose(here.schema))
    if kind == "missing":  # too few entries in a list of fixed length
        return _unexpected(parent)
    if kind == "union_tag_invalid" and isinstance(here.value, dict):
        tag, branches = discriminator(here.schema)
        return _unexpected(_At((*here.path, tag), {"enum": list(branches)}, here.value[tag]))
    if kind == "union_tag_invalid":
        return _unexpected(replace(here, schema={"enum": literals(here.schema)}))
    if kind == "union_tag_not_found" and isinstance(here.value, dict):
        return _missing_tag(here)
    if kind == "value_error":
        return _Finding(here.path, str(error["ctx"]["error"]))
    if kind == "too_short" and here.value:
        return None  # pydantic counts valid entries only; the invalid ones have separate errors
    if kind == "too_short":
        return _Finding(here.path, f"expected at least one entry, found {value_text(here.value)}")
    finding = _unexpected(here)
    return finding if finding.remedy else replace(finding, remedy=_hint(here.path, here.value, hints))


def _hint(path: Keys, word: Any, hints: Mapping[str, str]) -> str:
    return (hints.get(f"{path[0]}.{word}") or hints.get(str(word), "")) if path else ""


def _missing_key(path: Keys, what_for: str) -> _Finding:
    name = str(path[-1])
    return _Finding(path, f"missing key '{name}'", f"add it: {what_for}", missing=name, on_key=True)


def _missing_tag(at: _At) -> _Finding:
    """Report a tagged union without its tag (`kind`) as misspelt or missing."""
    tag, branches = discriminator(at.schema)
    known = {key for branch in branches.values() for key in allowed_keys(branch)}
    near = closest(tag, [key for key in at.value if key not in known])
    if near is None:
        return _missing_key((*at.path, tag), joined(tuple(branches), "or"))
    remedy = f"did you mean '{tag}'?"
    return _Finding((*at.path, near), f"unknown key '{near}'", remedy, on_key=True, meant=tag)


def _unknown_key(at: _At, parent: _At, also_allowed: tuple[str, ...], hints: Mapping[str, str]) -> _Finding:
    name = str(at.path[-1])
    allowed = (*also_allowed, *allowed_keys(parent.schema))
    if hint := _hint(at.path, name, hints):
        meant = next((key for key in allowed if f"`{key}`" in hint), None)
    else:
        absent = [key for key in allowed if key not in parent.value]
        meant = closest(name, absent) or closest(name, allowed)
        hint = f"did you mean '{meant}'?" if meant else f"allowed here: {', '.join(allowed)}"
    return _Finding(at.path, f"unknown key '{name}'", hint, on_key=True, meant=meant)


def _unexpected(at: _At) -> _Finding:
    value, forms = at.value, list(options(at.schema))
    wanted = {form.get("type") for form in forms}
    remedy = ""
    if value is None:
        remedy = "give it a value, or leave the key out"
    elif isinstance(value, str):
        unquoted = _NUMBER.fullmatch(value) and wanted & {"integer", "number"}
        remedy = "write it without quotes" if unquoted else did_you_mean(value, literals(at.schema))
    elif isinstance(value, list) and any("patternProperties" in form for form in forms):
        first = next((entry for entry in value if isinstance(entry, str)), "")
        named = f"{PurePath(first).stem}: {first}" if first else "NAME: ..."
        remedy = f"name each entry: `{named}` instead of `- {first or '...'}`"
    elif wanted == {"string"} and not literals(at.schema) and isinstance(value, bool | int | float):
        remedy = "put it in quotes"
    return _Finding(at.path, f"expected {expected(at.schema)}, found {value_text(value)}", remedy)


def _without_echoes(findings: list[_Finding]) -> list[_Finding]:
    """Drop duplicates, and missing keys that are misspelt (all, if `extends` is misspelt)."""
    misspelt = {(f.path[:-1], f.meant) for f in findings if f.meant is not None}
    return [
        f
        for f in dict.fromkeys(findings)
        if f.missing is None or misspelt.isdisjoint({((), "extends"), (f.path[:-1], f.missing)})
    ]
