"""Broken recipes and cards, and the exact text that a person gets to see.

A case is a folder with `expected.txt`. Its files are laid over `project/`, and `recipes/merge.yaml` is read
from there; `options.yaml` may give `set` (overrides) and `env`. Write the texts anew, then read them:
`MERGEOPD_WRITE_EXPECTED=1 pytest tests/errors`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mergeopd.errors import Problem, RecipeError
from mergeopd.recipe.resolve import read

HERE = Path(__file__).parent
CASES = sorted(path.parent for path in HERE.glob("*/expected.txt"))
Check = Callable[[Path, Sequence[str], Mapping[str, str]], Sequence[Problem]]


def check_recipe(recipe: Path, overrides: Sequence[str], env: Mapping[str, str]) -> Sequence[Problem]:
    """What reading the recipe and its cards finds."""
    return read(recipe, overrides, env).problems


def rendered(case: Path, check: Check) -> str:
    """The text of all problems of a case; the current folder must be its copy of the project."""
    shutil.copytree(HERE / "project", ".", dirs_exist_ok=True)
    shutil.copytree(case, ".", dirs_exist_ok=True)
    options = case / "options.yaml"
    chosen = {"set": [], "env": {}, **(YAML(typ="safe").load(options) if options.exists() else {})}
    problems = check(Path("recipes/merge.yaml"), chosen["set"], chosen["env"])
    return f"{RecipeError(problems)}\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_text_is_exactly_as_expected(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = rendered(case, check_recipe)
    if os.environ.get("MERGEOPD_WRITE_EXPECTED"):
        (case / "expected.txt").write_text(text)
    assert text == (case / "expected.txt").read_text()


def test_there_are_cases() -> None:
    assert len(CASES) >= 10


def test_the_project_itself_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HERE / "project", ".", dirs_exist_ok=True)
    assert check_recipe(Path("recipes/merge.yaml"), [], {}) == ()
