"""Laws of reading recipes, for any misspelling, value and layer."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from mergeopd.config.schema import model_schema
from mergeopd.recipe.resolve import read
from mergeopd.recipe.schema import Recipe

PROJECT = Path(__file__).parents[2] / "errors" / "project"
GOOD = (PROJECT / "recipes" / "merge.yaml").read_text()
FREE = {("teachers",), ("prompts", "teachers"), ("phases", "balance", "tokens")}


def _keys(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, int, int]]:
    """Every key that the schema fixes with its line and column, from ruamel's round-trip loader."""
    if isinstance(node, dict):
        for key, value in node.items():
            if path not in FREE:
                line, column = node.lc.key(key)
                yield key, line + 1, column + 1
            yield from _keys(value, (*path, key))
    elif isinstance(node, list):
        for item in node:
            yield from _keys(item, path)


KEYS = list(_keys(YAML().load(GOOD)))
KNOWN = {key for part in model_schema(Recipe)["$defs"].values() for key in part.get("properties", {})}
KNOWN |= {*model_schema(Recipe)["properties"], "extends"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("laws") / "project"
    shutil.copytree(PROJECT, target)
    return target


def _misspelt(key: str, kind: int, at: int) -> str:
    at %= len(key)
    if kind == 0:
        return key[:at] + key[at + 1 :]
    if kind == 1:
        return key[:at] + key[at] + key[at:]
    if kind == 2:
        return key[:at] + "x" + key[at + 1 :]
    return key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :]


def test_the_keys_were_found() -> None:
    assert len(KEYS) > 60
    assert ("nll", 26, 29) in KEYS


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KEYS), st.integers(0, 3), st.integers(0, 30))
def test_a_misspelt_key_is_a_problem_at_exactly_that_key(
    folder: Path, key: tuple[str, int, int], kind: int, at: int
) -> None:
    name, line, column = key
    wrong = _misspelt(name, kind, at)
    if wrong in KNOWN or not wrong:
        return
    text = GOOD.splitlines(keepends=True)
    row = text[line - 1]
    assert row[column - 1 :].startswith(name)
    text[line - 1] = row[: column - 1] + wrong + row[column - 1 + len(name) :]
    path = folder / "recipes" / "misspelt.yaml"
    path.write_text("".join(text))
    resolution = read(path)
    assert resolution.plan is None
    here = [p for p in resolution.problems if (p.location.line, p.location.column) == (line, column)]
    assert [p.message for p in here] == [f"unknown key '{wrong}'"]
    if len(name) > 4:
        assert here[0].remedy == f"did you mean '{name}'?"
        assert not [p for p in resolution.problems if p.message.startswith("missing key")]


VALUES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**63 - 1),
        "lr": st.floats(0, 1e6),
        "share": st.floats(1e-6, 1e6),
        "weight": st.floats(1e-3, 1e3),
        "stop": st.lists(
            # Not the three line breaks of YAML 1.1, which ruamel writes unescaped and folds when reading.
            st.text(
                st.characters(codec="utf-8", exclude_characters="$\x85\u2028\u2029"), min_size=1, max_size=5
            ),
            max_size=3,
        ),
        "text": st.sampled_from(["teacher", "dataset"]),
    }
)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_a_valid_recipe_survives_being_written_and_read_again(folder: Path, values: dict[str, Any]) -> None:
    yaml = YAML(typ="safe")
    data = yaml.load(GOOD)
    data["seed"], data["optimizer"]["lr"] = values["seed"], values["lr"]
    data["prompts"][0]["share"], data["teachers"]["code"]["weight"] = values["share"], values["weight"]
    data["rollout"]["stop"], data["phases"][0]["text"] = values["stop"], values["text"]
    buffer = io.StringIO()
    yaml.dump(data, buffer)
    path = folder / "recipes" / "written.yaml"
    path.write_text(buffer.getvalue(), encoding="utf-8")
    # Whether code's expert is the heaviest does not matter: the recipe names it.
    plan = read(path).plan
    assert plan is not None
    assert (plan.seed, plan.optimizer.lr, plan.sources[0].share) == (
        values["seed"],
        values["lr"],
        values["share"],
    )
    assert plan.sources[1].teachers["code"] == values["weight"]
    assert plan.rollout.stop == tuple(values["stop"])
    assert plan.phases[0].text == values["text"]
    assert read(path).plan == plan


LAYER = st.dictionaries(
    st.sampled_from(["lr", "eps", "weight_decay", "final_lr_fraction", "clip_grad"]),
    st.sampled_from([0.25, 0.5, 1.0]),
)


@settings(max_examples=40, deadline=None)
@given(LAYER, LAYER, LAYER)
def test_the_child_wins_over_its_parent_and_the_command_line_over_all(
    folder: Path, parent: dict[str, float], child: dict[str, float], command: dict[str, float]
) -> None:
    recipes = folder / "recipes"
    (recipes / "parent.yaml").write_text(
        GOOD.replace("{lr: 1e-5, warmup_updates: 5, schedule: cosine}", str(parent))
    )
    (recipes / "child.yaml").write_text(f"extends: parent.yaml\noptimizer: {child}\n")
    plan = read(
        recipes / "child.yaml", [f"optimizer.{key}={value}" for key, value in command.items()], os.environ
    ).plan
    assert plan is not None
    written = {**parent, **child, **command}
    assert plan.optimizer.model_dump(include=set(written)) == written
    assert plan.optimizer.model_fields_set == set(written)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, len(GOOD) - 1),
    st.integers(0, 12),
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["[]", "{}", "null", "~", "*a", "&a ", "<<: 3", "\n", "- ", ": ", "!!set ", "1e999", "${A}"]
        ),
    ),
)
def test_no_file_makes_the_reader_raise(folder: Path, at: int, cut: int, insert: str) -> None:
    path = folder / "recipes" / "fuzzed.yaml"
    path.write_text(GOOD[:at] + insert + GOOD[at + cut :], encoding="utf-8", newline="")
    resolution = read(path, env={})
    assert (resolution.plan is None) == bool(resolution.problems)
    assert all(problem.message and problem.location.file for problem in resolution.problems)
