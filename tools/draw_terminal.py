"""Draw a captured terminal screen as SVG, one for light and one for dark pages.

tmux capture-pane -e -p > screen.ansi
python tools/draw_terminal.py screen.ansi docs/pictures/terminal
"""

from __future__ import annotations

import io
from pathlib import Path

import typer
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

_ANSI_LIGHT = [
    (36, 41, 47), (207, 34, 46), (26, 127, 55), (154, 103, 0),
    (9, 105, 218), (130, 80, 223), (27, 124, 131), (110, 119, 129),
]  # fmt: skip
_ANSI_DARK = [
    (72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34),
    (88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196),
]  # fmt: skip
THEMES = {
    "light": TerminalTheme((255, 255, 255), (31, 35, 40), _ANSI_LIGHT, _ANSI_LIGHT),
    "dark": TerminalTheme((13, 17, 23), (230, 237, 243), _ANSI_DARK, _ANSI_DARK),
}

# Rich's format, without its window frame and its font from the network.
FORMAT = """\
<svg viewBox="-12 -10 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width;
}}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
<rect x="-11.5" y="-9.5" width="99.9%" height="99.9%" rx="8" fill="{background}" stroke="{border}"/>
<g clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def draw(screen: str, theme: str) -> str:
    """Render the screen as SVG.

    Args:
        screen: Lines with ANSI escape sequences.
        theme: A key of `THEMES`.
    """
    text = Text.from_ansi(screen.rstrip("\n"))
    lines = text.split("\n")
    width = max(line.cell_len for line in lines)
    console = Console(
        width=width, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(text, end="")
    colours = THEMES[theme]
    code = FORMAT.replace("{background}", colours.background_color.hex)
    # A character is 12.2 units wide and a line 24.4 high (rich's export); 12 and 10 units of margin.
    code = code.replace("{width}", f"{width * 12.2 + 24:.0f}").replace(
        "{height}", f"{len(lines) * 24.4 + 24:.0f}"
    )
    code = code.replace("{border}", {"light": "#d0d7de", "dark": "#30363d"}[theme])
    return console.export_svg(theme=colours, code_format=code, unique_id="screen")


def main(screen: Path, out: Path) -> None:
    """Write OUT-light.svg and OUT-dark.svg.

    Args:
        screen: File with the captured screen.
        out: Path of the pictures, without `-light.svg` and `-dark.svg`.
    """
    for theme in THEMES:
        picture = draw(screen.read_text(encoding="utf-8"), theme)
        out.with_name(f"{out.name}-{theme}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
