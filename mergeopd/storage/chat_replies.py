"""Replies of chat APIs, kept for later runs, and what a run's own requests used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mergeopd.serving.chat import ChatReply
from mergeopd.storage.failures import named_failures
from mergeopd.storage.lock import waiting
from mergeopd.storage.metrics import json_text
from mergeopd.storage.records import read_records


@dataclass(frozen=True, slots=True)
class ApiUse:
    """The tokens of a teacher's replies, as its API counted them; `dollars` is None without prices."""

    teacher: str
    num_prompt: int
    num_response: int
    dollars: float | None = None
    num_replies: int = 1


@dataclass(frozen=True, slots=True)
class _Line:
    key: str
    reply: ChatReply
    sha256: str


_LINE, _USE = TypeAdapter(_Line), TypeAdapter(ApiUse)


@dataclass(frozen=True)
class ReplyCache:
    """A file with a line for each reply, appended as soon as it arrives, because it was paid for."""

    path: Path
    known: dict[str, ChatReply] = field(default_factory=dict)

    def load(self) -> int:
        """Read the replies into `known`; return how many lines are damaged. Raises StorageError."""
        if not self.path.is_file():
            return 0
        with named_failures("read", self.path, "text_cache"):
            lines = self.path.read_bytes().splitlines()
        num_damaged = 0
        for line in filter(None, lines):
            try:
                row = _LINE.validate_json(line)
                if row.sha256 != _digest(row.key, row.reply):
                    raise ValueError
            except (ValidationError, ValueError):
                num_damaged += 1
            else:
                self.known[row.key] = row.reply
        return num_damaged

    def add(self, key: str, reply: ChatReply) -> None:
        """Keep a reply. Raises StorageError."""
        row = _Line(key, reply, _digest(key, reply))
        with waiting(self.path, "text_cache"):
            append_line(self.path, json_text(asdict(row)), "text_cache")
        self.known[key] = reply


def append_line(path: Path, line: str, setting: str = "output") -> None:
    """Append a line, on a line of its own also behind one that was cut. Raises StorageError."""
    with named_failures("write", path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.seek(0, 2):
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())


def add_use(path: Path, use: ApiUse) -> None:
    """Append to a run's record of API tokens. Raises StorageError."""
    append_line(path, json_text(asdict(use)))


def read_use(path: Path) -> tuple[ApiUse, ...]:
    """Return what a run has used so far, by teacher; damaged lines are left out. Raises StorageError."""
    return total_use(read_records(path, _USE))


def total_use(rows: Iterable[ApiUse]) -> tuple[ApiUse, ...]:
    """Add up by teacher; replies without prices count as free beside others."""
    totals: dict[str, ApiUse] = {}
    for row in rows:
        before = totals.get(row.teacher, ApiUse(row.teacher, 0, 0, None, 0))
        dollars = [part for part in (before.dollars, row.dollars) if part is not None]
        totals[row.teacher] = ApiUse(
            row.teacher,
            before.num_prompt + row.num_prompt,
            before.num_response + row.num_response,
            sum(dollars) if dollars else None,
            before.num_replies + row.num_replies,
        )
    return tuple(totals.values())


def use_text(use: ApiUse) -> str:
    """Format: `120 responses, 12,345 tokens in and 67,890 out, $1.23`."""
    cost = "" if use.dollars is None else f", ${use.dollars:,.{2 if use.dollars >= 0.1 else 4}f}"
    responses = "response" if use.num_replies == 1 else "responses"
    return f"{use.num_replies:,} {responses}, {use.num_prompt:,} tokens in and {use.num_response:,} out{cost}"


def _digest(key: str, reply: ChatReply) -> str:
    return hashlib.sha256(json.dumps([key, asdict(reply)], sort_keys=True).encode()).hexdigest()[:32]
