"""What preflight finds: problems with their places in the recipe, and notes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mergeopd.config.locate import Origins
from mergeopd.config.tree import Keys
from mergeopd.errors import Location, MergeopdError, Problem
from mergeopd.messages import shown_in

T = TypeVar("T")


class Findings:
    """Collects problems; the same one at the same place counts once, whoever meets it again."""

    def __init__(self, origins: Origins) -> None:
        self._origins = origins
        self._problems: dict[tuple[Location, str], Problem] = {}
        self.notes: list[str] = []

    @property
    def problems(self) -> tuple[Problem, ...]:
        """In the order they were found."""
        return tuple(self._problems.values())

    def report(self, place: Keys, message: str, remedy: str = "") -> None:
        """A problem with what the recipe says at `place`."""
        problem = self._origins.problem(place, shown_in(message), remedy)
        self._problems.setdefault((problem.location, problem.message), problem)

    def attempt(self, place: Keys, work: Callable[[], T], remedy: str = "") -> T | None:
        """The result of `work`; None when it failed, and why becomes a problem at `place`.

        `remedy` is for errors that do not name one.
        """
        try:
            return work()
        except MergeopdError as error:
            self.report(place, str(error).removesuffix(".") if remedy else str(error), remedy)
        except OSError as error:
            file = f"{error.filename}: " if error.filename else ""
            self.report(place, f"{file}cannot be read: {error.strerror or error}")
        return None
