"""Load a recipe file, the recipes it extends and `--set` overrides into one tree with source locations.

`extends: other.yaml` (or a list; later ones win) takes another recipe as the base: mappings are merged key
by key, lists and values are replaced. It is relative to the file that contains it. `--set` overrides all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeopd.config.folders import project_folder
from mergeopd.config.locate import dotted
from mergeopd.config.overrides import apply_override
from mergeopd.config.parse import parse
from mergeopd.config.suggest import closest_path
from mergeopd.config.tree import (
    Expand,
    Items,
    Keys,
    Node,
    Scalar,
    SourceLocation,
    Table,
    merged,
    without_removed,
)
from mergeopd.errors import Location, Problem
from mergeopd.messages import shown

Shorthands = Mapping[tuple[str, ...], Callable[[Any], Any]]
YAML_SUFFIXES = (".yaml", ".yml")
MAX_BYTES = 1 << 20  # parsing takes seconds per mebibyte
MAX_FILES = 100
_SCAFFOLDS = {  # by `marker`
    "recipes": "start from the recipe that `mergeopd new recipe NAME` writes",
    "teachers": "start from the card that `mergeopd new teacher NAME --model DIR` writes",
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded document. `root` is None when nothing could be read.

    `complete` is False when a file could not be read, so that absent keys must not be reported as missing.
    """

    root: Table | None
    problems: tuple[Problem, ...]
    complete: bool = True


def load(
    path: Path, overrides: Sequence[str], env: Mapping[str, str], shorthands: Shorthands, named: Sequence[str]
) -> Loaded:
    """Load a document and the documents it extends. Problems are returned, never raised.

    `shorthands` maps a path pattern (`*` is any name or index) to the function that expands its short form.
    `named` are the sections in which null removes an entry of an extended document.
    """
    expand = _expander(shorthands)
    loaded = _Documents(env, expand, named).extended(path, ())
    if loaded.root is None:
        return loaded
    root, problems = loaded.root, list(loaded.problems)
    for number, text in enumerate(overrides, start=1):
        where = SourceLocation(Location(f"--set #{number}"), project_folder(path, "recipes"))
        changed, new_problems = apply_override(root, text, where, env, expand)
        root = without_removed(root, changed, named)
        problems += new_problems
    return Loaded(root, tuple(problems), loaded.complete)


def load_card(path: Path, env: Mapping[str, str], prefix: Keys) -> Loaded:
    """Load a teacher card. `prefix` is its path in the recipe, used in problems."""
    return _read(path, env, "teachers", prefix)


def _expander(shorthands: Shorthands) -> Expand:
    """Return a function that expands short forms (`teachers.math: card.yaml` is `{card: card.yaml}`)."""

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


def _bytes(path: Path) -> bytes | None:
    """Read up to one byte more than a file may have; None for a pipe or a device, which may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return None
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _read(path: Path, env: Mapping[str, str], marker: str, prefix: Keys = ()) -> Loaded:
    """Read one file without the files it extends. `marker` is the argument of `project_folder`."""
    try:
        data = _bytes(path)
    except FileNotFoundError:
        near = closest_path(path.name, path.parent, suffixes=YAML_SUFFIXES)
        remedy = f"did you mean '{shown(path.parent / near)}'?" if near else ""
        return _failed(path, prefix, "no such file", remedy)
    except IsADirectoryError:
        return _failed(path, prefix, "this is a folder", "name a YAML file")
    except OSError as error:
        return _failed(path, prefix, f"cannot be read: {error.strerror}")
    if data is None:
        return _failed(path, prefix, "this is a pipe, a device or a socket", "name a YAML file")
    if len(data) > MAX_BYTES:
        return _failed(path, prefix, f"larger than {MAX_BYTES >> 20} MiB", "name a YAML file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        message = f"not UTF-8 text: byte 0x{data[error.start]:02X}"
        return _failed(path, prefix, message, "save the file as UTF-8", line, column)
    where = SourceLocation(Location(shown(path)), project_folder(path, marker))
    root, problems = parse(text, where, env, prefix=prefix)
    if root is None:
        if problems:
            return Loaded(None, problems, complete=False)
        return _failed(path, prefix, "the file is empty", _SCAFFOLDS[marker])
    if not isinstance(root, Table):
        at = root.place.location
        kind = "a list" if isinstance(root, Items) else f"the value {root.value!r}"
        message = f"expected keys with values at the top, found {kind}"
        return _failed(path, prefix, message, "", at.line, at.column)
    return Loaded(root, problems)


class _Documents:
    """Documents with the documents they extend. Each file is read once."""

    def __init__(self, env: Mapping[str, str], expand: Expand, named: Sequence[str]) -> None:
        self._env = env
        self._expand = expand
        self._named = named
        self._loaded: dict[Path, Loaded] = {}
        self._num_bytes = 0

    def extended(self, path: Path, above: tuple[Path, ...]) -> Loaded:
        """Return a recipe merged onto the recipes it extends; `above` are the files that extend it."""
        file = _absolute(path)
        if file not in self._loaded:
            self._loaded[file] = _read(path, self._env, "recipes")
            self._loaded[file] = self._merged(self._loaded[file], path, (*above, file))
        return self._loaded[file]

    def _merged(self, loaded: Loaded, path: Path, chain: tuple[Path, ...]) -> Loaded:
        if loaded.root is None or "extends" not in loaded.root.entries:
            return loaded
        entries = dict(loaded.root.entries)
        written = entries.pop("extends").node
        own = Table(entries, loaded.root.place)
        problems, complete = list(loaded.problems), True
        base: Table | None = None
        for item in written.nodes if isinstance(written, Items) else (written,):
            below = self._base(item, path, chain)
            problems += below.problems
            complete = complete and below.complete
            if below.root is not None:
                base = below.root if base is None else self._on(base, below.root)
        root = own if base is None else self._on(base, own)
        return Loaded(root, tuple(dict.fromkeys(problems)), complete)

    def _on(self, base: Table, over: Table) -> Table:
        return without_removed(base, merged(base, over, self._expand), self._named)

    def _base(self, item: Node, path: Path, chain: tuple[Path, ...]) -> Loaded:
        """Load one recipe named under `extends`."""

        def failed(message: str, remedy: str = "") -> Loaded:
            problem = Problem(item.place.location, "extends", message, remedy)
            return Loaded(None, (problem,), complete=False)

        if not isinstance(item, Scalar) or not isinstance(item.value, str):
            return failed("expected the path of a recipe, or a list of them")
        base = path.parent / os.path.expanduser(item.value)
        file = _absolute(base)
        if file in chain:
            circle = [*chain[chain.index(file) :], file]
            return failed(f"extends itself: {' -> '.join(shown(f) for f in circle)}", "remove one of them")
        if not os.path.isfile(base):
            near = closest_path(item.value, path.parent, suffixes=YAML_SUFFIXES)
            return failed(f"unknown recipe '{item.value}'", f"did you mean '{near}'?" if near else "")
        if file not in self._loaded:
            self._num_bytes += os.path.getsize(base)
            if len(self._loaded) == MAX_FILES or self._num_bytes > MAX_BYTES:
                message = f"a recipe can extend at most {MAX_FILES} files and {MAX_BYTES >> 20} MiB"
                return failed(message, "extend fewer recipes")
        return self.extended(base, chain)
