"""Read a finished run again: its plan, its models' tokenizers, its prompts, and what it measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mergeopd.config.folders import absolute
from mergeopd.errors import RecipeError, StorageError
from mergeopd.messages import joined, shown
from mergeopd.preflight.inputs import Inputs, read_again
from mergeopd.recipe.alarms import Alarms
from mergeopd.recipe.inspection import InspectionSettings
from mergeopd.recipe.models import Parallel
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.resolve import read
from mergeopd.recipe.rollout import LocalRollout, RolloutSettings
from mergeopd.recipe.schema import Memory, Recipe, Reports
from mergeopd.reporting.page.html import status_of
from mergeopd.reporting.page.run_data import RunData, load_run
from mergeopd.storage import run_layout
from mergeopd.storage.folders import verify
from mergeopd.storage.run_folder import RunFolder

_BEHIND_API = "is behind an API, which an inspection does not ask"


@dataclass(frozen=True)
class FinishedRun:
    """A run with an exported student. `faults` has the teachers that cannot be measured, with the reasons."""

    folder: Path
    data: RunData
    inputs: Inputs
    plan_hash: str
    faults: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def export(self) -> Path:
        return self.folder / run_layout.EXPORT


def open_run(folder: Path, announce: Callable[[str], None] = lambda _: None) -> FinishedRun:
    """Read a finished run. Teachers that cannot be read become faults.

    Raises:
        StorageError: there is no such run, it is damaged, or it has not exported its student.
        RecipeError: the base or the prompts cannot be read.
    """
    data = load_run(folder)
    own = RunFolder(folder)
    if own.started() is None or data.document is None:
        raise StorageError(
            f"{shown(own.plan_file)} is missing, so teachers and prompts of the run are not known; "
            "restore it, or inspect a run with its plan"
        )
    _check_export(own, data)
    plan, notes = _plan(own, data.document)
    faults = {name: _BEHIND_API for name, teacher in plan.teachers.items() if teacher.api is not None}
    inputs = _read(plan, own.plan_file, faults, announce)
    changed = [shown(Path(file)) for file in own.other_files(inputs.files)]
    if changed:
        have = "has" if len(changed) == 1 else "have"
        notes.append(f"{joined(changed, 'and')} {have} other contents than when the run began")
    # What the folder lacks for other pages does not matter here.
    measured = (run_layout.RESULT, run_layout.EVALUATION)
    notes += [note for note in data.notes if note.startswith(measured)]
    return FinishedRun(folder, data, inputs, data.document["hash"], faults, tuple(notes))


def _check_export(own: RunFolder, data: RunData) -> None:
    recipe = shown(Path(str((data.document or {}).get("recipe_file"))))
    if not own.export.is_dir():
        raise StorageError(
            f"{shown(own.path)} has no exported student ({status_of(data)}); finish the run with "
            f"`mergeopd run {recipe}`, or inspect the recipe, which needs no run"
        )
    fault = verify(own.export)
    if fault is not None:
        raise StorageError(
            f"{shown(own.export)}: {fault}; `mergeopd run {recipe}` writes it again from its last checkpoint"
        )


def _plan(own: RunFolder, document: Mapping[str, Any]) -> tuple[Plan, list[str]]:
    """Return the run's plan: that of its recipe, where it is unchanged, else that of plan.yaml.

    The recipe also has the settings that a run folder does not keep, such as addresses of servers. The
    student generates in this process.
    """
    notes = []
    plan = read(document["recipe_file"]).plan
    if plan is None or plan.hash != document["hash"]:
        plan, remote = _recorded_plan(own, document)
        if remote:
            notes.append(
                f"{joined(remote, 'and')}: read from their own weights, since plan.yaml has no addresses of "
                "servers and the recipe has changed"
            )
    student = plan.student.model_copy(update={"backend": "torch", "parallel": Parallel()})
    sampled = {name: getattr(plan.rollout, name) for name in RolloutSettings.model_fields if name != "engine"}
    changes = {"student": student, "rollout": LocalRollout(**sampled), "output": str(own.path.absolute())}
    return plan.model_copy(update=changes), notes


def _recorded_plan(own: RunFolder, document: Mapping[str, Any]) -> tuple[Plan, list[str]]:
    """Return the plan of plan.yaml, and its teachers behind servers, whose addresses are not in there."""
    content = document["plan"]
    teachers = {name: dict(teacher) for name, teacher in content["teachers"].items()}
    remote = [name for name, teacher in teachers.items() if teacher.pop("served", None) is not None]
    for teacher in teachers.values():
        if teacher.get("api") is not None:
            teacher["api"] = {**teacher["api"], "url": "https://localhost"}  # it is not asked
    sampling = {name: content["rollout"][name] for name in RolloutSettings.model_fields if name != "engine"}
    unrecorded = {
        "recipe_file": document["recipe_file"],
        "output": str(own.path),
        "alarms": Alarms().model_dump(mode="json"),
        "memory": Memory().model_dump(mode="json"),
        "report": Reports().model_dump(mode="json"),
        "inspect": InspectionSettings().model_dump(mode="json"),
        "text_cache": str(absolute(Recipe.model_fields["text_cache"].default, Path.cwd())),
        "rollout": {"engine": "local", **sampling},
        "teachers": teachers,
    }
    try:
        return Plan.model_validate_json(json.dumps({**content, **unrecorded})), remote
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StorageError(
            f"{shown(own.plan_file)} is of another version of mergeopd ({place}: {first['msg']}); "
            f"inspect the run with mergeopd {document.get('mergeopd', 'of the version that made it')}"
        ) from error


def _read(plan: Plan, file: Path, faults: dict[str, str], announce: Callable[[str], None]) -> Inputs:
    """Read models and prompts; the teachers that cannot be read are added to `faults`."""
    while True:
        names = [name for name in plan.teachers if name not in faults]
        try:
            return read_again(plan, file, names, announce)
        except RecipeError as error:
            own = {
                name: problem.message
                for problem in error.problems
                for name in names
                if f"{problem.path}.".startswith(f"teachers.{name}.")
            }
            if not own:
                raise
            faults |= {name: f"cannot be read: {message}" for name, message in own.items()}
