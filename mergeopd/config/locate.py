"""From a path in a recipe to the place in a file where it was written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergeopd.config.tree import Keys, Node, SourceLocation, find
from mergeopd.errors import Location, Problem
from mergeopd.messages import shown


def dotted(path: Keys) -> str:
    """`("prompts", 0, "source")` as people write it: `prompts[0].source`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


class Origins:
    """Where each part of a recipe was written, teacher cards included.

    A path that goes on after `("teachers", NAME, "card")` leads into the card's file. What was not written
    stands at its nearest existing parent.
    """

    def __init__(self, file: Path, root: Node | None, cards: Mapping[str, Node]) -> None:
        self._file = file
        self._root = root
        self._cards = cards

    def place(self, path: Keys, *, key: bool = False) -> SourceLocation:
        """Where the value at `path` was written (with `key`: its key)."""
        if len(path) > 3 and path[0] == "teachers" and path[2] == "card" and path[1] in self._cards:
            return find(self._cards[str(path[1])], path[3:], key=key)
        if self._root is None:
            return SourceLocation(Location(shown(self._file)), Path(os.path.abspath(self._file)).parent)
        return find(self._root, path, key=key)

    def at(self, *path: str | int) -> Location:
        """The place of the value at a path: `at("teachers", "math", "card", "model")`."""
        return self.place(path).location

    def problem(self, path: Keys, message: str, remedy: str = "", *, key: bool = False) -> Problem:
        """A problem with the value at `path` (with `key`: with the key itself)."""
        return Problem(self.place(path, key=key).location, dotted(path), message, remedy)

    def in_order(self, problems: Iterable[Problem]) -> tuple[Problem, ...]:
        """Each problem once: the recipe's, those of overrides, those of other files; by line and column."""
        recipe = shown(self._file)

        def rank(problem: Problem) -> tuple[int, int, Location]:
            file = problem.location.file
            number = int(file.removeprefix("--set #")) if file.startswith("--set #") else 0
            return (0 if file == recipe else 1 if number else 2), number, problem.location

        return tuple(sorted(dict.fromkeys(problems), key=rank))
