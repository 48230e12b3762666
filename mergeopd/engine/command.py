"""What the commands `run` and `eval` do, from recipe to exit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mergeopd.engine.preflight import Inputs, preflight
from mergeopd.engine.run_folder import RunFolder
from mergeopd.errors import MergeopdError
from mergeopd.report.console import console_reporter
from mergeopd.report.events import Note, Reporter, Reporters
from mergeopd.report.jsonl import JsonlReporter
from mergeopd.report.result import ResultTable, result_document, write_result
from mergeopd.storage.metrics import MetricsFile


def run_recipe(recipe: Path, overrides: Sequence[str]) -> None:
    """Run a recipe from wherever its run folder stands."""
    inputs = preflight(recipe, overrides)
    folder = RunFolder(Path(inputs.plan.output))
    folder.claim(inputs.plan, inputs.files, inputs.now)
    if folder.is_finished(inputs.plan):
        folder.show_finished(Console())
        return
    # torch and transformers take seconds to import: after all that can go wrong without them.
    from mergeopd.engine.build import build, pick_device
    from mergeopd.engine.checkpoint import restore
    from mergeopd.engine.loop import Merge

    _quiet_libraries()
    with console_reporter(Console()) as console:
        parts = build(inputs, pick_device())
        progress = restore(folder.checkpoints, parts.student, inputs.plan, console)
        with MetricsFile(folder.metrics_file) as metrics:
            metrics.truncate_to(progress.update)
            reporter = Reporters(JsonlReporter(metrics), console)
            _tell_notes(inputs, reporter)
            Merge(parts, folder, reporter).run(progress)


def evaluate_recipe(recipe: Path, overrides: Sequence[str], model: Path | None, output: Path | None) -> None:
    """Measure a folder as the recipe's merged student and show the table."""
    inputs = preflight(recipe, overrides)
    if inputs.plan.evaluation is None:
        raise MergeopdError(f"{recipe} has no evaluation section; add evaluation.prompts")
    import time

    from mergeopd.engine.build import pick_device
    from mergeopd.engine.evaluate import Evaluation

    merged = model or Path(inputs.plan.output) / "export"
    if not merged.is_dir():
        raise MergeopdError(
            f"there is no model folder {merged}; run the recipe first, or name one with --model"
        )
    _quiet_libraries()
    console = Console()
    start = time.perf_counter()
    with console_reporter(console) as reporter:
        _tell_notes(inputs, reporter)
        accuracies = Evaluation(inputs, inputs.plan.evaluation, pick_device(), reporter).run(merged)
    document = result_document(accuracies, {"evaluation": time.perf_counter() - start})
    if output is not None:
        write_result(output, document)
    console.print(ResultTable(document, result_path=output, export_path=merged))


def _tell_notes(inputs: Inputs, reporter: Reporter) -> None:
    for note in inputs.notes:
        reporter.emit(Note(note))


def _quiet_libraries() -> None:
    """transformers draws progress bars of its own, across ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
