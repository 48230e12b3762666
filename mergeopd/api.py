"""The Python API, exported by `import mergeopd`. The command line calls the same functions.

Importing this module imports neither torch nor transformers; `run` and `evaluate` do when they are called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mergeopd.config.folders import unwritable
from mergeopd.errors import RecipeError, StorageError, UpdateLimitReached
from mergeopd.messages import option_problem
from mergeopd.preflight.inputs import advice, preflight
from mergeopd.preflight.residency import residency_notes
from mergeopd.preflight.summary import CheckResult
from mergeopd.recipe.controls import Control, control_plan
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.resolve import read
from mergeopd.reporting.estimate import Estimate
from mergeopd.reporting.events import Event
from mergeopd.reporting.result import Result
from mergeopd.reporting.run_result import RunResult, load_run
from mergeopd.storage import run_layout
from mergeopd.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

    from mergeopd.reporting.contribution import Contribution
    from mergeopd.reporting.inspection import Inspection
    from mergeopd.teacher.target_folder import Manifest

__all__ = [
    "CheckResult",
    "RunResult",
    "check",
    "evaluate",
    "inspect",
    "launch",
    "load",
    "load_run",
    "plan",
    "record_targets",
    "report",
    "run",
]

Overrides = Mapping[str, object] | Sequence[str]
"""Values that replace those of a recipe: `{"optimizer.lr": 1e-5}`, or texts as for `--set`."""


def load(path: str | Path, *, set: Overrides = ()) -> Plan:
    """Read a recipe and the teacher cards that it names, and resolve every default.

    Model folders and prompt files must exist, but are not opened; `check` opens them.

    Raises:
        RecipeError: with every problem found, each with its place and remedy.
    """
    resolution = read(path, _as_texts(set))
    if resolution.plan is None or resolution.problems:
        raise RecipeError(resolution.origins.in_order(resolution.problems))
    return resolution.plan


def check(path: str | Path, *, set: Overrides = ()) -> CheckResult:
    """Find every mistake in a recipe and in the files that it names, without loading a model.

    Raises:
        RecipeError: with every problem found, each with its place and remedy.
        StorageError: the plan in the run folder is damaged.
    """
    inputs = preflight(path, _as_texts(set))
    refusal = RunFolder(Path(inputs.plan.output)).refusal(inputs.plan, inputs.files)
    return CheckResult.of(inputs, advice(inputs.plan), refusal, *residency_notes(inputs.plan))


def plan(
    path: str | Path,
    *,
    set: Overrides = (),
    hardware: str | Path | None = None,
    num_processes: int | None = None,
    models: Mapping[str, str | Path] = MappingProxyType({}),
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    fit: bool = False,
) -> Estimate:
    """Estimate memory, time and the cost of each teacher of a run, from sizes alone.

    Weights and data need not be on this machine, and torch is not imported.

    Args:
        path: the recipe.
        set: values that replace those of the recipe.
        hardware: devices such as `h200x8` or `cpu:16,64GiB`, or the file of a profile; default: this machine,
            as `mergeopd plan --measure` found it.
        num_processes: processes of a grid on a CPU; with GPUs there is one for each.
        models: folders with the config.json of the student (`student`) and of teachers by name, where the
            models themselves are not here.
        prompt_tokens: mean length of prompts; default: that of the files' first prompts.
        response_tokens: mean length of responses; default: as long as they may be.
        fit: also search for grids, micro-batches and batches of decoding that fit.

    Raises:
        RecipeError: with every problem of the recipe, unknown hardware, or a grid that cannot be formed.
        ValueError: a length below 1.
    """
    from mergeopd.planner.estimate import estimate

    return estimate(
        path,
        _as_texts(set),
        hardware=None if hardware is None else str(hardware),
        num_processes=num_processes,
        models={name: Path(folder) for name, folder in models.items()},
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        fit=fit,
    )


def run(
    path: str | Path,
    *,
    set: Overrides = (),
    updates: int | None = None,
    allow_change: Sequence[str] = (),
    fresh: bool = False,
    control: Control | None = None,
    on_event: Callable[[Event], None] | None = None,
    console: Console | None = None,
) -> RunResult:
    """Run a recipe, or resume its run, and return the contents of the run folder.

    Args:
        path: the recipe.
        set: values that replace those of the recipe.
        updates: stop after this many more updates; the same call resumes the run. Until the first regular
            checkpoint, such a smoke run does not claim its folder: one with other settings moves it aside.
        allow_change: keys of the plan, or files, that may differ from those the run began with.
        fresh: start over; an earlier run in the folder is moved to FOLDER.1, or the next free number.
        control: run this control of the recipe in its own folder, and compare a finished run with it.
        on_event: called with every event (`mergeopd.reporting.events`), before it is shown; must not raise.
        console: a `rich.console.Console` on which progress is shown; None shows none.

    Raises:
        RecipeError: with every problem of the recipe and the files that it names.
        StorageError: the run folder belongs to other settings, is in use, or cannot be written.
        TeacherError, ModelError, NumericsError, VerifierError: the run failed; checkpoints are kept.
        Stopped: by SIGINT (Ctrl-C) or SIGTERM, after a checkpoint; the same call resumes the run.
        StoppedByAlarm: likewise, by an alarm whose action is `stop`.
    """
    from rich.console import Console

    from mergeopd.engine.run import run_recipe

    texts = _as_texts(set)
    shown_on = Console(quiet=True) if console is None else console
    listener = None if on_event is None else _Listener(on_event)
    with suppress(UpdateLimitReached):  # as requested by `updates`
        run_recipe(Path(path), texts, updates, allow_change, shown_on, listener, fresh=fresh, control=control)
    plan = load(path, set=texts)
    return load_run((plan if control is None else control_plan(plan, control)).output)


def launch(
    path: str | Path,
    num_processes: int,
    *,
    set: Overrides = (),
    updates: int | None = None,
    allow_change: Sequence[str] = (),
    fresh: bool = False,
    control: Control | None = None,
) -> int:
    """Run a recipe in several processes of this machine; return the exit code of `mergeopd run`.

    Raises:
        RecipeError, StorageError, ProcessError: problems found before a process is started.
    """
    from mergeopd.distributed import launch as launcher
    from mergeopd.preflight.parallelism import check_processes

    texts = _as_texts(set)
    inputs = preflight(path, texts, control=control)
    check_processes(inputs.plan, num_processes)
    if not fresh:
        RunFolder(Path(inputs.plan.output)).check(inputs.plan, inputs.files, allow_change)
    command = [sys.executable, "-m", "mergeopd", "run", str(path)]
    command += [word for text in texts for word in ("--set", text)]
    command += [] if updates is None else ["--updates", str(updates)]
    command += [word for key in allow_change for word in ("--allow-change", key)]
    command += ["--fresh"] if fresh else []
    command += [] if control is None else ["--control", control]
    return launcher.launch(command, num_processes)


def evaluate(
    path: str | Path,
    *,
    set: Overrides = (),
    model: str | Path | None = None,
    output: str | Path | None = None,
    only: Sequence[str] = (),
    console: Console | None = None,
) -> Result:
    """Measure base, experts, static merges and a merged student on the recipe's evaluation prompts.

    Responses are kept in the recipe's `text_cache`; models whose responses are all kept are not loaded.

    Args:
        path: the recipe.
        set: values that replace those of the recipe.
        model: Hugging Face folder of the merged student; default: the run's export.
        output: JSON file to write the result to.
        only: models to load, as in a result: `base`, `merged`, `expert/NAME`, `merge/KIND`; default: all.
            Others are compared with as far as their responses are kept.
        console: a `rich.console.Console` on which progress and the table are shown; None shows none.

    Returns:
        The contents of result.json.

    Raises:
        RecipeError: with every problem of the recipe and the files that it names, or without `evaluation`.
        ModelError: there is no such model, or it does not fit the student's tokenizer, or `only` names none.
        StorageError: `output` cannot be written.
    """
    from rich.console import Console

    from mergeopd.engine.run import evaluate_recipe

    folder = None if model is None else Path(model)
    file = None if output is None else Path(output)
    shown_on = Console(quiet=True) if console is None else console
    return evaluate_recipe(Path(path), _as_texts(set), folder, file, only, shown_on)


def inspect(
    path: str | Path,
    *,
    set: Overrides = (),
    teachers: Sequence[str] = (),
    prompts: int | None = None,
    gradients: bool = False,
    checkpoints: Sequence[str | Path] = (),
    output: str | Path | None = None,
    console: Console | None = None,
) -> Inspection | Contribution:
    """Measure what each teacher of a recipe could teach its student, on a sample of the recipe's prompts.

    With the folder of a finished run: what the run changed in its student.

    Args:
        path: the recipe, or the run folder.
        set: values that replace those of the recipe; not with a run folder.
        teachers: names of teachers; default: all, as always with a run folder.
        prompts: number of prompts to sample; default: `inspect.prompts` of the recipe.
        gradients: also compare the teachers' gradients with that of the student's success, by letting the
            student finish its responses after other tokens; not with a run folder.
        checkpoints: folders of models, or folders with such folders in them, to compare in the place of the
            one teacher; the cards of the best are written into `teachers` in `output`. Not with a run folder.
        output: folder for `inspect.json` and the page `inspect.html`, for a run `contribution.json` and
            `contribution.html`; None writes neither.
        console: a `rich.console.Console` on which progress is shown; None shows none.

    Returns:
        The contents of inspect.json; `to_pandas()` has a row per teacher and domain, `to_pandas("position")`
        also per range of positions. Of a run, those of contribution.json; `to_pandas()` has a row per teacher
        and domain, `to_pandas("domain")` per domain of the evaluation.

    Raises:
        RecipeError: with every problem of the recipe and the files that it names, and unknown teachers.
        StorageError: `output` cannot be written, or the run is damaged or has no exported student.
    """
    from rich.console import Console

    from mergeopd.inspection.run import inspect_recipe
    from mergeopd.reporting.inspection import write_inspection
    from mergeopd.reporting.page.inspection import write_inspection_page

    folder = None if output is None else Path(output)
    if folder is not None and (obstacle := unwritable(folder)) is not None:
        cause = f"no permission to write to {obstacle}" if obstacle.is_dir() else f"{obstacle} is a file"
        raise StorageError(f"{folder} cannot be written: {cause}; name another folder")
    shown_on = Console(quiet=True) if console is None else console
    if Path(path).is_dir():
        given = {"--set": set, "--teacher": teachers, "--gradients": gradients, "--checkpoints": checkpoints}
        for option in [option for option, value in given.items() if value]:
            message = f"{path} is the folder of a run, which is inspected as it ran"
            raise RecipeError([option_problem(option, message, "leave this out, or inspect a recipe")])
        return _inspect_run(Path(path), prompts, folder, shown_on)
    texts = _as_texts(set)
    inspection = inspect_recipe(
        Path(path),
        texts,
        teachers=teachers,
        prompts=prompts,
        gradients=gradients,
        checkpoints=[Path(one) for one in checkpoints],
        cards=None if folder is None else folder / "teachers",
        console=shown_on,
    )
    inspection = _with_cost(inspection, Path(path), texts)
    if folder is not None:
        write_inspection(inspection, folder / run_layout.INSPECTION_DATA)
        write_inspection_page(inspection, folder / run_layout.INSPECTION_PAGE)
    return inspection


def _with_cost(inspection: Inspection, recipe: Path, overrides: Sequence[str]) -> Inspection:
    """Add what a run would cost on this machine, with the lengths of the student's sampled responses."""
    from mergeopd.models.causal import pick_device
    from mergeopd.planner.estimate import estimate
    from mergeopd.planner.profile import read_hardware

    if pick_device().type != "cpu" and read_hardware(None).profile.is_cpu:
        note = "not planned: this machine's GPU is not measured; run `mergeopd plan --measure` once"
        return replace(inspection, notes=(*inspection.notes, note))
    shares = sum(domain.share for domain in inspection.domains)
    length = sum(domain.share * domain.mean_length for domain in inspection.domains) / (shares or 1.0)
    try:
        cost = estimate(recipe, overrides, response_tokens=max(1, round(length)) if shares else None)
    except RecipeError as error:  # a grid of more processes than this machine's profile has, for example
        return replace(inspection, notes=(*inspection.notes, f"not planned: {error}"))
    return replace(inspection, cost=cost)


def _inspect_run(run: Path, prompts: int | None, output: Path | None, console: Console) -> Contribution:
    from mergeopd.inspection.run import inspect_run
    from mergeopd.reporting.contribution import write_contribution
    from mergeopd.reporting.page.contribution import write_contribution_page

    contribution = inspect_run(run, prompts=prompts, console=console)
    if output is not None:
        write_contribution(contribution, output / run_layout.CONTRIBUTION_DATA)
        write_contribution_page(contribution, output / run_layout.CONTRIBUTION_PAGE)
    return contribution


def record_targets(
    path: str | Path,
    *,
    set: Overrides = (),
    teachers: Sequence[str] = (),
    console: Console | None = None,
) -> Mapping[str, Manifest]:
    """Write the targets of teachers with `targets: FOLDER` for the recipe's text, which `run` then reads.

    What a folder has already is kept, and only the rest is written.

    Args:
        path: the recipe.
        set: values that replace those of the recipe.
        teachers: names of teachers; default: all with `targets`.
        console: a `rich.console.Console` on which progress is shown; None shows none.

    Returns:
        The manifest of each teacher's folder, by the teacher's name.

    Raises:
        RecipeError: with every problem of the recipe and the files that it names, or without `targets`.
        StorageError: a folder has other targets, is damaged, cannot be written, or its disk has no room.
        TeacherError: there is no such teacher, or it is not the model of its card.
    """
    from rich.console import Console

    from mergeopd.engine.run import record_targets as record

    shown_on = Console(quiet=True) if console is None else console
    return record(Path(path), _as_texts(set), teachers, shown_on)


def report(
    folder: str | Path, *others: str | Path, output: str | Path | None = None
) -> tuple[Path, tuple[str, ...]]:
    """Rebuild a run folder's report.html, or compare several; return the page and notes on damaged files.

    Args:
        folder: the run folder, the first of a comparison.
        others: run folders that are compared with it.
        output: the page; default: `report.html` in the folder, `comparison.html` here for several runs.

    Raises:
        StorageError: there is no such run folder, it has another format version, or the disk fails.
    """
    from mergeopd.reporting.page import compare, html

    page = None if output is None else Path(output)
    if not others:
        return html.write_report(Path(folder), page)
    return compare.write_comparison([Path(f) for f in (folder, *others)], page or Path("comparison.html"))


class _Listener:
    """A function as a reporter."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self.emit = on_event


def _as_texts(overrides: Overrides) -> list[str]:
    """Format overrides as for `--set`. JSON is YAML; `${` is escaped, so it is not a variable."""
    if isinstance(overrides, str):
        raise TypeError(f"set takes a mapping or a list of texts; write set=[{overrides!r}]")
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [
        f"{key}={json.dumps(value, ensure_ascii=False, default=str).replace('${', '$${')}"
        for key, value in overrides.items()
    ]
