"""`--set a.b=c`: one value of a recipe, given on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mergeopd.config.locate import dotted
from mergeopd.config.parse import parse
from mergeopd.config.tree import (
    Entry,
    Expand,
    Items,
    Keys,
    Node,
    Scalar,
    SourceLocation,
    Table,
    plain,
    planted,
)
from mergeopd.errors import Problem

_FORM = re.compile(r"\s*([^=\s]+?)\s*=(.*)", re.DOTALL)


class _RefusedError(ValueError):
    """The path of an override leads nowhere: message and remedy."""

    def __init__(self, path: Keys, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.message = message
        self.remedy = remedy


def apply(
    root: Table, text: str, where: SourceLocation, env: Mapping[str, str], expand: Expand
) -> tuple[Table, tuple[Problem, ...]]:
    """Sets one value: `optimizer.lr=1e-5`, `prompts.0.share=2` or `prompts[0].share=2`; the value is YAML.

    A new key is simply added: the schema decides whether it may exist. A short form on the way is written out
    first. Returns the tree as it was together with the problem when that cannot be done.
    """
    form = _FORM.fullmatch(text)
    steps = re.sub(r"\[(\d+)\]", r".\1", form[1]).split(".") if form else []
    if form is None or not all(steps):
        remedy = "write it as key=value, for example optimizer.lr=1e-5"
        return root, (Problem(where.location, "", f"cannot read {text!r}", remedy),)
    value, problems = parse(form[2], where, env, fixed=True)
    if problems:
        return root, problems
    try:
        changed = _set(root, steps, (), value or Scalar(None, where), where, expand)
    except _RefusedError as refused:
        return root, (Problem(where.location, dotted(refused.path), refused.message, refused.remedy),)
    assert isinstance(changed, Table)
    return changed, ()


def _set(
    node: Node, steps: list[str], path: Keys, value: Node, where: SourceLocation, expand: Expand
) -> Node:
    if not steps:
        return value
    if not isinstance(node, Table) and not (isinstance(node, Items) and steps[0].isdecimal()):
        node = _written_out(node, path, expand)
    if isinstance(node, Items):
        index = int(steps[0]) if steps[0].isdecimal() else -1
        if not 0 <= index < len(node.nodes):
            last = len(node.nodes) - 1
            remedy = f"use 0 to {last}" if last > 0 else "use 0" if last == 0 else "the list is empty"
            raise _RefusedError(path, f"'{steps[0]}' is no entry of this list", remedy)
        below = _set(node.nodes[index], steps[1:], (*path, index), value, where, expand)
        return Items((*node.nodes[:index], below, *node.nodes[index + 1 :]), node.place)
    assert isinstance(node, Table)
    name, rest = _key(node, steps)
    entry = node.entries.get(name)
    if entry is None:
        for step in reversed(rest):
            value = Table({step: Entry(where, value)}, where)
        return Table({**node.entries, name: Entry(where, value)}, node.place)
    below = _set(entry.node, rest, (*path, name), value, where, expand)
    # The key stays where it was written; only a replaced value stands on the command line.
    return Table({**node.entries, name: Entry(entry.key if rest else where, below)}, node.place)


def _key(node: Table, steps: list[str]) -> tuple[str, list[str]]:
    """Names may contain dots: the longest key that exists wins."""
    for length in range(len(steps), 0, -1):
        if (name := ".".join(steps[:length])) in node.entries:
            return name, steps[length:]
    return steps[0], steps[1:]


def _written_out(node: Node, path: Keys, expand: Expand) -> Node:
    """A short form as the mapping that it stands for; an empty value as an empty mapping."""
    if isinstance(node, Scalar) and node.value is None:
        return Table({}, node.place)
    try:
        long = planted(expand(path, plain(node)), node.place)
    except ValueError as error:
        raise _RefusedError(path, str(error)) from None
    if isinstance(long, Scalar):
        raise _RefusedError(path, f"this is the value {long.value!r}, it has no keys")
    return long
