"""Broken recipes, cards, models and prompt files, with the exact error text.

A case is a folder with `expected.txt`. Its files are copied over `project/`, and `recipes/merge.yaml` is read
from there. `options.yaml` may give `set` (overrides), `env`, `remove` (files of the project), `cut` (files
truncated to a number of bytes), `stale` (models that keep the weights of the project's config.json) and
`missing` (packages, or `gpu`, reported as not installed; all others are reported as installed), `sandbox` (why each
mechanism cannot isolate programs; otherwise they can), `read_only` (folders
reported as not writable). Cases under `preflight/`
check the files that the recipe names, including model weights.
Regenerate the texts and read them: `MERGEOPD_WRITE_EXPECTED=1 pytest tests/errors`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mergeopd.errors import ModelError, Problem, RecipeError
from mergeopd.models.facts import ModelFacts, read_config
from mergeopd.models.layout import expected_shapes
from mergeopd.preflight.inputs import preflight
from mergeopd.recipe.resolve import read
from mergeopd.sandbox.client import Sandbox, sandbox_problem

HERE = Path(__file__).parent
CASES = sorted(path.parent for path in HERE.glob("*/expected.txt"))
PREFLIGHT_CASES = sorted(path.parent for path in HERE.glob("preflight/*/expected.txt"))
Check = Callable[[Path, Sequence[str], Mapping[str, str]], Sequence[Problem]]


def check(recipe: Path, overrides: Sequence[str], env: Mapping[str, str]) -> Sequence[Problem]:
    """Problems found by reading the recipe and its cards."""
    return read(recipe, overrides, env).problems


def check_everything(recipe: Path, overrides: Sequence[str], env: Mapping[str, str]) -> Sequence[Problem]:
    """Problems found by checking all files that the recipe names."""
    assert not env, "preflight takes variables from the process"
    try:
        preflight(recipe, overrides)
    except RecipeError as error:
        return error.problems
    return ()


def write_weights(folder: Path) -> None:
    """model.safetensors of zeros, with the tensors that config.json promises; sizes that it leaves open are 1."""
    facts = ModelFacts.read(folder)
    shapes = {"model.embed_tokens.weight": (facts.vocab_rows, facts.hidden_size)}
    for name, sizes in expected_shapes(facts, read_config(folder)).items():
        shapes[name] = tuple(size or 1 for size in sizes)
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(offset))


def lay_project() -> None:
    """Copy the valid project to the current folder."""
    shutil.copytree(HERE / "project", ".", dirs_exist_ok=True)
    for folder in Path("models").iterdir():
        write_weights(folder)


def rendered(case: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> str:
    """The text of all problems of a case; the current folder must be its copy of the project."""
    lay_project()
    shutil.copytree(case, ".", dirs_exist_ok=True)
    read_options = YAML(typ="safe").load(case / "options.yaml") if (case / "options.yaml").exists() else {}
    lists = {name: [] for name in ("set", "remove", "missing", "read_only", "stale")}
    options = {**lists, "env": {}, "cut": {}, "sandbox": {}, **read_options}
    for config in case.glob("models/*/config.json"):
        folder = Path("models", config.parent.name)
        if folder.name not in options["stale"] and (folder / "model.safetensors").exists():
            with contextlib.suppress(ModelError):  # the error of the case
                write_weights(folder)
    missing = options["missing"]
    monkeypatch.setattr("mergeopd.recipe.checks.is_installed", lambda name: name not in missing)
    monkeypatch.setattr("mergeopd.recipe.checks.has_gpu", lambda: "gpu" not in missing)
    refused: Mapping[str, str] = options["sandbox"]
    monkeypatch.setattr(Sandbox, "_launch", lambda self, mechanism: refused.get(mechanism))
    monkeypatch.setattr("mergeopd.preflight.prompts.sandbox_problem", sandbox_problem.__wrapped__)
    read_only = [Path(name).absolute() for name in options["read_only"]]
    monkeypatch.setattr("mergeopd.config.folders.os.access", lambda path, _: Path(path) not in read_only)
    for name in options["remove"]:
        Path(name).unlink()
    for name, num_bytes in options["cut"].items():
        os.truncate(name, num_bytes)
    problems = check(Path("recipes/merge.yaml"), options["set"], options["env"])
    return f"{RecipeError(problems)}\n"


def compare(case: Path, check: Check, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # functions of the user's
    text = rendered(case, check, monkeypatch)
    assert str(folder) not in text
    if os.environ.get("MERGEOPD_WRITE_EXPECTED"):
        (case / "expected.txt").write_text(text)
    assert text == (case / "expected.txt").read_text()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_text_is_exactly_as_expected(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(case, check, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", PREFLIGHT_CASES, ids=lambda case: case.name)
def test_the_text_of_mistakes_in_named_files(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(case, check_everything, tmp_path, monkeypatch)


def test_there_are_cases() -> None:
    assert len(CASES) >= 10
    assert len(PREFLIGHT_CASES) >= 15


@pytest.mark.parametrize("check", [check, check_everything])
def test_the_project_itself_is_good(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay_project()
    assert check(Path("recipes/merge.yaml"), [], {}) == ()


def test_unusual_sizes_are_noted_and_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay_project()
    before = preflight(Path("recipes/merge.yaml"), ["optimizer.lr=0.01"]).notes
    unusual = ["optimizer.lr=0.02", "phases.0.lr_scale=0.5", "phases.1.updates=200000000"]
    assert [note for note in preflight(Path("recipes/merge.yaml"), unusual).notes if note not in before] == [
        "phase 'merge' has the learning rate 0.02 (`optimizer.lr` x `lr_scale`), which usually makes training "
        "diverge; 1e-6 to 1e-4 is usual",
        "the phases have 200,000,020 updates, which take 2,315 days at one second each",
    ]
