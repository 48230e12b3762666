"""YAML text to a located tree: YAML 1.2, no tags of one's own, no duplicate keys, variables filled in.

A scalar that is one `${VARIABLE}` and nothing else is typed as if its text stood there unquoted: `lr: ${LR}`
is a number. Force text with `!!str`. Inside `{...}` and `[...]` YAML needs quotes around `${VARIABLE}`.
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

from mergeopd.errors import Location, Problem
from mergeopd.recipe.locate import dotted
from mergeopd.recipe.tree import Entry, Items, Keys, Node, Place, Scalar, Table, Value
from mergeopd.recipe.variables import fill

_TAG = "tag:yaml.org,2002:"
# Dates, and `=` from YAML 1.1, are just text in a recipe.
_TEXT_TAGS = {_TAG + "str", _TAG + "timestamp", _TAG + "value"}
_TAGGED = re.compile(r"(&\S+\s+)?!")
_SIMPLE_TAGS = {_TAG + "int", _TAG + "float", _TAG + "bool", _TAG + "null"}


def parse(
    text: str, where: Place, env: Mapping[str, str], *, prefix: Keys = (), fixed: bool = False
) -> tuple[Node | None, tuple[Problem, ...]]:
    """Parses one document.

    Args:
        where: the file; with `fixed` the one place at which everything in `text` stands (an override).
        prefix: the path under which this document stands, for the names in problems.

    Returns:
        The tree, None where the text is not YAML or holds nothing, and every problem found.
    """
    yaml = YAML(typ="safe", pure=True)
    parser = _Parser(yaml, text, where, env, fixed, prefix)
    try:
        root = yaml.compose(text)
        node = None if root is None else parser.convert(root, prefix)
    except RecursionError:
        return None, (Problem(where.location, dotted(prefix), "not a recipe: nested too deeply"),)
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


@dataclass
class _Parser:
    yaml: YAML
    text: str
    where: Place
    env: Mapping[str, str]
    fixed: bool
    prefix: Keys
    problems: list[Problem] = field(default_factory=list)
    open_nodes: set[int] = field(default_factory=set)

    def place_at(self, line: int, column: int) -> Place:
        return Place(Location(self.where.location.file, line, column), self.where.base)

    def place(self, node: YamlNode) -> Place:
        if self.fixed:
            return self.where
        return self.place_at(node.start_mark.line + 1, node.start_mark.column + 1)

    def report(self, place: Place, path: Keys, message: str, remedy: str = "") -> None:
        self.problems.append(Problem(place.location, dotted(path), message, remedy))

    def broken(self, error: MarkedYAMLError) -> Problem:
        mark, place, line = error.problem_mark, self.where, self.text
        if mark is not None and not self.fixed:
            place = self.place_at(mark.line + 1, mark.column + 1)
            line = [*self.text.split("\n"), ""][mark.line]
        remedy = ""
        if "\\t" in str(error.problem):
            remedy = "indent with spaces"
        elif "${" in line:
            remedy = 'inside {...} and [...] put variables in quotes: "${NAME}"'
        message = str(error.problem).removeprefix("but ")
        for jargon, words in (("'<stream end>'", "the end"), ("the node content", "a value")):
            message = message.replace(jargon, words)
        return Problem(place.location, dotted(self.prefix), f"not valid YAML: {message}", remedy)

    def convert(self, node: YamlNode, path: Keys) -> Node:
        place = self.place(node)
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
            name = self.whole(str(key.value), at, path)
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
        """YAML's merge key `<<`: earlier mappings win over later ones, own keys over all."""
        for source in value.value if isinstance(value, SequenceNode) else [value]:
            node = self.convert(source, path)
            if isinstance(node, Table):
                for name, entry in node.entries.items():
                    inherited.setdefault(name, entry)
            else:
                self.report(self.place(source), path, "'<<' takes a mapping or a list of mappings")

    def whole(self, text: str, place: Place, path: Keys) -> str:
        """Text whose escaped surrogate pairs, which are JSON's way to write a character, are characters.

        Half of one is reported: no file, tokenizer or terminal takes it.
        """
        joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        known = joined.encode("utf-8", "replace").decode("utf-8")
        if known != joined:
            self.report(place, path, "holds half a surrogate pair", "write the character itself")
        return known

    def scalar(self, node: ScalarNode, place: Place, path: Keys) -> Scalar:
        text, tag = str(node.value), str(node.tag)
        if tag in _TEXT_TAGS:
            filled = fill(text, self.env)
            for fault in filled.faults:
                self.report(place, path, fault.message, fault.remedy)
            text = self.whole(filled.text, place, path)
            # A composed node does not say whether `!!str` was written or worked out; its text does.
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
        except (ValueError, KeyError):
            self.report(place, path, f"{text!r} is not what its tag '{_shown(tag)}' says", "remove the tag")
            return Scalar(text, place)
        return Scalar(value, place)


def _is_empty(node: YamlNode) -> bool:
    return isinstance(node, ScalarNode) and not node.value and str(node.tag) == _TAG + "null"


def _shown(tag: str) -> str:
    return tag.replace(_TAG, "!!")
