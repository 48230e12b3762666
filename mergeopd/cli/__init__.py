"""The command line: `mergeopd run | check | plan | inspect | eval | targets | report | push | new` and more.

Exit codes: 0 success; 2 the recipe or the command's arguments are wrong; 3 stopped on request (SIGTERM,
Ctrl-C, --updates) with everything saved; 130 interrupted at once (second Ctrl-C); 1 any other error.

Modules of this package import at the top only what `--help` needs; commands import the rest when they run.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup, TyperOption

from mergeopd import __version__
from mergeopd.cli.check import check
from mergeopd.cli.errors import errors_shown
from mergeopd.cli.evaluate import evaluate
from mergeopd.cli.inspect import inspect
from mergeopd.cli.logs import VERBOSE, log_to_stderr
from mergeopd.cli.new import new
from mergeopd.cli.options import RecipeCommand
from mergeopd.cli.plan import plan
from mergeopd.cli.push import push
from mergeopd.cli.report import report
from mergeopd.cli.run import run
from mergeopd.cli.schema import schema
from mergeopd.cli.targets import targets
from mergeopd.cli.tokenizers import tokenizers
from mergeopd.distributed.rendezvous import join_launcher


class _Commands(TyperGroup):
    """Lists `new` first, since it writes what the other commands need."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "new")


app = typer.Typer(
    cls=_Commands,
    help="Merge many expert language models into one student by on-policy distillation.",
    epilog="Start with `mergeopd new teacher` and `mergeopd new recipe`. "
    "Shell completion: mergeopd --install-completion",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(new, name="new")
app.command(cls=RecipeCommand)(check)
app.command(cls=RecipeCommand)(plan)
app.command(cls=RecipeCommand)(inspect)
app.command(cls=RecipeCommand)(run)
app.command(cls=RecipeCommand, name="eval")(evaluate)
app.command(cls=RecipeCommand)(targets)
app.command()(report)
app.command()(push)
app.command()(tokenizers)
app.command()(schema)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"mergeopd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            envvar=VERBOSE,
            show_envvar=False,
            show_default=False,
            help="Log stages to stderr; -vv: also details such as bytes read.",
        ),
    ] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if verbose:
        log_to_stderr(verbose)


def main() -> None:
    """Entry point."""
    join_launcher()
    # Set before torch is imported: OpenMP threads that spin while waiting made a merge on two busy cores 3 to
    # 8 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = typer.main.get_command(app)
    for parameter in command.params:
        if isinstance(parameter, TyperOption) and parameter.name in ("install_completion", "show_completion"):
            parameter.hidden = True  # used once; the epilog names it
    with errors_shown():
        command()
