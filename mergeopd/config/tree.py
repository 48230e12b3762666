"""A document as a tree in which every key and value has a source location."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeopd.errors import Location

Keys = tuple[str | int, ...]
"""A path into a document: `("prompts", 0, "source")`."""

Value = None | bool | int | float | str


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """Location of a node, and the absolute folder to which relative paths in it are relative."""

    location: Location
    base: Path


@dataclass(frozen=True, slots=True)
class Scalar:
    value: Value
    place: SourceLocation


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of a mapping with its value."""

    key: SourceLocation
    node: Node


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping, in source order."""

    entries: Mapping[str, Entry]
    place: SourceLocation


@dataclass(frozen=True, slots=True)
class Items:
    nodes: tuple[Node, ...]
    place: SourceLocation


Node = Scalar | Table | Items

Expand = Callable[[Keys, Any], Any]
"""Expands a short form at a path to its full form; returns other values unchanged."""


def plain(node: Node) -> Any:
    """Convert a tree to dicts, lists and values."""
    match node:
        case Table():
            return {name: plain(entry.node) for name, entry in node.entries.items()}
        case Items():
            return [plain(item) for item in node.nodes]
        case Scalar():
            return node.value


def from_plain(value: Any, place: SourceLocation) -> Node:
    """Convert dicts, lists and values to a tree in which every node has the same location."""
    if isinstance(value, dict):
        return Table({str(k): Entry(place, from_plain(v, place)) for k, v in value.items()}, place)
    if isinstance(value, list | tuple):
        return Items(tuple(from_plain(item, place) for item in value), place)
    return Scalar(value, place)


def child(node: Node, step: str | int) -> Node | None:
    """Return the value under a key or an index, None if there is none."""
    if isinstance(node, Table) and isinstance(step, str):
        entry = node.entries.get(step)
        return entry.node if entry else None
    if isinstance(node, Items) and isinstance(step, int) and 0 <= step < len(node.nodes):
        return node.nodes[step]
    return None


def find(root: Node, path: Keys, *, key: bool = False) -> SourceLocation:
    """Return the location of the value at `path` (with `key`: of its key).

    A missing value is located at its nearest existing parent: at that parent's key, or at its value if it is
    a short form. A name in a list of names is located at its entry.
    """
    node, key_place = root, root.place
    for step in path:
        below = child(node, step)
        if isinstance(node, Items) and isinstance(step, str):
            below = next((n for n in node.nodes if isinstance(n, Scalar) and n.value == step), None)
        if below is None:
            return key_place if isinstance(node, Table) else node.place
        key_place = node.entries[str(step)].key if isinstance(node, Table) else below.place
        node = below
    return key_place if key else node.place


def expanded(node: Node, path: Keys, expand: Expand) -> Node:
    """Expand the short form at `path`. Raises the ValueError of an invalid one."""
    return from_plain(expand(path, plain(node)), node.place)


def merged(base: Table, over: Table, expand: Expand, path: Keys = ()) -> Table:
    """Merge `over` onto `base`: mappings key by key, anything else is replaced."""
    entries = dict(base.entries)
    for name, entry in over.entries.items():
        entries[name] = entry
        if isinstance(entry.node, Table) and name in base.entries:
            below = base.entries[name].node
            if not isinstance(below, Table):
                below = expanded(below, (*path, name), expand)
            if isinstance(below, Table):
                node = merged(below, entry.node, expand, (*path, name))
                entries[name] = Entry(entry.key, node)
    return Table(entries, over.place)


def without_removed(before: Table, root: Table, named: Sequence[str]) -> Table:
    """Drop the entries of named sections that `before` has and `root` sets to null."""
    entries = dict(root.entries)
    for section in named:
        old, new = child(before, section), child(root, section)
        if isinstance(old, Table) and isinstance(new, Table):
            kept = {
                name: entry
                for name, entry in new.entries.items()
                if name not in old.entries or plain(entry.node) is not None
            }
            entries[section] = Entry(entries[section].key, Table(kept, new.place))
    return Table(entries, root.place)
