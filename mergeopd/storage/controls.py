"""Finished controls of a run, and the tokens that a run has trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mergeopd.errors import MergeopdError
from mergeopd.messages import shown
from mergeopd.recipe.controls import CONTROLS, Control, control_plan
from mergeopd.recipe.plan import Plan
from mergeopd.storage import run_layout
from mergeopd.storage.folders import verify
from mergeopd.storage.run_folder import RunFolder


def finished_controls(plan: Plan, note: Callable[[str], None]) -> dict[Control, RunFolder]:
    """Return the run folders of the plan's finished controls; `note` gets a remark on each unusable one."""
    usable: dict[Control, RunFolder] = {}
    for control in CONTROLS:
        folder = RunFolder(Path(plan.output) / run_layout.CONTROLS / control)
        if not folder.export.is_dir():
            continue
        try:
            is_own = control_plan(plan, control).hash in folder.plan_hashes()[:1]
            fault = verify(folder.export) if is_own else "it belongs to other settings of the recipe"
        except MergeopdError as error:
            fault = str(error)
        if fault is None:
            usable[control] = folder
        else:
            note(f"the control in {shown(folder.path)} is not measured: {fault}")
    return usable


def trained_tokens(folder: RunFolder, num_updates: int) -> int | None:
    """Return the response tokens in the loss over all updates; None where metrics.jsonl lacks some."""
    try:
        lines = [json.loads(line) for line in folder.metrics_file.read_bytes().splitlines()]
        counts = {int(line["update"]): int(line["num_tokens"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sum(counts.values()) if len(counts) == num_updates else None
