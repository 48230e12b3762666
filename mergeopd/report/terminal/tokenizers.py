"""Two tokenizers side by side: what they share, how well one reads what the other's model writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mergeopd.report.glyphs import Glyphs, plain_text

_SHOWN_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """One side. `named` maps names such as "eos_token" to text and id; `opening` is a rendered prompt."""

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
    """What `writer` writes, as `reader` reads it. All but `num_bytes` and `num_groups` count tokens."""

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
    """All that is told of two tokenizers. `difference` is None where every text has the same ids."""

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
            "tokenizers": [_plain(self.first), _plain(self.second)],
            "difference": self.difference,
            "shared_tokens": {"by_bytes": self.num_shared_bytes, "by_spelling": self.num_shared_written},
            "text": self.text,
            "coverage": [
                {**_plain(side), "one_to_one": side.one_to_one, "lost": side.lost} for side in self.coverage
            ],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = Glyphs.of(options)
        yield self._facts(glyphs)
        yield from self._verdict(glyphs)
        yield self._coverage(glyphs)
        yield from self._openings(glyphs)

    def _facts(self, glyphs: Glyphs) -> Table:
        table = _table(glyphs, "", self.first.name, self.second.name)
        rows: dict[str, Callable[[TokenizerFacts], str]] = {
            "ids": lambda side: f"{side.num_ids:,}",
            "special tokens": lambda side: f"{side.num_special:,}",
            "brings text to": lambda side: side.normal or "nothing else",
            "space before a text": lambda side: "yes" if side.prefix else "no",
            "system message": lambda side: "yes" if side.takes_system else "no",
            "fingerprint": lambda side: side.fingerprint[:12],
        }
        for name, shown in rows.items():
            table.add_row(name, shown(self.first), shown(self.second))
        table.add_section()
        names = dict.fromkeys((*self.first.named, *self.second.named))
        for name in names:
            cells = (_named(side, name) for side in (self.first, self.second))
            table.add_row(name, *(plain_text(cell, glyphs) for cell in cells))
        return table

    def _verdict(self, glyphs: Glyphs) -> Iterator[Text]:
        if self.difference is None:
            yield Text("Both give every text the same ids: a teacher needs no bridge.\n", style="green")
            return
        smaller = min(self.first.num_ids, self.second.num_ids)
        yield Text(
            f"{self.num_shared_bytes:,} tokens stand for the same bytes, "
            f"{self.num_shared_bytes / smaller:.1%} of the smaller vocabulary; "
            f"{self.num_shared_written:,} are spelled the same."
        )
        yield Text(plain_text(self.difference, glyphs) + "\n", style="dim")

    def _coverage(self, glyphs: Glyphs) -> Table:
        headings = [f"{side.writer} writes, {side.reader} reads" for side in self.coverage]
        table = _table(glyphs, f"Text: {self.text}", *headings)
        rows: dict[str, Callable[[Coverage], str]] = {
            "tokens written": lambda side: f"{side.num_writer:,}",
            "tokens read": lambda side: f"{side.num_reader:,}",
            "groups": lambda side: f"{side.num_groups:,}",
            "bytes a group": lambda side: _ratio(side.num_bytes, side.num_groups),
            "written tokens a group": lambda side: _ratio(side.num_writer, side.num_groups),
            "read tokens a group": lambda side: _ratio(side.num_reader, side.num_groups),
            "one to one": lambda side: _share(side.one_to_one),
            "in no group": lambda side: _share(side.lost),
        }
        for name, shown in rows.items():
            table.add_row(name, *(shown(side) for side in self.coverage))
        for reason in dict.fromkeys(reason for side in self.coverage for reason in side.unaligned):
            counts = (f"{side.unaligned.get(reason, 0):,}" for side in self.coverage)
            table.add_row(f"  {reason}", *counts, style="yellow")
        return table

    def _openings(self, glyphs: Glyphs) -> Iterator[Text]:
        same = self.first.opening == self.second.opening
        yield Text(f"A prompt 'Hi' is rendered {'the same' if same else 'differently'}:", style="bold")
        for side in (self.first, self.second)[: 1 if same else 2]:
            text = "no chat template" if side.opening is None else repr(side.opening)
            if len(text) > _SHOWN_CHARACTERS:
                half = _SHOWN_CHARACTERS // 2
                text = f"{text[:half]} ... {text[-half:]}"
            name = "" if same else f"{side.name}: "
            yield Text.assemble((name, "dim"), plain_text(text, glyphs), overflow="fold")


def _table(glyphs: Glyphs, title: str, *headings: str) -> Table:
    table = Table(
        title=plain_text(title, glyphs) or None,
        title_justify="left",
        title_style="bold",
        box=glyphs.table_box,
        header_style="dim",
        pad_edge=False,
    )
    table.add_column("")
    for heading in headings:
        table.add_column(plain_text(heading, glyphs), justify="right", overflow="fold")
    return table


def _named(side: TokenizerFacts, name: str) -> str:
    if name not in side.named:
        return "-"
    text, i = side.named[name]
    return f"{text} ({i})"


def _ratio(tokens: int, groups: int) -> str:
    return f"{tokens / groups:.2f}" if groups else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _plain(record: TokenizerFacts | Coverage) -> dict[str, Any]:
    """Fields of a record; slots have no `__dict__`."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
