"""The commands `run` and `eval`, from recipe to exit."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from mergeopd.distributed.communicator import Communicator, SingleProcess
from mergeopd.distributed.rendezvous import RankInfo, open_communicator
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.errors import Location, ModelError, Problem, RecipeError, StorageError, TeacherError
from mergeopd.messages import joined, shown
from mergeopd.preflight.inputs import Inputs, preflight
from mergeopd.preflight.models import check_student_folder
from mergeopd.preflight.parallelism import check_processes
from mergeopd.recipe.controls import Control, control_plan
from mergeopd.recipe.plan import EvaluationPlan, Plan
from mergeopd.recipe.resolve import read
from mergeopd.reporting.events import Note, Reporter, Reporters, StageStarted, StopRequested
from mergeopd.reporting.jsonl import RecordsReporter
from mergeopd.reporting.model_card import write_model_card
from mergeopd.reporting.page.html import HtmlReporter
from mergeopd.reporting.page.run_data import load_run
from mergeopd.reporting.result import Model, Result, read_result, write_result
from mergeopd.reporting.terminal.console import console_reporter
from mergeopd.reporting.terminal.result import ResultTable
from mergeopd.reporting.trackers.reporter import TrackersReporter, trackers_of
from mergeopd.reward.grading import Verifiers
from mergeopd.storage.folders import MODEL_CARD, prune, set_aside, verify
from mergeopd.storage.lock import exclusive
from mergeopd.storage.metrics import MetricsFile
from mergeopd.storage.run_folder import RunFolder
from mergeopd.teacher.target_folder import Manifest, setting_of

if TYPE_CHECKING:
    from mergeopd.reporting.comparison import Measured


def run_recipe(
    recipe: Path,
    overrides: Sequence[str],
    max_updates: int | None,
    allowed_changes: Sequence[str],
    console: Console | None = None,
    listener: Reporter | None = None,
    *,
    fresh: bool = False,
    control: Control | None = None,
) -> None:
    """Run a recipe or one of its controls, or resume it, for at most `max_updates` updates.

    `fresh` moves an earlier run aside first.

    A control that ends is compared with the run, if that has been evaluated. The first process shows progress
    on `console` (default: stdout); `listener` gets every event before that. If the run has several
    processes, all of them call this with the same arguments.
    """
    clock, place = Clock(), RankInfo.of()
    is_first, alone = place.rank == 0, place.world == 1
    console = Console() if console is None else console
    # Until `train` listens to signals, nothing has to be saved, and one ends the process at once.
    with ExitStack() as held, _display(console, is_first) as display:
        events: Reporter = Reporters(listener, display) if listener is not None and is_first else display
        with clock.stage("startup"):
            announce = announcer(events)
            announce(f"reading {shown(recipe)}")
            ranks = SingleProcess() if alone else held.enter_context(open_communicator(place, grouped=True))
            inputs = claim(
                recipe,
                overrides,
                allowed_changes,
                ranks,
                held,
                console,
                announce,
                fresh=fresh,
                is_smoke=max_updates is not None,
                control=control,
            )
            if alone and inputs is not None:
                ranks = held.enter_context(
                    open_communicator(place, grouped=inputs.plan.student.backend == "megatron")
                )
        if inputs is not None:
            interrupt = Interrupt(lambda name: display.emit(StopRequested(name)))
            train(inputs, clock, max_updates, ranks, events, interrupt)
        compared = None
        if control is not None:
            compared = _compare(recipe, overrides, control, ranks, events, is_new=inputs is not None)
    if compared is not None and is_first:
        console.print(compared)


def _display(console: Console, is_first: bool) -> AbstractContextManager[Reporter]:
    """Return the terminal's reporter; on other processes than the first, one that shows nothing."""
    return console_reporter(console) if is_first else nullcontext(Reporters())


def announcer(reporter: Reporter) -> Callable[[str], None]:
    """Return a function that reports what the start of a run is doing."""
    return lambda text: reporter.emit(StageStarted("startup", text))


def claim(
    recipe: Path,
    overrides: Sequence[str],
    allowed_changes: Sequence[str],
    ranks: Communicator,
    held: ExitStack,
    console: Console | None = None,
    announce: Callable[[str], None] = lambda _: None,
    *,
    fresh: bool = False,
    is_smoke: bool = False,
    control: Control | None = None,
) -> Inputs | None:
    """Lock the run folder until `held` is closed; return None for a finished run. Collective."""
    mine: list[Inputs] = []

    def take() -> bool:
        check_inputs = partial(
            preflight,
            recipe,
            overrides,
            control=control,
            announce=announce,
            with_servers=fresh or not _is_trained(recipe, overrides, control),
        )
        inputs = check_inputs()
        try_verifiers(inputs)
        check_processes(inputs.plan, ranks.size)
        folder = RunFolder(Path(inputs.plan.output))
        replaces = folder.is_replaceable(inputs.plan, inputs.files, allowed_changes)
        if (fresh or replaces) and (aside := folder.set_aside()) is not None:
            what = "a smoke run (--updates) with other settings" if replaces else "the earlier run"
            note = (
                f"{what} was moved from {shown(folder.path)} to {shown(aside)}; delete it if it is not needed"
            )
            # Templates may show the start of the run, which is now.
            inputs = check_inputs()
            inputs = replace(inputs, notes=(*inputs.notes, note))
        if control is not None and (plan := read(recipe, overrides).plan) is not None:
            RunFolder(Path(plan.output)).check(plan, inputs.files, allowed_changes)
        # Check before a lock is created in a folder of another run.
        folder.check(inputs.plan, inputs.files, allowed_changes)
        held.enter_context(exclusive(folder.path))
        folder.claim(inputs.plan, inputs.files, inputs.now, allowed_changes, is_smoke=is_smoke)
        mine.append(inputs)
        is_measured = inputs.plan.evaluation is None or _result(folder) is not None
        if is_measured and folder.export.exists() and verify(folder.export) is None:
            _show_finished(folder, Console() if console is None else console)
            return False
        return True

    if not ranks.run_on_first(take):
        return None
    # The others read after rank 0 has written the start of the run, which templates may show.
    return mine[0] if mine else _same_inputs(recipe, overrides, control)


def _is_trained(recipe: Path, overrides: Sequence[str], control: Control | None) -> bool:
    """Whether a run has exported its student, and therefore needs no inference servers any more."""
    plan = read(recipe, overrides).plan
    if plan is not None and control is not None:
        plan = control_plan(plan, control)
    return plan is not None and RunFolder(Path(plan.output)).export.exists()


def _same_inputs(recipe: Path, overrides: Sequence[str], control: Control | None = None) -> Inputs:
    """Read this process's inputs. Raises StorageError unless they are those of rank 0."""
    inputs = preflight(recipe, overrides, control=control, with_servers=False)
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
    events: Reporter | None = None,
    interrupt: Interrupt | None = None,
) -> None:
    """Build the run, restore the state of the run folder, and train to the end. Collective.

    A student on Megatron needs torch's default process group, which must be that of `ranks`.
    """
    events = Reporters() if events is None else events
    interrupt = Interrupt() if interrupt is None else interrupt
    folder, announce = RunFolder(Path(inputs.plan.output)), announcer(events)
    with clock.stage("startup"):
        # torch and transformers take seconds to import, so all checks that need neither come first.
        announce("importing torch and transformers")
        from mergeopd.engine.build import build
        from mergeopd.engine.models import Machine, load_models
        from mergeopd.models.causal import pick_device

        quiet_libraries()
        announce(f"loading {shown(Path(inputs.plan.student.model))}")
        models = load_models(inputs, Machine(pick_device(), ranks), announce=announce)
        announce("looking for a checkpoint")
        record = models.checkpoints().restore(ranks.run_on_first(folder.plan_hashes), events)
        num_done = ranks.run_on_first(lambda: _settled(inputs.plan, folder, record.progress.update, events))
    clock.continue_from(record.seconds)
    with interrupt.listening(), ExitStack() as opened:
        reporter: Reporter = Reporters()
        if ranks.is_first:
            reporter = _reporters(inputs, folder, num_done, opened, events)
            report_notes(inputs, reporter, models.notes)
        trainer = build(models, reporter=reporter, clock=clock, interrupt=interrupt)
        opened.callback(trainer.pipeline.close)
        if ranks.is_first and num_done:
            done = load_run(folder.path)
            trainer.alarms.replay(done.updates, done.accuracy, done.alarms)
        trainer.run(replace(record.progress, update=num_done), max_updates)


def _compare(
    recipe: Path,
    overrides: Sequence[str],
    control: Control,
    ranks: Communicator,
    reporter: Reporter,
    *,
    is_new: bool,
) -> ResultTable | str | None:
    """Evaluate a finished run again with its control, which `is_new` or missing in its result. Collective.

    Responses of other models are those kept. Returns what to show at the end.
    """
    from mergeopd.reporting.comparison import build_result
    from mergeopd.reporting.page.html import write_report

    gc.collect()  # the control's student and optimizer contain reference cycles
    inputs = preflight(recipe, overrides, with_servers=False)
    folder, plan = RunFolder(Path(inputs.plan.output)), inputs.plan.evaluation
    before = ranks.run_on_first(lambda: _result(folder))
    if plan is None:
        return None
    if before is None:
        return "Run the recipe without --control; its evaluation then measures this control, too."
    if not is_new and Model.control(control).key in {model.key for model in before.models}:
        return None
    with ExitStack() as held:
        ranks.run_on_first(lambda: held.enter_context(exclusive(folder.path)))
        measured = _measure(inputs, plan, folder.export, folder.evaluation, (), ranks, reporter)
        document = build_result(measured, before.seconds, before.update)
        document = replace(document, alarms=before.alarms, text_kept=before.text_kept)
        if ranks.is_first:
            write_result(folder.result_file, document)
            write_model_card(folder.path, folder.export, Reporters())
            write_report(folder.path)
    paths = {"result": folder.result_file, "student": folder.export}
    return ResultTable(document, {name: Path(shown(path)) for name, path in paths.items()})


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
    if trackers := trackers_of(inputs.plan.report.trackers):
        own = TrackersReporter(trackers, inputs.plan, folder.path, console)
        reporters.append(opened.enter_context(own))
    return Reporters(*reporters, console)


def evaluate_recipe(
    recipe: Path,
    overrides: Sequence[str],
    model: Path | None,
    output: Path | None,
    only: Sequence[str],
    console: Console,
) -> Result:
    """Evaluate a folder as the recipe's merged student, show the table and return the result document.

    `only` are the keys of the models that may be loaded; none: all.
    If there are several processes, all of them call this with the same arguments and evaluate a share each.
    """
    import time

    from mergeopd.reporting.comparison import build_result

    place = RankInfo.of()
    with _display(console, place.rank == 0) as display, open_communicator(place, grouped=False) as ranks:
        announce = announcer(display)
        announce(f"reading {shown(recipe)}")
        inputs = preflight(recipe, overrides, announce=announce, with_servers=False)
        if inputs.plan.evaluation is None:
            where = Location(shown(recipe))
            raise RecipeError([Problem(where, "evaluation", "missing section", "add `evaluation.prompts`")])
        try_verifiers(inputs)
        _check_only(only, inputs.plan.experts, inputs.plan.evaluation)
        export = model or Path(inputs.plan.output) / "export"
        needs_export = model is not None or not only or "merged" in only
        if model is None and needs_export and not export.is_dir():
            raise ModelError(
                f"{export}: the run has not exported a student yet; run it, or name a folder with --model"
            )
        merged = export if needs_export or export.is_dir() else None
        if merged is not None:
            check_student_folder(merged, inputs.student)
        if output is not None and output.is_dir():
            raise StorageError(f"{output}: is a folder; name a file")
        folder = RunFolder(Path(inputs.plan.output))
        responses = folder.evaluation if model is None else None if output is None else output.with_suffix("")
        start = time.perf_counter()
        measured = _measure(inputs, inputs.plan.evaluation, merged, responses, only, ranks, display)
        document = build_result(measured, {"evaluation": time.perf_counter() - start})
        if output is not None and ranks.is_first:
            write_result(output, document)
    if place.rank == 0:
        console.print(ResultTable(document, {"result": output, "student": merged and Path(shown(merged))}))
    return document


def record_targets(
    recipe: Path, overrides: Sequence[str], only: Sequence[str], console: Console
) -> dict[str, Manifest]:
    """Write the targets of the recipe's teachers for its fixed text; return their manifests.

    `only` are names of teachers; none: all that have `targets`. If there are several processes, all of them
    call this with the same arguments and write a share each.
    """
    place = RankInfo.of()
    with ExitStack() as held:
        display = held.enter_context(_display(console, place.rank == 0))
        ranks = held.enter_context(open_communicator(place, grouped=False))
        announce = announcer(display)
        announce(f"reading {shown(recipe)}")
        inputs = preflight(recipe, overrides, announce=announce, records=True)
        folders = {name: t.targets for name, t in inputs.plan.teachers.items() if t.targets is not None}
        if not folders:
            cause = "no teacher has a folder for its targets"
            raise RecipeError([Problem(Location(shown(recipe)), "teachers", cause, "add `targets: FOLDER`")])
        for name in (name for name in only if name not in folders):
            known = joined(list(folders), "and")
            raise TeacherError(f"--teacher {name}: teachers with `targets` are {known}; name one of them")
        announce("importing torch and transformers")
        from mergeopd.engine.build import build_recorders
        from mergeopd.engine.models import Machine
        from mergeopd.engine.stages import Stages
        from mergeopd.models.causal import pick_device

        quiet_libraries()
        report_notes(inputs, display)
        names = [name for name in folders if not only or name in only]
        for name in names:
            lock = partial(exclusive, Path(folders[name]), setting_of(name))
            ranks.run_on_first(lambda lock=lock: held.enter_context(lock()))  # type: ignore[misc]
        stages = Stages(display, Clock(), ranks, None)
        recorders = build_recorders(inputs, names, Machine(pick_device(), ranks), stages)
        return {each.teacher.name: each.record(sequences) for each, sequences in recorders}


def _check_only(only: Sequence[str], experts: Sequence[str], plan: EvaluationPlan) -> None:
    known = ["base", *(f"expert/{name}" for name in experts)]
    known += [*(f"merge/{merge.kind}" for merge in plan.static_merges), "merged"]
    for name in only:
        if name not in known:
            names = joined(known, "or")
            raise ModelError(f"--only {name}: the recipe measures no such model; name {names}")


def _measure(
    inputs: Inputs,
    plan: EvaluationPlan,
    merged: Path | None,
    responses: Path | None,
    only: Sequence[str],
    ranks: Communicator,
    reporter: Reporter,
) -> Measured:
    """Evaluate, and keep the responses. Collective."""
    announcer(reporter)("importing torch and transformers")
    from mergeopd.engine.build import build_evaluation
    from mergeopd.engine.models import Machine
    from mergeopd.engine.stages import Stages
    from mergeopd.models.causal import pick_device

    quiet_libraries()
    report_notes(inputs, reporter)
    stages = Stages(reporter, Clock(), ranks, None)
    evaluation = build_evaluation(inputs, plan, Machine(pick_device(), ranks), stages)
    return evaluation.run(merged, responses, only)


def try_verifiers(inputs: Inputs) -> None:
    """Import the functions that the recipe allows, to report mistakes in them before the evaluation."""
    plan = inputs.plan
    sources = (*plan.sources, *(plan.evaluation.sources if plan.evaluation else ()))
    specs = {str(index): s.verifier for index, s in enumerate(sources) if s.verifier is not None}
    with Verifiers(specs, plan.allow_code, 1) as verifiers:
        verifiers.start()


def report_notes(inputs: Inputs, reporter: Reporter, more: Sequence[str] = ()) -> None:
    for note in (*inputs.notes, *more):
        reporter.emit(Note(note))


def quiet_libraries() -> None:
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
        files["card"] = folder.export / MODEL_CARD
        paths = {name: Path(shown(path)) for name, path in files.items() if path.exists()}
        console.print(ResultTable(result, paths))


def _result(folder: RunFolder) -> Result | None:
    with suppress(ValueError):
        return read_result(folder.result_file)
    return None
