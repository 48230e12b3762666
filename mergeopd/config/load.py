"""A recipe file, what it extends and what the command line sets, as one located tree.

`extends: other.yaml` (or a list; later ones win) takes another recipe as the base: mappings are merged key
by key, lists and values are replaced. It is relative to the file that contains it. `--set` wins over all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeopd.config.folders import project_folder
from mergeopd.config.locate import dotted
from mergeopd.config.overrides import apply
from mergeopd.config.parse import parse
from mergeopd.config.suggest import closest_path
from mergeopd.config.tree import Expand, Items, Keys, Node, Place, Scalar, Table, merged
from mergeopd.errors import Location, Problem
from mergeopd.messages import shown

Shorthands = Mapping[tuple[str, ...], Callable[[Any], Any]]
YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A document. `root` is None when nothing could be read.

    `complete` is False when a part is missing because a file could not be read: what is absent from the tree
    may then well have been written.
    """

    root: Table | None
    problems: tuple[Problem, ...]
    complete: bool = True


def load(path: Path, overrides: Sequence[str], env: Mapping[str, str], shorthands: Shorthands) -> Loaded:
    """Load a document with what it extends; every problem found is in the result, nothing is raised.

    `shorthands` maps a path pattern (`*` is any name or index) to the function that writes a short form out.
    """
    expand = _expander(shorthands)
    loaded = _extended(path, env, (), expand)
    if loaded.root is None:
        return loaded
    root, problems = loaded.root, list(loaded.problems)
    for number, text in enumerate(overrides, start=1):
        where = Place(Location(f"--set #{number}"), project_folder(path, "recipes"))
        root, found = apply(root, text, where, env, expand)
        problems += found
    return Loaded(root, tuple(problems), loaded.complete)


def load_card(path: Path, env: Mapping[str, str], prefix: Keys) -> Loaded:
    """Loads a teacher card; `prefix` is its path in the recipe, for the names in problems."""
    return _read(path, env, "teachers", prefix)


def _expander(shorthands: Shorthands) -> Expand:
    """A function that writes a short form out (`teachers.math: card.yaml` is `{card: card.yaml}`)."""

    def expanded(path: Keys, value: Any) -> Any:
        for pattern, expand in shorthands.items():
            if len(pattern) == len(path) and all(p in ("*", s) for p, s in zip(pattern, path, strict=True)):
                return expand(value)
        return value

    return expanded


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _failed(
    path: Path, prefix: Keys, message: str, remedy: str = "", line: int = 0, column: int = 0
) -> Loaded:
    location = Location(shown(path), line, column)
    return Loaded(None, (Problem(location, dotted(prefix), message, remedy),), complete=False)


def _read(path: Path, env: Mapping[str, str], marker: str, prefix: Keys = ()) -> Loaded:
    """One file, without what it extends; `marker` names the folder kind that its paths start beside."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        near = closest_path(path.name, path.parent, suffixes=YAML_SUFFIXES)
        remedy = f"did you mean '{shown(path.parent / near)}'?" if near else ""
        return _failed(path, prefix, "no such file", remedy)
    except IsADirectoryError:
        return _failed(path, prefix, "this is a folder", "name a YAML file")
    except OSError as error:
        return _failed(path, prefix, f"cannot be read: {error.strerror}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        message = f"not UTF-8 text: byte 0x{data[error.start]:02X}"
        return _failed(path, prefix, message, "save the file as UTF-8", line, column)
    where = Place(Location(shown(path)), project_folder(path, marker))
    root, problems = parse(text, where, env, prefix=prefix)
    if root is None:
        return (
            Loaded(None, problems, complete=False) if problems else _failed(path, prefix, "the file is empty")
        )
    if not isinstance(root, Table):
        at = root.place.location
        kind = "a list" if isinstance(root, Items) else f"the value {root.value!r}"
        message = f"expected keys with values at the top, found {kind}"
        return _failed(path, prefix, message, "", at.line, at.column)
    return Loaded(root, problems)


def _extended(path: Path, env: Mapping[str, str], above: tuple[Path, ...], expand: Expand) -> Loaded:
    """A recipe on top of what it extends; `above` are the files that led here."""
    loaded = _read(path, env, "recipes")
    if loaded.root is None or "extends" not in loaded.root.entries:
        return loaded
    entries = dict(loaded.root.entries)
    written = entries.pop("extends").node
    own = Table(entries, loaded.root.place)
    problems, complete = list(loaded.problems), True
    chain = (*above, _absolute(path))
    base: Node | None = None
    for item in written.nodes if isinstance(written, Items) else (written,):
        below = _base(item, path, env, chain, expand)
        problems += below.problems
        complete = complete and below.complete
        if below.root is not None:
            base = below.root if base is None else merged(base, below.root, expand)
    root = own if base is None else merged(base, own, expand)
    assert isinstance(root, Table)
    return Loaded(root, tuple(problems), complete)


def _base(item: Node, path: Path, env: Mapping[str, str], chain: tuple[Path, ...], expand: Expand) -> Loaded:
    """One recipe named under `extends`."""

    def failed(message: str, remedy: str = "") -> Loaded:
        return Loaded(None, (Problem(item.place.location, "extends", message, remedy),), complete=False)

    if not isinstance(item, Scalar) or not isinstance(item.value, str):
        return failed("expected the path of a recipe, or a list of them")
    base = path.parent / os.path.expanduser(item.value)
    if _absolute(base) in chain:
        circle = [*chain[chain.index(_absolute(base)) :], _absolute(base)]
        return failed(f"extends itself: {' -> '.join(shown(file) for file in circle)}", "remove one of them")
    if not os.path.isfile(base):
        near = closest_path(item.value, path.parent, suffixes=YAML_SUFFIXES)
        return failed(f"unknown recipe '{item.value}'", f"did you mean '{near}'?" if near else "")
    return _extended(base, env, chain, expand)
