"""Print errors on stderr."""

from __future__ import annotations

import sys
import traceback

from mergeopd.errors import MAX_SHOWN, MergeopdError, RecipeError, printable


def show_error(error: BaseException) -> None:
    """Print an error on stderr, in colour on a terminal; an unexpected one with its traceback."""
    # Imported here, since most commands do not need it and `mergeopd --help` must be fast.
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from mergeopd.messages import shown_in

    if not isinstance(error, MergeopdError):
        traceback.print_exception(error)
        return
    if not isinstance(error, RecipeError):
        text = printable(shown_in(str(error)))
        if sys.stderr.isatty():
            Console(stderr=True).print(Text.assemble(("error: ", "bold red"), text))
        else:
            print(f"error: {text}", file=sys.stderr)
        return
    count = _problems(len(error.problems))
    if not sys.stderr.isatty():
        print(f"{error}\n\n{count}.", file=sys.stderr)
        return
    console = Console(stderr=True)
    for problem in error.problems[:MAX_SHOWN]:
        path = f"  {printable(problem.path)}" if problem.path else ""
        # Not wrapped: terminals make a link of an unbroken file:line:column.
        console.print(
            Text.assemble((printable(str(problem.location)), "bold"), (path, "dim")), soft_wrap=True
        )
        message = Text(printable(problem.message))
        if problem.remedy:
            message.append("; ").append(printable(problem.remedy), "green")
        console.print(Padding(message, (0, 0, 0, 4)))
    console.print(Text(f"\n{count}.", "bold red"))


def _problems(number: int) -> str:
    if number > MAX_SHOWN:
        return f"{number:,} problems, the first {MAX_SHOWN} are shown"
    return "1 problem" if number == 1 else f"{number} problems"
