"""Findings of preflight: problems with their location in the recipe, and notes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mergeopd.config.locate import Origins
from mergeopd.config.tree import Keys
from mergeopd.errors import Location, MergeopdError, Problem
from mergeopd.messages import shown_in

T = TypeVar("T")


class Findings:
    """Collects problems; a repeated message at the same location is dropped."""

    def __init__(self, origins: Origins) -> None:
        self._origins = origins
        self._problems: dict[tuple[Location, str], Problem] = {}
        self.notes: list[str] = []

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All problems, in the order of their report."""
        return tuple(self._problems.values())

    def report(self, place: Keys, message: str, remedy: str = "") -> None:
        """Report a problem located at a path of the recipe."""
        problem = self._origins.problem(place, shown_in(message), remedy)
        self._problems.setdefault((problem.location, problem.message), problem)

    def attempt(self, place: Keys, work: Callable[[], T], remedy: str = "") -> T | None:
        """Return the result of `work`; if it fails, report the error at `place` and return None.

        `remedy` is for errors without a remedy of their own.
        """
        try:
            return work()
        except MergeopdError as error:
            self.report(place, str(error).removesuffix(".") if remedy else str(error), remedy)
        except OSError as error:
            file = f"{error.filename}: " if error.filename else ""
            self.report(place, f"{file}cannot be read: {error.strerror or error}")
        return None
