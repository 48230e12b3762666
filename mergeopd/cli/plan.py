"""`mergeopd plan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mergeopd.cli.opening import open_with
from mergeopd.cli.options import JsonOption, SetOption
from mergeopd.errors import RecipeError
from mergeopd.messages import option_problem

_Recipe = Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
_Hardware = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICES", help="h200x8, h100x64, cpu:16,64GiB, or a profile's file; default: this machine."
    ),
]
_Processes = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Processes of a grid on a CPU; GPUs have one each.")
]
_Models = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FOLDER",
        help="Folder with the config.json of `student` or of a teacher that is not here. Repeatable.",
    ),
]
_PromptTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Mean length of prompts; default: of the files.")
]
_ResponseTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Mean length of responses; default: the maximum.")
]
_Fit = Annotated[bool, typer.Option("--fit", help="Search for a grid and batches that fit.")]
_Measure = Annotated[bool, typer.Option("--measure", help="Measure this machine and write its profile.")]
_Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="With --measure: the profile's file; default: in the cache."),
]


def plan(
    recipe: _Recipe = None,
    overrides: SetOption = None,
    hardware: _Hardware = None,
    nproc: _Processes = None,
    model: _Models = None,
    prompt_tokens: _PromptTokens = None,
    response_tokens: _ResponseTokens = None,
    fit: _Fit = False,
    measure: _Measure = False,
    out: _Out = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory, time and the cost of each teacher before a run; weights need not be here.

    Exit code 0: it fits; 1: it does not fit, or does not run; 2: the recipe or an option is wrong.

    Example: mergeopd plan recipes/quickstart.yaml --hardware h200x8 --fit
    """
    if out is not None and not measure:
        raise RecipeError([option_problem("--out", "is for --measure", "add --measure, or remove it")])
    if measure:
        _measure(out)
    if recipe is None:
        if measure:
            return
        raise RecipeError([option_problem("RECIPE", "missing argument: the recipe", "name a YAML file")])
    clear = open_with(recipe, sys.stderr, only_terminal=True)
    try:
        from mergeopd import api

        result = api.plan(
            recipe,
            set=overrides or (),
            hardware=str(out) if hardware is None and out is not None else hardware,
            num_processes=nproc,
            models=dict(_named(text) for text in model or ()),
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            fit=fit,
        )
    finally:
        clear()
    if as_json:
        typer.echo(json.dumps(result.document(), indent=2))
    else:
        from rich.console import Console

        from mergeopd.reporting.terminal.estimate import show_estimate

        show_estimate(result, Console())
    if result.obstacles:
        raise typer.Exit(1)


def _named(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or not name or not folder:
        message = f"'{text}' is not NAME=FOLDER"
        raise RecipeError(
            [option_problem("--model", message, "write for example --model student=configs/4b")]
        )
    return name, Path(folder)


def _measure(out: Path | None) -> None:
    from mergeopd.planner.measure import measure
    from mergeopd.planner.profile import measured_file, write_profile

    file = measured_file() if out is None else out
    file.parent.mkdir(parents=True, exist_ok=True)
    profile = measure(lambda what: typer.echo(f"measuring {what}", err=True), file.parent)
    write_profile(profile, file)
    typer.echo(f"wrote {file}", err=True)
