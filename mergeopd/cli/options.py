"""Arguments and options shared by several commands, and remedies for misplaced ones."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. optimizer.lr=2e-6. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


class RecipeCommand(TyperCommand):
    """A command with `--set` that gives the remedy for `--set KEY VALUE` and for a late `--verbose`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments as usual. Raises typer.BadParameter for the two mistakes."""
        for option in {"-v", "-vv", "--verbose"}.intersection(args):
            raise typer.BadParameter(
                f"write {option} before the command: mergeopd {option} {ctx.info_name}", ctx
            )
        for (option, key), (_, value) in pairwise(pairwise([*args, "--"])):
            is_split = option == "--set" and "=" not in key and not value.startswith("--")
            if is_split and not value.endswith((".yaml", ".yml")):
                raise typer.BadParameter(f"--set takes one word; write --set {key}={value}", ctx)
        return super().parse_args(ctx, args)
