"""Exceptions of the package.

Every error also derives from the matching standard exception. Its message has place, cause and remedy, and
the command line prints it without a traceback.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_SHOWN = 100  # problems
_MAX_CHARACTERS = 2000  # of one text in a message


def printable(text: str) -> str:
    """Make text safe for a terminal: escape control and direction characters, truncate very long text.

    Line breaks are kept. Text from files could otherwise move the cursor or hide what follows.
    """
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[:_MAX_CHARACTERS]}... ({len(text) - _MAX_CHARACTERS:,} more characters)"
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode("ascii") if c != "\n" and unicodedata.category(c) in _HIDDEN else c
        for c in text
    )


# Control, format, surrogate, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class MergeopdError(Exception):
    """Base of all errors that mergeopd raises deliberately."""


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """A position in a file (1-based line and column) or an override (`--set #2`, line and column 0)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, with location, recipe path (`prompts[0].source`), cause and remedy."""

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
    """The recipe, or a file it names, is invalid. Has all problems, in file order.

    The message contains the first `MAX_SHOWN`.
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


class EnvironmentFailed(MergeopdError, RuntimeError):  # noqa: N818  OSError has the other name
    """An environment cannot be built, or its code, its server or its replies are at fault."""


class SandboxError(MergeopdError, RuntimeError):
    """Generated programs cannot be isolated on this machine, or the sandbox itself failed."""


class TeacherError(MergeopdError, RuntimeError):
    """A teacher cannot be used: NaN or a wrong shape in its output, weights that do not match its card."""


class ServerError(MergeopdError, RuntimeError):
    """An inference server cannot be started or reached, or its replies are unusable."""


class NumericsError(MergeopdError, ArithmeticError):
    """The student's loss or gradient is not finite."""


class Stopped(MergeopdError, InterruptedError):  # noqa: N818 (not a failure)
    """The run stopped on request after saving; the same command resumes it."""


class UpdateLimitReached(Stopped):
    """The run reached the requested number of updates (`--updates`) before its end."""


class StoppedByAlarm(Stopped):
    """An alarm with `action: stop` stopped the run after saving; the same command resumes it."""


class TrackerError(MergeopdError, RuntimeError):
    """An experiment tracker cannot be used; the run continues without it."""


class StorageError(MergeopdError, OSError):
    """A run folder or checkpoint cannot be written or read, or is damaged."""


class HubError(MergeopdError, RuntimeError):
    """The Hugging Face hub cannot be reached, or refuses an upload."""


class ProcessError(MergeopdError, RuntimeError):
    """The processes of a run cannot connect, or one was lost."""


class PeerFailed(MergeopdError, RuntimeError):  # noqa: N818
    """Another process of the run failed and reports the error; this process exits silently."""

    def __init__(self) -> None:
        super().__init__("another process of the run ended")
