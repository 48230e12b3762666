"""The project's one exception tree.

Every error is also the standard-library type a caller would expect, says where, what and the remedy,
and is shown by the command line without a traceback.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_SHOWN = 100  # problems
_MAX_CHARACTERS = 2000  # of one text in a message


def printable(text: str) -> str:
    """`text` for a terminal: control and direction characters escaped, a very long text cut.

    Line breaks are kept. What a file contains could otherwise move the cursor, or hide what follows.
    """
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[:_MAX_CHARACTERS]}... ({len(text) - _MAX_CHARACTERS:,} more characters)"
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or unicodedata.category(c) not in _HIDDEN else _escaped(c) for c in text)


# Control, format, surrogate, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class MergeopdError(Exception):
    """Base of every error that mergeopd raises on purpose."""


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """A place in a file (1-based line and column) or an override (`--set #2`, then line and column are 0)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it is, what the dotted recipe path is called, what is wrong, what to do.

    `path` is written as in the recipe (`teachers.math.card`, `prompts[0].source`).
    """

    location: Location
    path: str
    message: str
    remedy: str = field(default="")

    def __str__(self) -> str:
        text = f"{self.message}; {self.remedy}" if self.remedy else self.message
        text = text.replace("\n", "\n    ")
        place = f"{self.location}  {self.path}".rstrip().replace("\n", "\\n")
        return f"{printable(place)}\n    {printable(text)}"


class RecipeError(MergeopdError, ValueError):
    """The recipe, or something it names, cannot work. Carries *all* problems found, in file order.

    Its text has the first `MAX_SHOWN` of them.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        shown = [str(problem) for problem in self.problems[:MAX_SHOWN]]
        if len(self.problems) > MAX_SHOWN:
            shown.append(f"... and {len(self.problems) - MAX_SHOWN:,} more problems")
        super().__init__("\n".join(shown))


class ModelError(MergeopdError, ValueError):
    """A model folder is unusable: no weights, a missing shard, an unknown architecture."""


class TokenizerError(MergeopdError, ValueError):
    """A tokenizer cannot be read, or differs where it must be equal."""


class DataError(MergeopdError, ValueError):
    """A prompt file or one of its rows is unusable."""


class VerifierError(MergeopdError, ValueError):
    """A verifier is misconfigured, or a user's reward function failed."""


class TeacherError(MergeopdError, RuntimeError):
    """A teacher must not teach: NaN in its output, wrong shape, weights that are not what the card says."""


class NumericsError(MergeopdError, ArithmeticError):
    """The student's loss or gradient is not finite."""


class Stopped(MergeopdError, InterruptedError):  # noqa: N818 (a wish that was met, not a fault)
    """The run stopped on request, after saving a checkpoint; running it again resumes it."""


class UpdateLimitReached(Stopped):
    """The run made the requested number of updates, before its end."""


class StorageError(MergeopdError, OSError):
    """A run folder or checkpoint cannot be written, read or trusted."""


class ProcessError(MergeopdError, RuntimeError):
    """The processes of a run cannot find each other, or one was lost."""


class PeerFailed(MergeopdError, RuntimeError):  # noqa: N818 (says that, not what)
    """Another process of the run has met an error, and tells it; this one ends without a word."""

    def __init__(self) -> None:
        super().__init__("another process of the run ended")
