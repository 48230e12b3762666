"""Estimate a run from its recipe: what `mergeopd plan` shows. Reads no weights and imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mergeopd.config.folders import Lookup
from mergeopd.errors import Location, ModelError, Problem, RecipeError
from mergeopd.messages import option_problem, shown
from mergeopd.models.facts import Weights
from mergeopd.planner.advice import changes
from mergeopd.planner.fit import fitted, nearest
from mergeopd.planner.lengths import Texts, text_lengths
from mergeopd.planner.memory import stage_memory
from mergeopd.planner.profile import Hardware, read_hardware
from mergeopd.planner.residency import hold, residency_problems
from mergeopd.planner.setup import Setup
from mergeopd.planner.shapes import ModelShape
from mergeopd.planner.timing import evaluation_seconds, phase_estimate
from mergeopd.preflight.residency import note
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.resolve import Resolution, read
from mergeopd.recipe.rollout import AnyServerRollout
from mergeopd.reporting.estimate import Estimate
from mergeopd.student.megatron.architecture import count_problem

_GIB = 2**30


def estimate(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    hardware: str | None = None,
    num_processes: int | None = None,
    models: Mapping[str, Path] | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    fit: bool = False,
) -> Estimate:
    """Estimate the run of a recipe on hardware; with `fit`, also propose grids and micro-batches that fit.

    Raises:
        RecipeError: with every problem of the recipe, unknown hardware, or a grid that its processes or the
            model's sizes do not form; the weights and data of a run need not be here.
        ValueError: a length below 1.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("response_tokens", response_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    machine = read_hardware(hardware, num_processes)
    configs = {name: _config_folder(name, path) for name, path in (models or {}).items()}
    resolution = read(recipe, overrides, lookup=Lookup(configs, is_elsewhere=True))
    plan = resolution.plan
    if plan is None or resolution.problems:
        raise RecipeError(resolution.origins.in_order(resolution.problems))
    _refuse_unknown(configs, plan)
    threads = resolution.document.get("threads")
    machine = replace(machine, num_threads=threads)
    setup, texts = read_setup(resolution, machine, prompt_tokens, response_tokens)
    if hardware is None and num_processes is None and setup.is_megatron:
        parallel = plan.student.parallel
        setup = setup.changed(num_devices=parallel.smallest_world)
    if not setup.is_megatron and machine.num_devices > 1:
        others = machine.num_devices - 1
        idle = f"estimated for one device; a run would shard the student over the other {others}, too"
        texts = replace(texts, notes=(*texts.notes, idle))
        setup = setup.changed(num_devices=1)
    _refuse_grid(setup)
    result = estimate_setup(setup, texts)
    return _with_proposals(result, setup, texts, fit=fit)


def read_setup(
    resolution: Resolution, hardware: Hardware, prompt_tokens: int | None, response_tokens: int | None
) -> tuple[Setup, Texts]:
    """Read the models' configs and the lengths of texts. Raises RecipeError for configs without sizes."""
    plan = resolution.plan
    assert plan is not None
    problems: list[Problem] = []
    student = _shape(("student", "model"), plan.student.model, resolution, problems)
    shapes = {}
    for name, teacher in plan.teachers.items():
        if teacher.model is not None:
            place = ("teachers", name) if teacher.student is not None else ("teachers", name, "card", "model")
            shape = _shape(place, teacher.model, resolution, problems, "readable")
            shapes[name] = shape if shape is None or teacher.quantize is None else shape.quantized()
    if problems:
        raise RecipeError(resolution.origins.in_order(problems))
    texts = text_lengths(resolution, prompt_tokens, response_tokens)
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    assert student is not None
    return Setup(plan, student, known, texts.of_phases, hardware, texts.num_prompts), texts


def estimate_setup(setup: Setup, texts: Texts) -> Estimate:
    """Estimate a run that is already read."""
    plan, hardware = setup.plan, setup.hardware
    phases = tuple(phase_estimate(setup, work) for work in setup.phases)
    memory = stage_memory(setup)
    profile = hardware.profile
    own = hardware.with_devices(setup.world)
    return Estimate(
        recipe=shown(Path(plan.recipe_file)),
        hardware=hardware.name,
        device=profile.title,
        sources=profile.sources,
        num_processes=setup.world,
        num_machines=own.num_machines,
        backend=plan.student.backend,
        grid=setup.grid,
        micro_batch_tokens=setup.micro_batch_tokens,
        memory=memory,
        limit_bytes=own.limit_bytes,
        host_limit_bytes=own.host_limit_bytes,
        phases=phases,
        evaluation_s=evaluation_seconds(setup, texts.evaluated),
        notes=(*texts.notes, *_notes(setup)),
        obstacles=tuple(_obstacles(setup)),
    )


def _with_proposals(result: Estimate, setup: Setup, texts: Texts, *, fit: bool) -> Estimate:
    def again(changed: Setup) -> Estimate:
        return estimate_setup(changed, texts)

    obstacles = list(result.obstacles)
    if not result.fits:
        obstacles.append(_too_large(result, nearest(setup, again)))
    return replace(
        result,
        changes=changes(setup, result, again),
        fitted=fitted(setup, again) if fit else (),
        obstacles=tuple(obstacles),
    )


def _too_large(result: Estimate, nearest_fit: str | None) -> str:
    where, needed, limit = "a rank", result.peak_bytes, result.limit_bytes
    if needed <= limit:
        host = result.host_limit_bytes or 0.0
        where, needed, limit = "the main memory of a rank", result.peak_host_bytes, host
    remedy = nearest_fit or "no grid of up to 1,024 of these devices fits; use devices with more memory"
    return (
        f"{where} needs {needed / _GIB:,.1f} GiB in the stage {result.peak.stage}, and may fill "
        f"{limit / _GIB:,.1f} GiB; {remedy}"
    )


def _shape(
    place: tuple[str, ...],
    folder: str,
    resolution: Resolution,
    problems: list[Problem],
    weights: Weights = "float",
) -> ModelShape | None:
    try:
        return ModelShape.read(Path(folder), weights)
    except ModelError as error:
        problems.append(resolution.origins.problem(place, str(error)))
        return None


def _config_folder(name: str, path: Path) -> Path:
    """Return the folder of a config.json that an option names."""
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        message = f"{name}={path}: there is no config.json"
        raise RecipeError([option_problem("--model", message, "name its folder, or the file config.json")])
    return folder


def _refuse_unknown(configs: Mapping[str, Path], plan: Plan) -> None:
    unknown = [name for name in configs if name != "student" and name not in plan.teachers]
    if unknown:
        known = ", ".join(["student", *plan.teachers])
        raise RecipeError([option_problem("--model", f"unknown model '{unknown[0]}'", f"models are {known}")])


def _refuse_grid(setup: Setup) -> None:
    """Raise RecipeError for a grid that processes or the model's sizes do not form."""
    if not setup.is_megatron:
        return
    file = Location(shown(Path(setup.plan.recipe_file)))
    parallel, world = setup.plan.student.parallel, setup.world
    problems = []
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "expert": parallel.expert}
    of_count = count_problem(world, **sizes, context=parallel.context)
    if of_count is not None:
        needed = parallel.smallest_world
        below, above = world // needed * needed, -(-world // needed) * needed
        fits = f"use {above} processes" if below == 0 else f"use {below} or {above} processes"
        remedy = f"{fits}, or let `mergeopd plan --fit` choose the grid"
        problems.append(Problem(file, "student.parallel", of_count, remedy))
    if setup.architecture is not None:
        for problem in setup.architecture.split_problems(**sizes, sequence=parallel.sequence):
            path = f"student.parallel.{problem.key}"
            problems.append(Problem(file, path, problem.message, problem.remedy))
    if problems:
        raise RecipeError(problems)


def _notes(setup: Setup) -> list[str]:
    notes: list[str] = []
    for name in setup.loaded_teachers:
        with suppress(ModelError):
            notes.extend(note(name, hold(setup, name)))
    if isinstance(setup.plan.rollout, AnyServerRollout):
        notes.append("inference servers have devices of their own: their time and memory are not estimated")
    served = [name for name in setup.shapes if setup.teacher(name).served is not None]
    if served:
        notes.append(f"served teachers score elsewhere, their passes are not estimated: {', '.join(served)}")
    if any(source.environment is not None for source in setup.plan.sources):
        notes.append(
            "environments: the tokens of all turns are counted, the time of tools and further turns not"
        )
    return notes


def _obstacles(setup: Setup) -> list[str]:
    """Return what this version cannot run, however much memory there is."""
    obstacles = []
    if setup.student.runs is not None:
        obstacles.append(f"the student does not run: {setup.student.runs}")
    elif setup.is_megatron and setup.architecture is None:
        obstacles.append(
            f"the student does not run with `backend: megatron`: {setup.student.model_type} is not mapped to "
            "Megatron; its memory is divided evenly here"
        )
    for name, shape in setup.shapes.items():
        if setup.is_loaded(name) and shape.runs is not None and setup.teacher(name).student is None:
            obstacles.append(f"teacher '{name}' does not run: {shape.runs}; serve it (`served` in its card)")
        else:
            obstacles.extend(residency_problems(setup, name))
    return obstacles
