"""Parse YAML 1.2 to a tree with source locations: no custom tags, no duplicate keys, variables substituted.

A scalar that is a single `${VARIABLE}` is typed as if its value were written unquoted: `lr: ${LR}` is a
number. Force text with `!!str`. Inside `{...}` and `[...]` YAML needs quotes around `${VARIABLE}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode
from ruamel.yaml.reader import ReaderError

from mergeopd.config.locate import dotted
from mergeopd.config.tree import Entry, Items, Keys, Node, Scalar, SourceLocation, Table, Value
from mergeopd.config.variables import fill
from mergeopd.config.yaml_errors import syntax_mistake
from mergeopd.errors import Location, Problem

_TAG = "tag:yaml.org,2002:"
# Dates, and `=` from YAML 1.1, are text in a recipe.
_TEXT_TAGS = {_TAG + "str", _TAG + "timestamp", _TAG + "value"}
_TAGGED = re.compile(r"(&\S+\s+)?!")
# Aliases can expand a short text without bound.
MAX_VALUES = 100_000
MAX_DEPTH = 100
_MAX_INT_BITS = 1024
_SIMPLE_TAGS = {_TAG + "int", _TAG + "float", _TAG + "bool", _TAG + "null"}


def parse(
    text: str, where: SourceLocation, env: Mapping[str, str], *, prefix: Keys = (), fixed: bool = False
) -> tuple[Node | None, tuple[Problem, ...]]:
    """Parse one document.

    Args:
        where: the file; with `fixed`, the location given to every node (an override).
        prefix: the path of this document in the recipe, used in problems.

    Returns:
        The tree (None if the text is empty or not YAML) and all problems.
    """
    yaml = YAML(typ="safe", pure=True)
    parser = _Parser(yaml, text, where, env, fixed, prefix)
    try:
        root = yaml.compose(text)
        node = None if root is None else parser.convert(root, prefix)
    except (RecursionError, _UnboundedError) as error:
        reason = str(error) if isinstance(error, _UnboundedError) else "nested too deeply"
        return None, (Problem(where.location, dotted(prefix), f"not a recipe: {reason}"),)
    except MarkedYAMLError as error:
        return None, (parser.broken(error),)
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1
        place = where if fixed else parser.place_at(line, column)
        message = f"not valid YAML: control character U+{error.character:04X}"
        return None, (Problem(place.location, dotted(prefix), message, "remove it"),)
    except YAMLError as error:
        return None, (Problem(where.location, dotted(prefix), f"not valid YAML: {error}"),)
    return node, tuple(parser.problems)


class _UnboundedError(ValueError):
    """The document exceeds `MAX_VALUES` or `MAX_DEPTH`."""


@dataclass
class _Parser:
    yaml: YAML
    text: str
    where: SourceLocation
    env: Mapping[str, str]
    fixed: bool
    prefix: Keys
    problems: list[Problem] = field(default_factory=list)
    open_nodes: set[int] = field(default_factory=set)
    num_values: int = 0

    def place_at(self, line: int, column: int) -> SourceLocation:
        return SourceLocation(Location(self.where.location.file, line, column), self.where.base)

    def place(self, node: YamlNode) -> SourceLocation:
        if self.fixed:
            return self.where
        return self.place_at(node.start_mark.line + 1, node.start_mark.column + 1)

    def report(self, place: SourceLocation, path: Keys, message: str, remedy: str = "") -> None:
        self.problems.append(Problem(place.location, dotted(path), message, remedy))

    def broken(self, error: MarkedYAMLError) -> Problem:
        (mark, cause, remedy), place = syntax_mistake(error, self.text), self.where
        if mark is not None and not self.fixed:
            place = self.place_at(mark.line + 1, mark.column + 1)
        return Problem(place.location, dotted(self.prefix), f"not valid YAML: {cause}", remedy)

    def convert(self, node: YamlNode, path: Keys) -> Node:
        place = self.place(node)
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise _UnboundedError(f"more than {MAX_VALUES:,} values, with aliases expanded")
        if len(path) > MAX_DEPTH:
            raise _UnboundedError(f"nested more than {MAX_DEPTH} levels deep")
        if id(node) in self.open_nodes:
            self.report(place, path, "this alias contains itself", "write the value out")
            return Scalar(None, place)
        if isinstance(node, ScalarNode):
            return self.scalar(node, place, path)
        kind = "map" if isinstance(node, MappingNode) else "seq"
        if str(node.tag) != _TAG + kind:
            self.report(place, path, f"unknown YAML tag '{_shown(str(node.tag))}'", "remove it")
        self.open_nodes.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return Table(self.entries(node, path), place)
            items = tuple(self.convert(item, (*path, i)) for i, item in enumerate(node.value))
            return Items(items, place)
        finally:
            self.open_nodes.discard(id(node))

    def entries(self, node: MappingNode, path: Keys) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        inherited: dict[str, Entry] = {}
        for key, value in node.value:
            at = self.place(key)
            if not isinstance(key, ScalarNode):
                self.report(at, path, "a key must be text", "quote it")
                continue
            if str(key.tag) == _TAG + "merge":
                self.inherit(value, path, inherited)
                continue
            name = self.checked(str(key.value), at, path)
            below = self.convert(value, (*path, name))
            if _is_empty(value):  # ruamel marks a missing value at the next token, which may be lines away
                below = Scalar(None, at)
            if name in entries:
                first = entries[name].key.location
                self.report(at, (*path, name), f"duplicate key '{name}', first given in line {first.line}")
            else:
                entries[name] = Entry(at, below)
        return {**inherited, **entries}

    def inherit(self, value: YamlNode, path: Keys, inherited: dict[str, Entry]) -> None:
        """Apply YAML's merge key `<<`: earlier mappings win over later ones, own keys over both."""
        for source in value.value if isinstance(value, SequenceNode) else [value]:
            node = self.convert(source, path)
            if isinstance(node, Table):
                for name, entry in node.entries.items():
                    inherited.setdefault(name, entry)
            else:
                self.report(self.place(source), path, "'<<' takes a mapping or a list of mappings")

    def checked(self, text: str, place: SourceLocation, path: Keys) -> str:
        """Join surrogate pairs, which JSON escapes contain; report unpaired surrogates and NUL."""
        if "\0" in text:
            self.report(place, path, "the text has a NUL character", "remove it")
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            half = next(c for c in text if "\ud800" <= c <= "\udfff")
            message = f"unpaired surrogate U+{ord(half):04X}"
            self.report(place, path, message, "write the character itself")
            return text.encode("utf-8", "replace").decode()

    def scalar(self, node: ScalarNode, place: SourceLocation, path: Keys) -> Scalar:
        text, tag = str(node.value), str(node.tag)
        if tag in _TEXT_TAGS:
            filled = fill(text, self.env)
            for fault in filled.faults:
                self.report(place, path, *fault)
            text = self.checked(filled.text, place, path)
            # A composed node has the same tag for an explicit `!!str` and a resolved one; the text differs.
            tagged = _TAGGED.match(self.text, node.start_mark.index)
            if not filled.whole or filled.faults or tagged:
                return Scalar(text, place)
            tag = str(self.yaml.resolver.resolve(ScalarNode, text, (True, False)))
            if tag in _TEXT_TAGS:
                return Scalar(text, place)
        if tag not in _SIMPLE_TAGS:
            self.report(place, path, f"unknown YAML tag '{_shown(tag)}'", "remove it")
            return Scalar(text, place)
        try:
            value: Value = self.yaml.constructor.construct_object(ScalarNode(tag, text))
        except (ValueError, KeyError, IndexError):
            if tag == str(self.yaml.resolver.resolve(ScalarNode, text, (True, False))):
                self.report(place, path, f"{_start(text)!r} is a number too large to read")
            else:
                message = f"{_start(text)!r} does not match its tag '{_shown(tag)}'"
                self.report(place, path, message, "remove the tag")
            return Scalar(None, place)
        if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            self.report(place, path, f"{_start(text)!r} is a number too large to read")
            return Scalar(None, place)
        return Scalar(value, place)


def _is_empty(node: YamlNode) -> bool:
    return isinstance(node, ScalarNode) and not node.value and str(node.tag) == _TAG + "null"


def _start(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown(tag: str) -> str:
    return tag.replace(_TAG, "!!")
