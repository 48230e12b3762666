"""The terminal's reporter: a live display in interactive terminals, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from mergeopd.reporting.terminal.live import LiveReporter
from mergeopd.reporting.terminal.plain import PlainReporter


def console_reporter(
    console: Console, clock: Callable[[], float] = time.monotonic
) -> LiveReporter | PlainReporter:
    """Return a reporter for `console`, a context manager. `clock` is monotonic, in seconds."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveReporter(console, clock)
    return PlainReporter(console, clock)
