"""Comparison of two tokenizers: shared tokens, and the alignment of their tokens of one text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from mergeopd.recipe.bridges import KINDS
from mergeopd.reporting.terminal.glyphs import plain_text, table

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
    """Text in the writer's tokens, aligned with the reader's; `num_writer` and `unaligned` count tokens."""

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
    """The comparison. `difference` is None where every text has the same ids in both."""

    first: TokenizerFacts
    second: TokenizerFacts
    difference: str | None
    num_shared_bytes: int
    num_shared_written: int
    text: str
    coverage: tuple[Coverage, Coverage]

    def document(self) -> dict[str, Any]:
        return {
            "tokenizers": [asdict(self.first), asdict(self.second)],
            "difference": self.difference,
            "shared_tokens": {"by_bytes": self.num_shared_bytes, "by_spelling": self.num_shared_written},
            "text": self.text,
            "coverage": [{**asdict(c), "one_to_one": c.one_to_one, "lost": c.lost} for c in self.coverage],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only = options.ascii_only
        sides = (self.first, self.second)
        for mark, side in zip("AB", sides, strict=True):
            yield Text(f"{mark}  {plain_text(side.name, ascii_only)}", style="bold", overflow="fold")
        names = dict.fromkeys((*self.first.named, *self.second.named))
        yield table(
            ("", "A", "B"),
            [
                ("ids", *(f"{side.num_ids:,}" for side in sides)),
                ("special tokens", *(f"{side.num_special:,}" for side in sides)),
                ("Unicode normalization", *(side.normal or "none" for side in sides)),
                ("adds a leading space", *("yes" if side.prefix else "no" for side in sides)),
                ("template has a system message", *("yes" if s.takes_system else "no" for s in sides)),
                ("fingerprint", *(side.fingerprint[:12] for side in sides)),
                *((name, *(_named(side, name) for side in sides)) for name in names),
            ],
            ascii_only=ascii_only,
        )
        yield from self._verdict(ascii_only)
        there, back = self.coverage
        reasons = dict.fromkeys((*there.unaligned, *back.unaligned))
        yield table(
            (f"Text: {self.text}", "A to B", "B to A"),
            [
                ("tokens", *(f"{c.num_writer:,}" for c in self.coverage)),
                ("tokens of the other side", *(f"{c.num_reader:,}" for c in self.coverage)),
                ("aligned groups", *(f"{c.num_groups:,}" for c in self.coverage)),
                ("bytes per group", *(_ratio(c.num_bytes, c.num_groups) for c in self.coverage)),
                ("tokens per group", *(_ratio(c.num_writer, c.num_groups) for c in self.coverage)),
                ("other tokens per group", *(_ratio(c.num_reader, c.num_groups) for c in self.coverage)),
                ("tokens aligned one to one", *(_share(c.one_to_one) for c in self.coverage)),
                ("tokens in no group", *(_share(c.lost) for c in self.coverage)),
                *((f"  {why}", *(f"{c.unaligned.get(why, 0):,}" for c in self.coverage)) for why in reasons),
            ],
            ascii_only=ascii_only,
        )
        same = self.first.opening == self.second.opening
        yield Text(f"Templates render the prompt 'Hi' {'the same' if same else 'differently'}:", style="bold")
        for side in sides[: 1 if same else 2]:
            text = "no chat template" if side.opening is None else repr(side.opening)
            if len(text) > _SHOWN_CHARACTERS:
                text = f"{text[: _SHOWN_CHARACTERS // 2]} ... {text[-_SHOWN_CHARACTERS // 2 :]}"
            name = "" if same else f"{plain_text(side.name, ascii_only)}: "
            yield Text.assemble((name, "dim"), plain_text(text, ascii_only), overflow="fold")

    def _verdict(self, ascii_only: bool) -> Iterator[Text]:
        if self.difference is None:
            yield Text("Both give every text the same ids: a teacher needs no bridge.\n", style="green")
            return
        there = self.coverage[0]
        yield Text(
            f"They differ: a teacher with the other one needs a bridge, for example `bridge: {KINDS[0]}`. "
            f"With student A, {_share(there.one_to_one)} of its tokens align one to one, and "
            f"{_share(there.lost)} cannot be compared.",
            style="yellow",
        )
        smaller = min(self.first.num_ids, self.second.num_ids)
        yield Text(
            f"{self.num_shared_bytes:,} tokens have the same bytes, "
            f"{self.num_shared_bytes / smaller:.1%} of the smaller vocabulary; "
            f"{self.num_shared_written:,} have the same spelling."
        )
        yield Text(plain_text(self.difference, ascii_only) + "\n", style="dim")


def _named(side: TokenizerFacts, name: str) -> str:
    text, i = side.named.get(name, ("", -1))
    return "-" if i < 0 else f"{text} ({i})"


def _ratio(tokens: int, groups: int) -> str:
    return f"{tokens / groups:.2f}" if groups else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
