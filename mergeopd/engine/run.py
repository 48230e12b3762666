"""The commands `run` and `eval`, from recipe to exit."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mergeopd.distributed.communicator import Communicator, SingleProcess
from mergeopd.distributed.rendezvous import RankInfo, open_communicator
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.errors import Location, ModelError, Problem, RecipeError, StorageError
from mergeopd.messages import joined, shown
from mergeopd.preflight.inputs import Inputs, preflight
from mergeopd.preflight.models import check_student_folder
from mergeopd.preflight.parallelism import check_processes
from mergeopd.recipe.plan import EvaluationPlan, Plan
from mergeopd.reporting.events import Note, Reporter, Reporters
from mergeopd.reporting.jsonl import RecordsReporter
from mergeopd.reporting.page.html import HtmlReporter
from mergeopd.reporting.page.run_data import load_run
from mergeopd.reporting.result import Result, read_result, write_result
from mergeopd.reporting.tensorboard import TensorBoardReporter
from mergeopd.reporting.terminal.console import console_reporter
from mergeopd.reporting.terminal.result import ResultTable
from mergeopd.reward.grading import Verifiers
from mergeopd.storage import run_layout
from mergeopd.storage.folders import prune, set_aside, verify
from mergeopd.storage.lock import exclusive
from mergeopd.storage.metrics import MetricsFile
from mergeopd.storage.run_folder import RunFolder


def run_recipe(
    recipe: Path,
    overrides: Sequence[str],
    max_updates: int | None,
    allowed_changes: Sequence[str],
    console: Console | None = None,
    listener: Reporter | None = None,
) -> None:
    """Run a recipe or resume it, for at most `max_updates` updates.

    The first process shows progress on `console` (default: stdout); `listener` gets every event before that.
    If the run has several processes, all of them call this with the same arguments.
    """
    console = Console() if console is None else console
    clock = Clock()
    with ExitStack() as held:
        with clock.stage("startup"):
            place = RankInfo.of()
            alone = place.world == 1
            ranks = SingleProcess() if alone else held.enter_context(open_communicator(place, grouped=True))
            inputs = claim(recipe, overrides, allowed_changes, ranks, held, console)
            if inputs is None:
                return
            if alone:
                ranks = held.enter_context(
                    open_communicator(place, grouped=inputs.plan.student.backend == "megatron")
                )
        train(inputs, clock, max_updates, ranks, console, listener)


def claim(
    recipe: Path,
    overrides: Sequence[str],
    allowed_changes: Sequence[str],
    ranks: Communicator,
    held: ExitStack,
    console: Console | None = None,
) -> Inputs | None:
    """Lock the run folder until `held` is closed; return None for a finished run. Collective."""
    mine: list[Inputs] = []

    def take() -> bool:
        inputs = preflight(recipe, overrides)
        _try_verifiers(inputs)
        check_processes(inputs.plan, ranks.size)
        folder = RunFolder(Path(inputs.plan.output))
        # Check before a lock is created in a folder of another run.
        folder.check(inputs.plan, inputs.files, allowed_changes)
        held.enter_context(exclusive(folder.path))
        folder.claim(inputs.plan, inputs.files, inputs.now, allowed_changes)
        mine.append(inputs)
        is_measured = inputs.plan.evaluation is None or _result(folder) is not None
        if is_measured and folder.export.exists() and verify(folder.export) is None:
            _show_finished(folder, Console() if console is None else console)
            return False
        return True

    if not ranks.run_on_first(take):
        return None
    # The others read after rank 0 has written the start of the run, which templates may show.
    return mine[0] if mine else _same_inputs(recipe, overrides)


def _same_inputs(recipe: Path, overrides: Sequence[str]) -> Inputs:
    """Read this process's inputs. Raises StorageError unless they are those of rank 0."""
    inputs = preflight(recipe, overrides)
    folder = RunFolder(Path(inputs.plan.output))
    if inputs.plan.hash not in folder.plan_hashes():
        raise StorageError(
            f"{platform.node()}: the run of the first process is not in {shown(folder.path)}; recipe, models "
            "and run folder must be on a file system that all machines share, under the same path"
        )
    others = [shown(Path(file)) for file in folder.other_files(inputs.files)]
    if others:
        raise StorageError(
            f"{platform.node()} has other contents in {joined(others, 'and')} "
            "than the machine of the first process; give every machine the same files"
        )
    return inputs


def train(
    inputs: Inputs,
    clock: Clock,
    max_updates: int | None,
    ranks: Communicator,
    console: Console | None = None,
    listener: Reporter | None = None,
) -> None:
    """Build the run, restore the state of the run folder, and train to the end. Collective.

    A student on Megatron needs torch's default process group, which must be that of `ranks`.
    """
    # torch and transformers take seconds to import, so all checks that need neither come first.
    from mergeopd.engine.build import Machine, build, load_models
    from mergeopd.models.causal import pick_device

    _quiet_libraries()
    interrupt, folder = Interrupt(), RunFolder(Path(inputs.plan.output))
    shown_on = Console() if console is None else console
    with console_reporter(shown_on) if ranks.is_first else nullcontext(Reporters()) as display:
        events = display if listener is None or not ranks.is_first else Reporters(listener, display)
        with clock.stage("startup"):
            models = load_models(inputs, Machine(pick_device(), ranks))
            record = models.checkpoints().restore(ranks.run_on_first(folder.plan_hashes), events)
            num_done = ranks.run_on_first(
                lambda: _settled(inputs.plan, folder, record.progress.update, events)
            )
        clock.continue_from(record.seconds)
        # Up to here nothing has to be saved, and a signal ends the process at once.
        with interrupt.listening(), ExitStack() as opened:
            reporter: Reporter = Reporters()
            if ranks.is_first:
                reporter = _reporters(inputs, folder, num_done, opened, events)
                _report_notes(inputs, reporter)
            trainer = build(models, reporter=reporter, clock=clock, interrupt=interrupt)
            opened.callback(trainer.pipeline.close)
            if ranks.is_first and num_done:
                done = load_run(folder.path)
                trainer.alarms.replay(done.updates, done.accuracy, done.alarms)
            trainer.run(replace(record.progress, update=num_done), max_updates)


def _settled(plan: Plan, folder: RunFolder, num_done: int, reporter: Reporter) -> int:
    """Clean up after a killed process; return how many updates are done.

    A damaged export is reported and set aside, to be written again. Raises StorageError if no checkpoint is
    left for that: training from the beginning would overwrite the rest of the run.
    """
    prune(folder.checkpoints, plan.checkpoint.keep)
    if not folder.export.exists():
        return num_done
    fault = verify(folder.export)
    if fault is None:
        return plan.num_updates  # even if its checkpoints were removed
    if not num_done:
        raise StorageError(
            f"{shown(folder.export)}: {fault}, and no checkpoint is left to export from; "
            "move it away to train from the beginning, or choose another folder with --set output=..."
        )
    aside = set_aside(folder.export)
    reporter.emit(Note(f"the export was damaged ({fault}); it is written again, and kept in {shown(aside)}"))
    return num_done


def _reporters(
    inputs: Inputs, folder: RunFolder, num_done: int, opened: ExitStack, console: Reporter
) -> Reporter:
    """Build the run's reporters; files are truncated to `num_done` updates, and closed with `opened`."""
    from mergeopd.engine.samples import is_due

    metrics = opened.enter_context(MetricsFile(folder.metrics_file))
    samples = opened.enter_context(MetricsFile(folder.samples_file))
    accuracy = opened.enter_context(MetricsFile(folder.accuracy_file))
    alarms = opened.enter_context(MetricsFile(folder.alarms_file))
    num_recorded = metrics.truncate_to(num_done)
    num_sampled = samples.truncate_to(num_done)
    accuracy.truncate_to(num_done)
    alarms.truncate_to(num_done or -1)  # a start raises those of the inputs
    num_due = sum(is_due(update, inputs.plan.num_updates) for update in range(1, num_done + 1))
    if num_sampled < num_due:
        name = shown(folder.samples_file)
        console.emit(Note(f"{name} lacks sampled responses of the {num_done} updates made so far"))
    if num_recorded < num_done:
        name = shown(folder.metrics_file)
        console.emit(Note(f"{name} has lines of {num_recorded} of the {num_done} updates made so far"))
    reporters: list[Reporter] = [
        RecordsReporter(metrics, samples, accuracy, alarms),
        HtmlReporter(folder.path, console),
    ]
    if inputs.plan.report.tensorboard:
        reporters.append(TensorBoardReporter(folder.path / run_layout.TENSORBOARD, console))
    return Reporters(*reporters, console)


def evaluate_recipe(
    recipe: Path, overrides: Sequence[str], model: Path | None, output: Path | None, console: Console
) -> Result:
    """Evaluate a folder as the recipe's merged student, show the table and return the result document.

    If there are several processes, all of them call this with the same arguments and evaluate a share each.
    """
    place = RankInfo.of()
    with open_communicator(place, grouped=False) as ranks:
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
        folder = RunFolder(Path(inputs.plan.output))
        responses = folder.evaluation if model is None else None if output is None else output.with_suffix("")
        return _measure(inputs, inputs.plan.evaluation, merged, output, responses, ranks, console)


def _measure(
    inputs: Inputs,
    plan: EvaluationPlan,
    merged: Path,
    output: Path | None,
    responses: Path | None,
    ranks: Communicator,
    console: Console,
) -> Result:
    """Evaluate; rank 0 shows the table, writes the result and keeps the responses. Collective."""
    import time

    from mergeopd.engine.build import Machine, build_evaluation
    from mergeopd.engine.stages import Stages
    from mergeopd.models.causal import pick_device
    from mergeopd.reporting.comparison import build_result

    _quiet_libraries()
    console = console if ranks.is_first else Console(quiet=True)
    start = time.perf_counter()
    with console_reporter(console) if ranks.is_first else nullcontext(Reporters()) as reporter:
        _report_notes(inputs, reporter)
        stages = Stages(reporter, Clock(), ranks, None)
        evaluation = build_evaluation(inputs, plan, Machine(pick_device(), ranks), stages)
        measured = evaluation.run(merged, responses)
    document = build_result(measured, {"evaluation": time.perf_counter() - start})
    console.print(ResultTable(document, {"result": output, "student": Path(shown(merged))}))
    if output is not None and ranks.is_first:
        write_result(output, document)
    return document


def _try_verifiers(inputs: Inputs) -> None:
    """Import the functions that the recipe allows, to report mistakes in them before the evaluation."""
    plan = inputs.plan
    sources = (*plan.sources, *(plan.evaluation.sources if plan.evaluation else ()))
    specs = {str(index): s.verifier for index, s in enumerate(sources) if s.verifier is not None}
    with Verifiers(specs, plan.allow_code, 1) as verifiers:
        verifiers.start()


def _report_notes(inputs: Inputs, reporter: Reporter) -> None:
    for note in inputs.notes:
        reporter.emit(Note(note))


def _quiet_libraries() -> None:
    """Silence progress bars of transformers, and irrelevant warnings of Megatron and torch."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _show_finished(folder: RunFolder, console: Console) -> None:
    console.print(f"This run is finished: {shown(folder.path)}", highlight=False)
    result = _result(folder)
    if result is not None:
        files = {"result": folder.result_file, "student": folder.export, "report": folder.report_file}
        paths = {name: Path(shown(path)) for name, path in files.items() if path.exists()}
        console.print(ResultTable(result, paths))


def _result(folder: RunFolder) -> Result | None:
    with suppress(ValueError):
        return read_result(folder.result_file)
    return None
