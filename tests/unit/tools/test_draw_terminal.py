"""Pictures of the terminal show what was captured, in both themes, and load nothing."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "draw_terminal.py"))
SCREEN = "\x1b[1mquickstart\x1b[0m update 3/4\n\x1b[32mmean\x1b[0m <99.7> %\n"


def test_a_screen_is_drawn_for_light_and_dark_pages(tmp_path: Path) -> None:
    screen = tmp_path / "screen.ansi"
    screen.write_text(SCREEN, encoding="utf-8")
    TOOL["main"](screen, tmp_path / "terminal")
    pictures = [
        (tmp_path / f"terminal-{theme}.svg").read_text(encoding="utf-8") for theme in ("light", "dark")
    ]
    assert pictures[0] != pictures[1]
    for picture in pictures:
        text = "".join(ET.fromstring(picture).itertext()).replace("\xa0", " ")
        assert "quickstart" in text
        assert "<99.7> %" in text
        assert "url(http" not in picture


def test_colours_and_weights_are_kept() -> None:
    light = TOOL["draw"](SCREEN, "light")
    assert "#1a7f37" in light
    assert "font-weight: bold" in light
    assert "#1a7f37" not in TOOL["draw"](SCREEN.replace("\x1b[32m", ""), "light")
