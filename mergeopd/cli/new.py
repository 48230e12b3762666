"""`mergeopd new recipe` and `mergeopd new teacher`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mergeopd.cli.display import show_notes, waiting

new = typer.Typer(help="Write a commented recipe, or the card of a teacher.", no_args_is_help=True)


@new.command()
def recipe(
    name: Annotated[
        str, typer.Argument(help="Name of the recipe; the file is recipes/NAME.yaml.", metavar="NAME")
    ],
    student: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the model to train.", show_default=False)
    ] = None,
    teachers: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            metavar="CARD",
            help="Card of a teacher. Repeatable; default: the cards in teachers/.",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Prompt file, or DOMAIN=FILE if its name does not contain the domain. Repeatable; "
            "default: the files below data/.",
        ),
    ] = None,
) -> None:
    """Write a recipe from the given files, or from those in teachers/ and data/.

    Files with eval, test or a similar word in their names are for evaluation, the others for training.

    The recipe passes `mergeopd check`. Existing files are not overwritten.

    Example: mergeopd new recipe mine --student experts/base --prompts experts/data/merge_sort.jsonl
    """
    from mergeopd.preflight.summary import CheckResult
    from mergeopd.scaffold.recipe import NewRecipeOptions, new_recipe

    options = NewRecipeOptions(name, student, teachers or (), prompts or ())
    inputs, left_out = new_recipe(options)
    show_notes((*(f"left out {text}" for text in left_out), *inputs.notes))
    typer.echo(f"{options.recipe_file}: written. {CheckResult.of(inputs)}.")
    typer.echo(f"Try it: mergeopd run {options.recipe_file} --updates 2")


@new.command()
def teacher(
    name: Annotated[
        str, typer.Argument(help="Name of the teacher; the file is teachers/NAME.yaml.", metavar="NAME")
    ],
    model: Annotated[
        str, typer.Option(metavar="DIR", help="Hugging Face folder, or a hub id in the local cache.")
    ],
    domains: Annotated[
        list[str] | None,
        typer.Option("--domain", metavar="D", help="Domain that it teaches. Repeatable; default: its name."),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Chat template (Jinja); default: the tokenizer's."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Prompt for the sample in the card, preferably one of its domain."),
    ] = None,
) -> None:
    """Write a teacher's card with a sample response, by which a run can verify the model.

    Loads the model to generate at most 64 tokens. Existing files are not overwritten.

    Example: mergeopd new teacher sort --model experts/sort --prompt "sort q v o r e"
    """
    from mergeopd.scaffold import teacher as scaffold

    text = scaffold.DEFAULT_PROMPT if prompt is None else prompt
    options = scaffold.NewTeacherOptions(name, model, domains or (), template, text)
    probed = scaffold.probe(options)
    with waiting(f"Loading {model} to generate a sample"):
        canary = scaffold.take_canary(probed, text)
    scaffold.write_card(options, probed.fingerprint, canary)
    typer.echo(f"{name} responds: {json.dumps(canary.response, ensure_ascii=False)}")
    typer.echo(f"{options.card_file}: written. A recipe uses it by `{name}: {options.card_file}`.")
