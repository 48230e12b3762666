"""The command line: `mergeopd run | check | eval | report | schema | tokenizers | new`.

Exit codes: 0 good; 2 the recipe or the command's arguments are wrong; 3 stopped on request (SIGTERM, Ctrl-C)
with everything saved; 130 interrupted at once (second Ctrl-C); 1 anything else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.core import TyperOption

from mergeopd import __version__
from mergeopd.engine.processes import Place, Told, claims_before_meeting, join_launcher
from mergeopd.errors import (
    MAX_SHOWN,
    EndedElsewhere,
    MergeopdError,
    Problem,
    ProcessError,
    RecipeError,
    Stopped,
    printable,
)
from mergeopd.report.failure import show_error

if TYPE_CHECKING:
    from mergeopd.engine.preflight import Inputs

app = typer.Typer(
    help="Merge many expert language models into one student by on-policy distillation.",
    epilog="Completion in your shell: mergeopd --install-completion",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value, e.g. optimizer.lr=2e-6. May be repeated."
    ),
]

_LARGE_TEXT = 1 << 20  # bytes; more takes longer than a person expects


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mergeopd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    updates: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stop after this many updates of this call, for a smoke run."),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Go on although this value of the plan, or file, has changed since the run began. "
            "May be repeated.",
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="In N processes on this machine, for student.parallel."),
    ] = None,
) -> None:
    """Run a merge, or go on with one. Ctrl-C saves and stops; the same command goes on.

    Example: mergeopd run recipes/quickstart.yaml --set optimizer.lr=1e-3
    """
    place = Place.of()
    with _told_once(place):
        if nproc is not None and place.world > 1:
            raise ProcessError(f"--nproc {nproc}, but this is {place.name} already; leave it out")
        try:
            if nproc is not None and nproc > 1:
                from mergeopd.engine.launch import launch_run

                raise typer.Exit(launch_run(recipe, overrides or [], updates, allow_change or [], nproc))
            from mergeopd.engine.command import run_recipe

            run_recipe(recipe, overrides or [], updates, allow_change or [])
        except KeyboardInterrupt:
            if place.rank == 0:
                typer.echo("Interrupted. The same command goes on from the newest checkpoint.", err=True)
            raise typer.Exit(130) from None


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find every mistake in a recipe and in all it names, without loading a model.

    Exits with 0 when all is good and with 2 when the recipe is wrong.

    Example: mergeopd check recipes/quickstart.yaml
    """
    from mergeopd.engine.preflight import advice, preflight
    from mergeopd.engine.run_folder import RunFolder

    try:
        inputs = preflight(recipe, overrides or [])
    except RecipeError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "problems": [_as_json(p) for p in error.problems]}, indent=2))
            raise typer.Exit(2) from None
        raise
    plan = inputs.plan
    refusal = RunFolder(Path(plan.output)).refusal(plan, inputs.files)
    notes = [note for note in (*inputs.notes, advice(plan), refusal) if note]
    if as_json:
        typer.echo(json.dumps({"ok": True, "plan": plan.hash, "notes": notes}, indent=2))
        return
    _show_notes(notes)
    typer.echo(f"{recipe}: good. {_size(inputs)}.")


@app.command(name="eval")
def evaluate(
    recipe: RecipeArgument,
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder to measure as the merged student; default: the run's export."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    overrides: SetOption = None,
) -> None:
    """Measure base, experts, their weight average and a merged student on the recipe's evaluation prompts.

    Example: mergeopd eval recipes/quickstart.yaml --model runs/quickstart/export
    """
    place = Place.of()
    with _told_once(place):
        from mergeopd.engine.command import evaluate_recipe

        try:
            evaluate_recipe(recipe, overrides or [], model, output)
        except KeyboardInterrupt:
            if place.world == 1:
                raise
            raise typer.Exit(130) from None


class Open(StrEnum):
    """Whether to show a page in the browser; `auto` where a person sits at a desktop."""

    auto = "auto"
    yes = "yes"
    no = "no"


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The run folder: a recipe's `output`.", show_default=False)],
    show: Annotated[Open, typer.Option("--open", help="Show the page in the browser.")] = Open.auto,
) -> None:
    """Make a run folder's report.html again: result, curves, sampled answers, time, recipe.

    Example: mergeopd report runs/quickstart --open no
    """
    from mergeopd.recipe.locate import shown
    from mergeopd.report.html import write_report

    path, notes = write_report(run)
    _show_notes(notes)
    typer.echo(shown(path))
    if show is Open.yes or (show is Open.auto and sys.stdout.isatty() and _has_desktop()):
        typer.launch(str(path))


def _has_desktop() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"})


@app.command()
def schema(
    card: Annotated[bool, typer.Option("--card", help="The schema of teacher cards instead.")] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors.

    Example: mergeopd schema > recipe.schema.json
    """
    from mergeopd.recipe.jsonschema import card_schema, recipe_schema

    typer.echo(json.dumps(card_schema() if card else recipe_schema(), indent=2))


@app.command()
def tokenizers(
    a: Annotated[str, typer.Argument(metavar="A", help="Tokenizer folder, or a hub id in the local cache.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text in UTF-8 to measure on; default: a short sample."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare two tokenizers: shared tokens, how their cuts of a text meet, special tokens, templates.

    Example: mergeopd tokenizers experts/base experts/sort --text README.md
    """
    from rich.console import Console

    from mergeopd.engine.tokenizer_pair import compare_tokenizers

    large = text is not None and text.is_file() and text.stat().st_size > _LARGE_TEXT
    with _waiting(f"Reading {text} with both") if large else nullcontext():
        pair = compare_tokenizers(a, b, text)
    if as_json:
        typer.echo(json.dumps(pair.document(), indent=2))
    else:
        Console().print(pair)


new = typer.Typer(
    help="Write a commented recipe, or the card of a teacher.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(new, name="new")


@new.command(name="recipe")
def new_recipe(
    name: Annotated[str, typer.Argument(help="Its name; the file is recipes/NAME.yaml.", metavar="NAME")],
    student: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the model to train.", show_default=False)
    ] = None,
    teachers: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            metavar="CARD",
            help="A teacher's card. May be repeated. Default: those in teachers/.",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Prompts; DOMAIN=FILE where the file's name does not tell the domain. May be repeated; "
            "default: those below data/.",
        ),
    ] = None,
) -> None:
    """Write a recipe of what is given, or of what lies in the current folder.

    Files with eval, test or the like in their names are measured on, others trained on.

    It passes `mergeopd check`, and overwrites nothing.

    Example: mergeopd new recipe mine --student experts/base --prompts experts/data/merge_sort.jsonl
    """
    from mergeopd.engine.new_recipe import RecipeWish
    from mergeopd.engine.new_recipe import new_recipe as write

    wish = RecipeWish(name, student, teachers or (), prompts or ())
    inputs, left_out = write(wish)
    _show_notes((*(f"left out {text}" for text in left_out), *inputs.notes))
    typer.echo(f"{wish.recipe_file}: written. {_size(inputs)}.")
    typer.echo(f"Try it: mergeopd run {wish.recipe_file} --updates 2")


@new.command(name="teacher")
def new_teacher(
    name: Annotated[str, typer.Argument(help="Its name; the file is teachers/NAME.yaml.", metavar="NAME")],
    model: Annotated[
        str,
        typer.Option(metavar="DIR", help="Hugging Face folder, or a hub id that is in the local cache."),
    ],
    domains: Annotated[
        list[str] | None,
        typer.Option("--domain", metavar="D", help="What it teaches. May be repeated; default: its name."),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Its chat template (Jinja); default: the tokenizer's."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What it answers to be recognised by; best one of its domain.",
        ),
    ] = None,
) -> None:
    """Write a teacher's card, with a sample of its own by which a run recognises it.

    It is loaded to answer one prompt, in at most 64 tokens. Nothing is overwritten.

    Example: mergeopd new teacher sort --model experts/sort --prompt "sort q v o r e"
    """
    from mergeopd.engine import new_teacher as engine

    asked = engine.DEFAULT_PROMPT if prompt is None else prompt
    wish = engine.TeacherWish(name, model, domains or (), template, asked)
    candidate = engine.examine(wish)
    with _waiting(f"Loading {model} to have it answer"):
        canary = engine.take_canary(candidate, asked)
    engine.write_card(wish, candidate.fingerprint, canary)
    typer.echo(f"{name} says: {json.dumps(canary.response, ensure_ascii=False)}")
    typer.echo(f"{wish.card_file}: written. A recipe names it by `{name}: {wish.card_file}`.")


def _show_notes(notes: Sequence[str]) -> None:
    for note in notes[:MAX_SHOWN]:
        typer.echo(f"note: {printable(note)}")
    if len(notes) > MAX_SHOWN:
        typer.echo(f"note: ... and {len(notes) - MAX_SHOWN:,} more notes")


def _as_json(problem: Problem) -> dict[str, str | int]:
    return {
        "file": problem.location.file,
        "line": problem.location.line,
        "column": problem.location.column,
        "path": problem.path,
        "message": problem.message,
        "remedy": problem.remedy,
    }


def _size(inputs: Inputs) -> str:
    plan = inputs.plan
    return ", ".join(
        (
            _count(len(plan.teachers), "teacher"),
            _count(sum(len(prompts) for prompts in inputs.prompts.values()), "prompt"),
            f"{_count(plan.num_updates, 'update')} in {_count(len(plan.phases), 'phase')}",
        )
    )


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    """Say what takes its time: a clock that runs where a person looks, a line elsewhere."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        typer.echo(f"{text} ...", err=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


@contextmanager
def _told_once(place: Place) -> Iterator[None]:
    """Of several processes that end for an error one shows it; each ends with the code it has alone."""
    if place.world == 1:
        yield
        return
    # torch's warnings of peers that closed connections come with pages of addresses, from every process.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = 0
    try:
        yield
    except typer.Exit as exit_:
        code = exit_.exit_code
    except Stopped as error:
        code = 3
        if place.rank == 0:
            print(error, file=sys.stderr)
    except EndedElsewhere:
        code = 1
    except Told as told:
        code = _code(told.error)
        show_error(told.error)
    except Exception as error:  # noqa: BLE001 (is shown, and the process ends)
        code = _code(error)
        if claims_before_meeting(place).claim():
            show_error(error)
    if code:
        # Threads of a group that has lost a process may never end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fail(error: MergeopdError) -> NoReturn:
    """Show an error on stderr and exit."""
    show_error(error)
    sys.exit(_code(error))


def _code(error: BaseException) -> int:
    return 2 if isinstance(error, RecipeError) else 1


def main() -> None:
    """Entry point. Errors that mergeopd raises on purpose are shown without a traceback."""
    join_launcher()
    # Before torch is imported. OpenMP threads that wait by spinning take the cores from each other as soon as
    # anything else runs: the same merge took 3 to 8 times as long on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = typer.main.get_command(app)
    for parameter in command.params:
        if isinstance(parameter, TyperOption) and parameter.name in ("install_completion", "show_completion"):
            parameter.hidden = True  # asked for once, and in the way ever after
    try:
        command()
    except Stopped as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    except MergeopdError as error:
        _fail(error)
