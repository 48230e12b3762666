"""The selection of a phase's prompts, for the resume of a run and its reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from mergeopd.storage.records import read_records, write_records

REASONS = {
    "duplicate": "equal to an earlier prompt",
    "near_duplicate": "nearly equal to an earlier prompt",
    "teacher_wrong": "not solved by the teacher",
    "below": "solved too rarely by the student",
    "above": "solved too often by the student",
    "ungraded": "without a reward, since the verifier failed",
    "far": "far from the teacher's distribution",
}
"""Why a prompt is not drawn, in words."""


@dataclass(frozen=True, slots=True)
class SelectedPrompt:
    """A prompt of a phase with `select`. Numbers that were not needed are None.

    `digest` is of the prompt, the rules, and what measures them. `dropped` is "" for a prompt that is kept,
    otherwise one of `REASONS`; `twin` is the key of the prompt that it duplicates. `gap` is the mean log p of
    student minus teachers, per token.
    """

    phase: str
    source: str
    key: str
    digest: str
    dropped: str = ""
    twin: str | None = None
    teacher_pass_rate: float | None = None
    pass_rate: float | None = None
    gap: float | None = None


@dataclass(frozen=True, slots=True)
class SelectedShare:
    """How many prompts of a source a phase keeps; `dropped` counts the others by reason."""

    phase: str
    source: str
    num_prompts: int
    num_kept: int
    dropped: dict[str, int]

    @property
    def kept_fraction(self) -> float:
        return self.num_kept / self.num_prompts

    @property
    def reasons(self) -> str:
        """The dropped prompts in words."""
        return ", ".join(f"{number:,} {REASONS[reason]}" for reason, number in self.dropped.items())


_LINE = TypeAdapter(SelectedPrompt)


def read_selection(path: Path) -> tuple[SelectedPrompt, ...]:
    """Read the file, if it is there; damaged lines are left out. Raises StorageError if the disk fails."""
    return read_records(path, _LINE)


def write_selection(path: Path, rows: Iterable[SelectedPrompt]) -> None:
    """Write all rows. Raises StorageError if the disk fails."""
    write_records(path, rows)


def selected_shares(rows: Sequence[SelectedPrompt]) -> tuple[SelectedShare, ...]:
    """Count by phase and source, in the order of the rows."""
    groups: dict[tuple[str, str], list[SelectedPrompt]] = {}
    for row in rows:
        groups.setdefault((row.phase, row.source), []).append(row)
    shares = []
    for (phase, source), members in groups.items():
        counts = Counter(row.dropped for row in members)
        dropped = {reason: counts[reason] for reason in REASONS if counts[reason]}
        shares.append(SelectedShare(phase, source, len(members), counts[""], dropped))
    return tuple(shares)
