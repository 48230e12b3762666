"""`--set a.b=c`: set one value of a recipe on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mergeopd.config.locate import dotted
from mergeopd.config.parse import parse
from mergeopd.config.tree import Entry, Expand, Items, Keys, Node, Scalar, SourceLocation, Table, expanded
from mergeopd.errors import Problem

_FORM = re.compile(r"\s*([^=\s]+?)\s*=(.*)", re.DOTALL)


class _RefusedError(ValueError):
    """An override names a path that cannot exist. Arguments: the path, the cause, the remedy."""


def apply_override(
    root: Table, text: str, where: SourceLocation, env: Mapping[str, str], expand: Expand
) -> tuple[Table, tuple[Problem, ...]]:
    """Set one value: `optimizer.lr=1e-5`, `prompts.0.share=2` or `prompts[0].share=2`; the value is YAML.

    New keys are added without a check; the schema rejects unknown ones later. Short forms along the path are
    expanded first. On failure, the unchanged tree is returned with the problem.
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
        path, *texts = refused.args
        return root, (Problem(where.location, dotted(path), *texts),)
    assert isinstance(changed, Table)
    return changed, ()


def _set(
    node: Node, steps: list[str], path: Keys, value: Node, where: SourceLocation, expand: Expand
) -> Node:
    if not steps:
        return value
    if not isinstance(node, Table) and not (isinstance(node, Items) and steps[0].isdecimal()):
        node = _expanded(node, path, expand)
    if isinstance(node, Items):
        index = int(steps[0]) if steps[0].isdecimal() else -1
        if not 0 <= index < len(node.nodes):
            last = len(node.nodes) - 1
            remedy = f"use 0 to {last}" if last > 0 else "use 0" if last == 0 else "the list is empty"
            raise _RefusedError(path, f"this list has no entry '{steps[0]}'", remedy)
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
    # The key keeps its location; only a replaced value is located on the command line.
    return Table({**node.entries, name: Entry(entry.key if rest else where, below)}, node.place)


def _key(node: Table, steps: list[str]) -> tuple[str, list[str]]:
    """Split off the longest existing key; names may contain dots."""
    for length in range(len(steps), 0, -1):
        if (name := ".".join(steps[:length])) in node.entries:
            return name, steps[length:]
    return steps[0], steps[1:]


def _expanded(node: Node, path: Keys, expand: Expand) -> Node:
    """Expand a short form to its mapping, and an empty value to an empty mapping."""
    if isinstance(node, Scalar) and node.value is None:
        return Table({}, node.place)
    try:
        long = expanded(node, path, expand)
    except ValueError as error:
        raise _RefusedError(path, str(error)) from None
    if isinstance(long, Scalar):
        raise _RefusedError(path, f"the value {long.value!r} has no keys")
    return long
