"""What the commands `run` and `eval` do, from recipe to exit."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mergeopd.engine.clock import Clock
from mergeopd.engine.grid_checks import check_processes
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.preflight import Inputs, preflight
from mergeopd.engine.processes import Place, open_ranks
from mergeopd.engine.reading import check_student_folder
from mergeopd.engine.run_folder import RunFolder
from mergeopd.errors import Location, ModelError, Problem, RecipeError, StorageError
from mergeopd.ranks import Alone, Ranks
from mergeopd.recipe.locate import shown
from mergeopd.recipe.plan import EvaluationPlan, Plan
from mergeopd.recipe.words import joined
from mergeopd.report.console import console_reporter
from mergeopd.report.events import Note, Reporter, Reporters
from mergeopd.report.html import HtmlReporter
from mergeopd.report.jsonl import JsonlReporter, SamplesReporter
from mergeopd.report.result import ResultTable, result_document, write_result
from mergeopd.report.tensorboard import TensorBoardReporter
from mergeopd.reward.grading import Verifiers
from mergeopd.storage import run_layout
from mergeopd.storage.folders import prune
from mergeopd.storage.lock import exclusive
from mergeopd.storage.metrics import MetricsFile


def run_recipe(
    recipe: Path, overrides: Sequence[str], max_updates: int | None, allowed_changes: Sequence[str]
) -> None:
    """Run a recipe from wherever its run folder stands, at most `max_updates` updates further.

    Where it was started as one of several processes, all of them call it alike.
    """
    clock = Clock()
    with ExitStack() as held:
        with clock.stage("startup"):
            place = Place.of()
            alone = place.world == 1
            ranks = Alone() if alone else held.enter_context(open_ranks(place, grouped=True))
            inputs = begin(recipe, overrides, allowed_changes, ranks, held)
            if inputs is None:
                return
            if alone:
                ranks = held.enter_context(
                    open_ranks(place, grouped=inputs.plan.student.backend == "megatron")
                )
        go_on(inputs, clock, max_updates, ranks)


def begin(
    recipe: Path, overrides: Sequence[str], allowed_changes: Sequence[str], ranks: Ranks, held: ExitStack
) -> Inputs | None:
    """Take the run folder, until `held` is closed; None where there is nothing left to do. Collective."""
    mine: list[Inputs] = []

    def take() -> bool:
        inputs = preflight(recipe, overrides)
        _try_verifiers(inputs)
        check_processes(inputs.plan, ranks.size)
        folder = RunFolder(Path(inputs.plan.output))
        # Before a lock is left in a stranger's folder.
        folder.check(inputs.plan, inputs.files, allowed_changes)
        held.enter_context(exclusive(folder.path))
        folder.claim(inputs.plan, inputs.files, inputs.now, allowed_changes)
        mine.append(inputs)
        if folder.is_finished(inputs.plan):
            folder.show_finished(Console())
            return False
        return True

    if not ranks.first(take):
        return None
    # The others read after the first has written when the run began, which templates may show.
    return mine[0] if mine else _same_inputs(recipe, overrides)


def _same_inputs(recipe: Path, overrides: Sequence[str]) -> Inputs:
    """What this process reads. Raises StorageError where the first one has another run or other files."""
    inputs = preflight(recipe, overrides)
    folder = RunFolder(Path(inputs.plan.output))
    if inputs.plan.hash not in folder.plan_hashes():
        raise StorageError(
            f"{platform.node()} does not find the run of the first process in {shown(folder.path)}; recipe, "
            "models and run folder must lie on a file system that all machines share, under one path"
        )
    others = [shown(Path(file)) for file in folder.other_files(inputs.files)]
    if others:
        raise StorageError(
            f"{platform.node()} has other contents in {joined(others, 'and')} "
            "than the machine of the first process; give every machine the same files"
        )
    return inputs


def go_on(inputs: Inputs, clock: Clock, max_updates: int | None, ranks: Ranks) -> None:
    """Build the parts, go to where the run folder stands, and on to the end. Collective.

    A student on Megatron needs torch's default process group, which must be that of `ranks`.
    """
    # torch and transformers take seconds to import: after all that can go wrong without them.
    from mergeopd.engine.build import build, pick_device
    from mergeopd.engine.checkpoint import restore
    from mergeopd.engine.loop import Merge

    _quiet_libraries()
    interrupt, folder = Interrupt(), RunFolder(Path(inputs.plan.output))
    with console_reporter(Console()) if ranks.is_first else nullcontext(Reporters()) as console:
        with clock.stage("startup"):
            parts = build(inputs, pick_device(), ranks)
            hashes = ranks.first(folder.plan_hashes)
            record = restore(folder.checkpoints, parts, hashes, console)
            num_done = ranks.first(lambda: _settled(inputs.plan, folder, record.progress.update, console))
        clock.continue_from(record.seconds)
        # Until here nothing is at stake, and a signal ends the process at once.
        with interrupt.listening(), ExitStack() as opened:
            opened.callback(parts.verifiers.close)
            reporter: Reporter = Reporters()
            if ranks.is_first:
                reporter = _reporters(inputs, folder, num_done, opened, console)
                _tell_notes(inputs, reporter)
            progress = replace(record.progress, update=num_done)
            Merge(parts, folder, reporter, clock, interrupt).run(progress, max_updates)


def _settled(plan: Plan, folder: RunFolder, num_done: int, console: Reporter) -> int:
    """Tidy what a kill left of the last time; how many updates are done."""
    prune(folder.checkpoints, plan.checkpoint.keep)
    if folder.settle_export(can_be_made_again=num_done > 0, reporter=console):
        return plan.num_updates  # also where its checkpoints were removed since
    return num_done


def _reporters(
    inputs: Inputs, folder: RunFolder, num_done: int, opened: ExitStack, console: Reporter
) -> Reporter:
    """All that tell of the run; files are cut back to `num_done` updates, and closed with `opened`."""
    metrics = opened.enter_context(MetricsFile(folder.metrics_file))
    samples = opened.enter_context(MetricsFile(folder.samples_file))
    num_told = metrics.truncate_to(num_done)
    samples.truncate_to(num_done)
    if num_told < num_done:
        name = shown(folder.metrics_file)
        console.emit(Note(f"{name} has lines of {num_told} of the {num_done} updates made so far"))
    files = (JsonlReporter(metrics), SamplesReporter(samples), HtmlReporter(folder.path, console))
    return Reporters(*files, *_asked_for(inputs.plan, folder, console), console)


def _asked_for(plan: Plan, folder: RunFolder, notes: Reporter) -> list[Reporter]:
    """Reporters that a recipe may have besides."""
    if not plan.report.tensorboard:
        return []
    return [TensorBoardReporter(folder.path / run_layout.TENSORBOARD, notes)]


def evaluate_recipe(recipe: Path, overrides: Sequence[str], model: Path | None, output: Path | None) -> None:
    """Measure a folder as the recipe's merged student and show the table.

    Where it was started as one of several processes, all of them call it alike and measure a share each.
    """
    place = Place.of()
    with open_ranks(place, grouped=False) as ranks:
        inputs = preflight(recipe, overrides)
        if inputs.plan.evaluation is None:
            where = Location(shown(recipe))
            raise RecipeError([Problem(where, "evaluation", "missing section", "add `evaluation.prompts`")])
        _try_verifiers(inputs)
        merged = model or Path(inputs.plan.output) / "export"
        if model is None and not merged.is_dir():
            raise ModelError(
                f"{merged}: the run has not exported a student yet; run it, or name a folder with --model"
            )
        check_student_folder(merged, inputs.student)
        if output is not None and output.is_dir():
            raise StorageError(f"{output}: is a folder; name a file")
        _measure(inputs, inputs.plan.evaluation, merged, output, ranks)


def _measure(inputs: Inputs, plan: EvaluationPlan, merged: Path, output: Path | None, ranks: Ranks) -> None:
    """Measure; the first process shows the table and writes the result. Collective."""
    import time

    from mergeopd.engine.build import pick_device
    from mergeopd.engine.evaluate import Evaluation

    _quiet_libraries()
    console = Console(quiet=not ranks.is_first)
    start = time.perf_counter()
    with console_reporter(console) if ranks.is_first else nullcontext(Reporters()) as reporter:
        _tell_notes(inputs, reporter)
        accuracies = Evaluation(inputs, plan, pick_device(), ranks, reporter).run(merged)
    document = result_document(accuracies, {"evaluation": time.perf_counter() - start})
    console.print(ResultTable(document, result_path=output, export_path=Path(shown(merged))))
    if output is not None and ranks.is_first:
        write_result(output, document)


def _try_verifiers(inputs: Inputs) -> None:
    """Import the functions that the recipe allows now: a mistake in them must not wait for the evaluation."""
    plan = inputs.plan
    sources = (*plan.sources, *(plan.evaluation.sources if plan.evaluation else ()))
    specs = {str(index): s.verifier for index, s in enumerate(sources) if s.verifier is not None}
    with Verifiers(specs, plan.allow_code, 1) as verifiers:
        verifiers.start()


def _tell_notes(inputs: Inputs, reporter: Reporter) -> None:
    for note in inputs.notes:
        reporter.emit(Note(note))


def _quiet_libraries() -> None:
    """transformers draws progress bars across ours, Megatron warns of what it lacks, torch of Megatron."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
