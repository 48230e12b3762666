"""Every recipe of this repository passes `check` and runs to its end, on experts that are hardly trained."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_experts import load_script, small_agents, small_llama, small_settings
from tiny_experts.agent.settings import AGENT_FOLDER
from tiny_experts.llama.settings import FOLDER

from mergeopd.api import record_targets
from mergeopd.engine.run import run_recipe
from mergeopd.errors import RecipeError
from mergeopd.preflight.inputs import preflight
from mergeopd.recipe.models import SnapshotRule
from mergeopd.recipe.plan import Plan
from mergeopd.storage.responses import read_responses

ROOT = Path(__file__).parents[2]
CLUSTER = "recipes/unified_agent.yaml"
# They need the environments of inference engines; tests/engines has runs with servers.
ENGINES = {"recipes/quickstart_vllm.yaml", "recipes/quickstart_sglang.yaml"}
# Files whose names begin with an underscore are only extended by recipes.
RECIPES = sorted(
    {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml") if path.name[0] != "_"}
    - {CLUSTER, *ENGINES}
)
PATTERNS = {
    "sort": "[a-m]",
    "tool": "[KLM]",
    **dict.fromkeys(["math", "code", "search", "tools", "chat"], "."),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with this repository's recipes and cards, and experts of its own."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("recipes", "teachers"):
        shutil.copytree(ROOT / name, folder / name)
    script, settings, quiet = load_script(), small_settings(120), Console(quiet=True)
    script.make(folder / "experts", settings, 0, 1, quiet)
    more_rows = replace(settings, rows={**settings.rows, "train": 400})  # its tokenizer is learned from them
    script.make_foreign(folder / "experts" / FOLDER, more_rows, small_llama(4), 0, 1, quiet)
    script.make(folder / AGENT_FOLDER, small_agents(60), 0, 1, quiet, agent=True)
    config = folder / AGENT_FOLDER / "chat" / "config.json"  # too short for all turns of the other domains
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 128')
    )
    return folder


def shortened(plan: Plan) -> list[str]:
    """Overrides that reduce a recipe to two rounds a phase and few short responses."""
    changes = ["threads=1", "optimizer.warmup_updates=1"]
    # Truncated responses are not kept, and a call of a tool has more tokens.
    if all(phase.keep == "all" for phase in plan.phases) and not has_tools(plan):
        changes.append("rollout.max_new_tokens=12")
    # The small base is never correct, and without a correct response the outcome has no gradient. These
    # patterns match about half of its responses.
    for index, source in enumerate(plan.sources):
        if source.verifier is not None:
            changes.append(f"prompts.{index}.verifier={{kind: regex, pattern: {PATTERNS[source.domain]!r}}}")
    if plan.rollout.samples_per_prompt > 1:
        changes.append("rollout.samples_per_prompt=4")
    for index, phase in enumerate(plan.phases):
        changes.append(f"phases.{index}.updates={2 * phase.updates_per_round}")
        changes.append(f"phases.{index}.prompts_per_round=6")
    for name, teacher in plan.teachers.items():
        if isinstance(teacher.student, SnapshotRule) and teacher.student.every is not None:
            changes.append(f"teachers.{name}.student.every=1")
    if plan.evaluation is not None:
        sources = range(len(plan.evaluation.sources))
        changes += [f"evaluation.prompts.{index}.limit=2" for index in sources]
    return changes


def has_tools(plan: Plan) -> bool:
    return any(source.environment is not None for source in plan.sources)


def unknown(line: dict[str, Any]) -> Iterator[str]:
    """Names of metrics without a finite number; JSON has null for NaN and infinity."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from unknown(value)
        elif value is None or (isinstance(value, float) and not math.isfinite(value)):
            yield name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_to_its_end(project: Path, name: str) -> None:
    whole = preflight(project / name, records=True).plan  # raises where `check` finds a problem
    assert whole.name == Path(name).stem
    if any(teacher.targets for teacher in whole.teachers.values()):
        record_targets(project / name, set=shortened(whole))
    run_recipe(project / name, shortened(whole), None, ())

    folder = Path(whole.output)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == [
        p.name for p in whole.phases for _ in range(2 * p.updates_per_round)
    ]
    # Responses of teachers and data sets have no group, sources without a verifier no reward, and responses of
    # three tokens no 4-gram. Text of one origin has no log-prob gap of the other, and rewards that are equal in every
    # group leave no loss to share.
    may_lack = {"reward", "zero_advantage_fraction", "repetition", "loss_share"}
    may_lack |= {"logprob_gap_student", "logprob_gap_text"}
    # Not every domain has tools, and not every response calls one.
    may_lack |= {"mean_turns", "mean_calls", "failed_call_fraction"}
    assert {name for line in lines for name in unknown(line)} <= may_lack
    turns = [one["mean_turns"] for line in lines for one in line["domains"].values() if one["mean_turns"]]
    assert bool(turns) == has_tools(whole)
    assert not turns or max(turns) > 1  # tools were called, and replied
    for phase in whole.phases:
        mine = [line for line in lines if line["phase"] == phase.name]
        assert all(set(line["teachers"]) <= set(whole.teachers) for line in mine)
        assert all(bool(line["teachers"]) == phase.loss.needs_teacher for line in mine)
        assert all(bool(line["policy"]) == phase.loss.has_policy for line in mine)
        # Without a gradient the recipe would have no effect.
        assert any(line["grad_norm"] > 0 for line in mine)
    before, after = (
        load_file(path / "model.safetensors") for path in (Path(whole.student.model), folder / "export")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert (folder / "result.json").is_file()
    if has_tools(whole):
        check_evaluated_turns(folder / "evaluation")


def test_the_recipe_of_a_cluster_lacks_only_files_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("mergeopd.recipe.checks.has_gpu", lambda: False)
    monkeypatch.setattr("mergeopd.recipe.checks.is_installed", lambda name: name != "transformer_engine")
    with pytest.raises(RecipeError) as caught:
        preflight(CLUSTER)
    absent = {
        "models": r"'[\w./-]+' is neither a folder .* nor in the local cache of the Hugging Face hub",
        "datasets": r"'[\w./-]+' is neither a file or folder nor in the local cache of the Hugging Face hub",
        "files": r"unknown (prompt file|corpus) 'data/\w+\.(parquet|jsonl)'",
        "GPUs": r"Transformer Engine's layers need GPUs, and this machine has none",
        "package": r"the package transformer-engine is not installed",
    }
    kinds = [
        next((kind for kind, pattern in absent.items() if re.fullmatch(pattern, problem.message)), problem)
        for problem in caught.value.problems
    ]
    assert Counter(kinds) == {"models": 6, "datasets": 4, "files": 8, "GPUs": 1, "package": 1}
    assert all(problem.remedy for problem in caught.value.problems)


def check_evaluated_turns(folder: Path) -> None:
    """Records of responses show where turns end, and models are measured where all turns fit."""
    tools = [row for row in read_responses(folder / "expert-tools.parquet") if row.suite == "tools"]
    assert any("</tool_call><|end|><|tool|>" in row.response for row in tools)
    code = [row for row in read_responses(folder / "expert-code.parquet") if row.suite == "code"]
    assert not any("<|end|>" in row.response for row in code)
    measured = {row.suite for row in read_responses(folder / "expert-chat.parquet")}
    assert measured == {"math", "code", "chat"}
