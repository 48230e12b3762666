"""Two tokenizers side by side: shared tokens, and how well one reads text that the other has encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mergeopd.report.terminal.glyphs import Glyphs, plain_text

_SHOWN_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """One tokenizer. `named` maps names like "eos_token" to text and id; `opening` is a rendered prompt."""

    name: str
    num_ids: int
    num_special: int
    normal: str | None
    prefix: bool
    named: Mapping[str, tuple[str, int]]
    opening: str | None
    takes_system: bool
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """Text encoded by `writer` and read by `reader`. All but `num_bytes` and `num_groups` count tokens."""

    writer: str
    reader: str
    num_bytes: int
    num_writer: int
    num_reader: int
    num_groups: int
    num_one_to_one: int
    unaligned: Mapping[str, int]

    @property
    def one_to_one(self) -> float | None:
        """Share of the writer's tokens whose group has one token on both sides; None without tokens."""
        return self.num_one_to_one / self.num_writer if self.num_writer else None

    @property
    def lost(self) -> float | None:
        """Share of the writer's tokens that are in no group; None without tokens."""
        return sum(self.unaligned.values()) / self.num_writer if self.num_writer else None


@dataclass(frozen=True, slots=True)
class TokenizerPair:
    """The comparison of two tokenizers. `difference` is None where every text has the same ids."""

    first: TokenizerFacts
    second: TokenizerFacts
    difference: str | None
    num_shared_bytes: int
    num_shared_written: int
    text: str
    coverage: tuple[Coverage, Coverage]

    def document(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "tokenizers": [asdict(self.first), asdict(self.second)],
            "difference": self.difference,
            "shared_tokens": {"by_bytes": self.num_shared_bytes, "by_spelling": self.num_shared_written},
            "text": self.text,
            "coverage": [
                {**asdict(side), "one_to_one": side.one_to_one, "lost": side.lost} for side in self.coverage
            ],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = Glyphs.of(options)
        sides = (self.first, self.second)
        table = _table(glyphs, "", [side.name for side in sides])
        rows = {
            "ids": [f"{side.num_ids:,}" for side in sides],
            "special tokens": [f"{side.num_special:,}" for side in sides],
            "normalization": [side.normal or "none" for side in sides],
            "space before a text": ["yes" if side.prefix else "no" for side in sides],
            "system message": ["yes" if side.takes_system else "no" for side in sides],
            "fingerprint": [side.fingerprint[:12] for side in sides],
        }
        _add_rows(table, glyphs, rows)
        table.add_section()
        names = dict.fromkeys((*self.first.named, *self.second.named))
        _add_rows(table, glyphs, {name: [_named(side, name) for side in sides] for name in names})
        yield table
        yield from self._shared(glyphs)
        yield self._coverage(glyphs)
        yield from self._openings(glyphs)

    def _shared(self, glyphs: Glyphs) -> Iterator[Text]:
        if self.difference is None:
            yield Text("Both give every text the same ids: a teacher needs no bridge.\n", style="green")
            return
        smaller = min(self.first.num_ids, self.second.num_ids)
        yield Text(
            f"{self.num_shared_bytes:,} tokens have the same bytes, "
            f"{self.num_shared_bytes / smaller:.1%} of the smaller vocabulary; "
            f"{self.num_shared_written:,} have the same spelling."
        )
        yield Text(plain_text(self.difference, glyphs) + "\n", style="dim")

    def _coverage(self, glyphs: Glyphs) -> Table:
        sides = self.coverage
        table = _table(glyphs, f"Text: {self.text}", [f"{s.writer} writes, {s.reader} reads" for s in sides])
        rows = {
            "tokens written": [f"{s.num_writer:,}" for s in sides],
            "tokens read": [f"{s.num_reader:,}" for s in sides],
            "groups": [f"{s.num_groups:,}" for s in sides],
            "bytes per group": [_ratio(s.num_bytes, s.num_groups) for s in sides],
            "written tokens per group": [_ratio(s.num_writer, s.num_groups) for s in sides],
            "read tokens per group": [_ratio(s.num_reader, s.num_groups) for s in sides],
            "one to one": [_share(s.one_to_one) for s in sides],
            "in no group": [_share(s.lost) for s in sides],
        }
        _add_rows(table, glyphs, rows)
        reasons = dict.fromkeys(reason for side in sides for reason in side.unaligned)
        lost = {f"  {reason}": [f"{s.unaligned.get(reason, 0):,}" for s in sides] for reason in reasons}
        _add_rows(table, glyphs, lost, "yellow")
        return table

    def _openings(self, glyphs: Glyphs) -> Iterator[Text]:
        same = self.first.opening == self.second.opening
        yield Text(f"The prompt 'Hi' is rendered {'identically' if same else 'differently'}:", style="bold")
        for side in (self.first, self.second)[: 1 if same else 2]:
            text = "no chat template" if side.opening is None else repr(side.opening)
            if len(text) > _SHOWN_CHARACTERS:
                half = _SHOWN_CHARACTERS // 2
                text = f"{text[:half]} ... {text[-half:]}"
            name = "" if same else f"{side.name}: "
            yield Text.assemble((name, "dim"), plain_text(text, glyphs), overflow="fold")


def _table(glyphs: Glyphs, title: str, headings: list[str]) -> Table:
    table = glyphs.table(title)
    table.add_column("")
    for heading in headings:
        table.add_column(plain_text(heading, glyphs), justify="right", overflow="fold")
    return table


def _add_rows(table: Table, glyphs: Glyphs, rows: Mapping[str, list[str]], style: str = "") -> None:
    for name, cells in rows.items():
        table.add_row(name, *(plain_text(cell, glyphs) for cell in cells), style=style)


def _named(side: TokenizerFacts, name: str) -> str:
    text, i = side.named.get(name, ("", 0))
    return f"{text} ({i})" if name in side.named else "-"


def _ratio(tokens: int, groups: int) -> str:
    return f"{tokens / groups:.2f}" if groups else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
