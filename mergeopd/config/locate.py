"""Map paths in a recipe to locations in files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergeopd.config.tree import Keys, Node, SourceLocation, find
from mergeopd.errors import Location, Problem
from mergeopd.messages import shown


def dotted(path: Keys) -> str:
    """Format a path for messages: `("prompts", 0, "source")` is `prompts[0].source`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


class Origins:
    """Source locations of a recipe and its cards.

    `cards` are by their path in the recipe; paths below are located in the card's file. A missing value is
    located at its nearest existing parent.
    """

    def __init__(self, file: Path, root: Node | None, cards: Mapping[Keys, Node]) -> None:
        self._file = file
        self._root = root
        self._cards = cards

    def place(self, path: Keys, *, key: bool = False) -> SourceLocation:
        """Return the location of the value at `path` (with `key`: of its key), and the base of its paths."""
        for end in range(1, len(path)):
            if path[:end] in self._cards:
                return find(self._cards[path[:end]], path[end:], key=key)
        if self._root is None:
            return SourceLocation(Location(shown(self._file)), Path(os.path.abspath(self._file)).parent)
        return find(self._root, path, key=key)

    def at(self, *path: str | int) -> Location:
        """Return the location of a value: `at("teachers", "math", "card", "model")`."""
        return self.place(path).location

    def problem(self, path: Keys, message: str, remedy: str = "", *, key: bool = False) -> Problem:
        """Create a problem located at the value at `path` (with `key`: at its key)."""
        return Problem(self.place(path, key=key).location, dotted(path), message, remedy)

    def in_order(self, problems: Iterable[Problem]) -> tuple[Problem, ...]:
        """Sort and deduplicate: the recipe's problems, those of overrides, those of other files."""
        recipe = shown(self._file)

        def rank(problem: Problem) -> tuple[int, int, Location]:
            file = problem.location.file
            number = int(file.removeprefix("--set #")) if file.startswith("--set #") else 0
            return (0 if file == recipe else 1 if number else 2), number, problem.location

        return tuple(sorted(dict.fromkeys(problems), key=rank))
