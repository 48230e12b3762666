"""What the commands `run` and `eval` do, from recipe to exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.preflight import Inputs, preflight
from mergeopd.engine.reading import check_student_folder
from mergeopd.engine.run_folder import RunFolder
from mergeopd.errors import Location, ModelError, Problem, RecipeError, StorageError
from mergeopd.recipe.locate import shown
from mergeopd.recipe.plan import Plan
from mergeopd.report.console import console_reporter
from mergeopd.report.events import Note, Reporter, Reporters
from mergeopd.report.html import HtmlReporter
from mergeopd.report.jsonl import JsonlReporter, SamplesReporter
from mergeopd.report.result import ResultTable, result_document, write_result
from mergeopd.report.tensorboard import TensorBoardReporter
from mergeopd.reward.verifiers import build_verifier
from mergeopd.storage import run_layout
from mergeopd.storage.folders import prune
from mergeopd.storage.lock import exclusive
from mergeopd.storage.metrics import MetricsFile


def run_recipe(
    recipe: Path, overrides: Sequence[str], max_updates: int | None, allowed_changes: Sequence[str]
) -> None:
    """Run a recipe from wherever its run folder stands, at most `max_updates` updates further."""
    clock = Clock()
    with clock.stage("startup"):
        inputs = preflight(recipe, overrides)
        _try_verifiers(inputs)
    folder = RunFolder(Path(inputs.plan.output))
    folder.check(inputs.plan, inputs.files, allowed_changes)  # before a lock is left in a stranger's folder
    with exclusive(folder.path):
        folder.claim(inputs.plan, inputs.files, inputs.now, allowed_changes)
        if folder.is_finished(inputs.plan):
            folder.show_finished(Console())
            return
        _run(inputs, folder, clock, max_updates)


def _run(inputs: Inputs, folder: RunFolder, clock: Clock, max_updates: int | None) -> None:
    """Build the parts, go to where the folder stands, and on to the end."""
    # torch and transformers take seconds to import: after all that can go wrong without them.
    from mergeopd.engine.build import build, pick_device
    from mergeopd.engine.checkpoint import restore
    from mergeopd.engine.loop import Merge

    _quiet_libraries()
    interrupt = Interrupt()
    with console_reporter(Console()) as console:
        with clock.stage("startup"):
            parts = build(inputs, pick_device())
            hashes = folder.plan_hashes()
            record = restore(folder.checkpoints, parts.student, parts.past, hashes, console)
            prune(folder.checkpoints, inputs.plan.checkpoint.keep)  # what a kill left of the last time
            num_done = record.progress.update
            if folder.settle_export(can_be_made_again=num_done > 0, reporter=console):
                num_done = inputs.plan.num_updates  # also where its checkpoints were removed since
        clock.continue_from(record.seconds)
        # Until here nothing is at stake, and a signal ends the process at once.
        with (
            interrupt.listening(),
            MetricsFile(folder.metrics_file) as metrics,
            MetricsFile(folder.samples_file) as samples,
        ):
            num_told = metrics.truncate_to(num_done)
            samples.truncate_to(num_done)
            if num_told < num_done:
                name = shown(folder.metrics_file)
                console.emit(Note(f"{name} has lines of {num_told} of the {num_done} updates made so far"))
            files = (JsonlReporter(metrics), SamplesReporter(samples), HtmlReporter(folder.path, console))
            reporter = Reporters(*files, *_asked_for(inputs.plan, folder, console), console)
            _tell_notes(inputs, reporter)
            progress = replace(record.progress, update=num_done)
            Merge(parts, folder, reporter, clock, interrupt).run(progress, max_updates)


def _asked_for(plan: Plan, folder: RunFolder, notes: Reporter) -> list[Reporter]:
    """Reporters that a recipe may have besides."""
    if not plan.report.tensorboard:
        return []
    return [TensorBoardReporter(folder.path / run_layout.TENSORBOARD, notes)]


def evaluate_recipe(recipe: Path, overrides: Sequence[str], model: Path | None, output: Path | None) -> None:
    """Measure a folder as the recipe's merged student and show the table."""
    import time

    inputs = preflight(recipe, overrides)
    if inputs.plan.evaluation is None:
        place = Location(shown(recipe))
        raise RecipeError([Problem(place, "evaluation", "missing section", "add `evaluation.prompts`")])
    _try_verifiers(inputs)
    merged = model or Path(inputs.plan.output) / "export"
    if model is None and not merged.is_dir():
        raise ModelError(
            f"{merged}: the run has not exported a student yet; run it, or name a folder with --model"
        )
    check_student_folder(merged, inputs.student)
    if output is not None and output.is_dir():
        raise StorageError(f"{output}: is a folder; name a file")

    from mergeopd.engine.build import pick_device
    from mergeopd.engine.evaluate import Evaluation

    _quiet_libraries()
    console = Console()
    start = time.perf_counter()
    with console_reporter(console) as reporter:
        _tell_notes(inputs, reporter)
        accuracies = Evaluation(inputs, inputs.plan.evaluation, pick_device(), reporter).run(merged)
    document = result_document(accuracies, {"evaluation": time.perf_counter() - start})
    console.print(ResultTable(document, result_path=output, export_path=Path(shown(merged))))
    if output is not None:
        write_result(output, document)


def _try_verifiers(inputs: Inputs) -> None:
    """Import the functions that the recipe allows now: a mistake in them must not wait for the evaluation."""
    plan = inputs.plan
    for source in (*plan.sources, *(plan.evaluation.sources if plan.evaluation else ())):
        if source.verifier is not None:
            build_verifier(source.verifier, plan.allow_code)


def _tell_notes(inputs: Inputs, reporter: Reporter) -> None:
    for note in inputs.notes:
        reporter.emit(Note(note))


def _quiet_libraries() -> None:
    """transformers draws progress bars of its own, across ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
