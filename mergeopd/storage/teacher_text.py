"""Rewards of the teachers' responses that phases select from, for the resume of a run and its reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from mergeopd.storage.records import read_records, write_records


@dataclass(frozen=True, slots=True)
class GradedText:
    """A teacher's response in a phase.

    `digest` is of response, reference and verifier. `reward` is None if the verifier failed. `truncated`: the
    response ended at the length limit, and is not kept.
    """

    phase: str
    teacher: str
    domain: str
    key: str
    sample: int
    digest: str
    reward: float | None
    truncated: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class KeptShare:
    """How many responses of a teacher in a domain a phase keeps, and how many prompts have none left.

    `num_truncated` responses ended at the length limit.
    """

    phase: str
    teacher: str
    domain: str
    num_responses: int
    num_truncated: int
    num_kept: int
    num_prompts: int
    num_without: int

    @property
    def kept_fraction(self) -> float:
        return self.num_kept / self.num_responses


_LINE = TypeAdapter(GradedText)


def read_graded(path: Path) -> tuple[GradedText, ...]:
    """Read the file, if it is there; damaged lines are left out. Raises StorageError if the disk fails."""
    return read_records(path, _LINE)


def write_graded(path: Path, rows: Iterable[GradedText]) -> None:
    """Write all rows. Raises StorageError if the disk fails."""
    write_records(path, rows)


def kept_shares(rows: Sequence[GradedText]) -> tuple[KeptShare, ...]:
    """Count by phase, teacher and domain, in the order of the rows."""
    groups: dict[tuple[str, str, str], list[GradedText]] = {}
    for row in rows:
        groups.setdefault((row.phase, row.teacher, row.domain), []).append(row)
    shares = []
    for names, members in groups.items():
        prompts, solved = {row.key for row in members}, {row.key for row in members if row.kept}
        num_kept = sum(row.kept for row in members)
        num_truncated = sum(row.truncated for row in members)
        counts = (len(members), num_truncated, num_kept, len(prompts), len(prompts - solved))
        shares.append(KeptShare(*names, *counts))
    return tuple(shares)
