"""The editors' schema: up to date, accepts every good recipe, refuses recipes that the loader refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from mergeopd.config.schema import input_schema
from mergeopd.config.schema_text import below, options
from mergeopd.recipe.alarms import ALARMS
from mergeopd.recipe.jsonschema import card_schema, recipe_schema
from mergeopd.recipe.loss_terms import SHORT_TERMS, TEACHER_TERMS
from mergeopd.recipe.schema import SHORTHANDS, Recipe
from mergeopd.reporting.contribution import contribution_schema
from mergeopd.reporting.inspection import inspection_schema

ROOT = Path(__file__).parents[3]
HEADER = "# yaml-language-server: $schema={}docs/schema/recipe.schema.json"
# A file whose name begins with an underscore is no recipe but what others extend.
RECIPES = sorted(
    [*(ROOT / "recipes").glob("**/[!_]*.yaml"), ROOT / "tests/errors/project/recipes/merge.yaml"]
)
CARDS = sorted(
    [*(ROOT / "teachers").glob("**/*.yaml"), *(ROOT / "tests/errors/project/teachers").glob("*.yaml")]
)


def load(text: str | Path) -> Any:
    return YAML(typ="safe").load(text)


SCHEMAS = {
    "recipe": recipe_schema(),
    "card": card_schema(),
    "inspect": inspection_schema(),
    "contribution": contribution_schema(),
}


@pytest.mark.parametrize(("name", "schema"), SCHEMAS.items())
def test_the_schema_files_are_up_to_date(name: str, schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    text = (ROOT / "docs" / "schema" / f"{name}.schema.json").read_text()
    assert text == json.dumps(schema, indent=2) + "\n", (
        f"write `mergeopd schema` of the {name} to docs/schema/"
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_satisfies_the_schema_and_names_it(path: Path) -> None:
    assert list(Draft202012Validator(recipe_schema()).iter_errors(load(path))) == []
    depth = len(path.parts) - 1 - path.parts.index("recipes", len(ROOT.parts))
    assert path.read_text().splitlines()[0] == HEADER.format("../" * depth)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.name)
def test_every_card_satisfies_the_schema(path: Path) -> None:
    assert list(Draft202012Validator(card_schema()).iter_errors(load(path))) == []


GOOD = (ROOT / "tests/errors/project/recipes/merge.yaml").read_text()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loss: {forward_kl: 1.0, nll: 0.5}", "loss: forward_kl"),
        ("jsd: {weight: 0.1, beta: 0.5}", "jsd: 0.1"),
        ("teachers: {code: 1.0, math: 0.2}", "teachers: [code, math]"),
        ("tokens: {math: 1.0, code: 1.0, chat: 0.5}", "tokens: equal"),
        ("on_policy_fraction: {start: 0.5, end: 1.0, updates: 10}", "on_policy_fraction: 0.5"),
        ("math: teachers/math.yaml", "math: {student: start, prompt: x}"),
        ("math: teachers/math.yaml", "math: {student: {every: 20}, system: x}"),
        ("math: teachers/math.yaml", "math: {student: {ema: 0.9}}"),
        ("seed: 17", "seed: ${SEED}"),
        ("name: three-experts", "name: run-${SEED}"),
        ("schedule: cosine", 'schedule: "${SCHEDULE:-cosine}"'),
    ],
)
def test_short_forms_and_variables_are_accepted(old: str, new: str) -> None:
    assert old in GOOD
    Draft202012Validator(recipe_schema()).validate(load(GOOD.replace(old, new)))


@pytest.mark.parametrize(
    "text",
    [
        "extends: a.yaml\n",
        "extends: [a.yaml, b.yaml]\nstudent: {dtype: bfloat16}\nteachers: {math: {weight: 2}}\n",
        "extends: a.yaml\nteachers: {past: {student: {every: 3}}, lag: {prompt: x}}\n",
    ],
)
def test_a_recipe_that_extends_may_leave_things_out(text: str) -> None:
    Draft202012Validator(recipe_schema()).validate(load(text))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed: 17", "sed: 17"),
        ("  model: models/base\n", ""),
        ("text: teacher", "text: teachr"),
        ("verifier: number,", "verifier: numbr,"),
        ("verifier: number,", "verifier: regex,"),
        ("kind: json", "kind: regex"),
        ("lr: 1e-5", "lr: -1"),
        ("domain: chat", "domain: ch at"),
        ("  math: teachers", "  ma th: teachers"),
        ("weight: 0.8", "weigth: 0.8"),
        ("card: teachers/code.yaml, weight", "weight"),
        ("card: teachers/code.yaml", "card: teachers/code.yaml, student: start"),
        ("card: teachers/code.yaml", "student: {}"),
        ("card: teachers/code.yaml", "student: {every: 2, ema: 0.5}"),
        ("card: teachers/code.yaml", "student: {ema: 1.0}"),
    ],
)
def test_the_schema_refuses_recipes_that_the_loader_refuses(old: str, new: str) -> None:
    assert old in GOOD
    assert not Draft202012Validator(recipe_schema()).is_valid(load(GOOD.replace(old, new, 1)))


def test_lists_are_not_merged_so_their_entries_must_be_whole() -> None:
    recipe = load("extends: a.yaml\nprompts: [{source: x.jsonl}]\n")
    assert not Draft202012Validator(recipe_schema()).is_valid(recipe)


def test_every_short_form_of_the_schema_is_in_the_table_and_works() -> None:
    samples: dict[tuple[str, ...], Any] = {
        ("teachers", "*"): "a.yaml",
        ("prompts", "*", "verifier"): "exact",
        ("evaluation", "static_merges", "*"): "ties",
        ("prompts", "*", "teachers"): ["a", "b"],
        ("evaluation", "prompts", "*", "verifier"): "exact",
        ("prompts", "*", "environment"): "calculator",
        ("evaluation", "prompts", "*", "environment"): "calculator",
        ("report", "trackers", "*"): "wandb",
        ("phases", "*", "prompts"): ["a"],
        ("phases", "*", "teachers"): ["a"],
        ("phases", "*", "loss"): "nll",
        ("phases", "*", "correction"): "mask",
        **{("phases", "*", "loss", term): 0.5 for term in SHORT_TERMS},
        **{("phases", "*", "loss", term, "teachers"): "a" for term in TEACHER_TERMS},
        ("alarms",): "stop",
        **{("alarms", name): "off" for name in ALARMS},
    }
    assert samples.keys() == SHORTHANDS.keys()
    for path, sample in samples.items():
        schema: dict[str, Any] | None = input_schema(Recipe)
        for step in path:
            assert schema is not None
            lists = any("items" in option for option in options(schema))
            schema = below(schema, 0 if step == "*" and lists else "any" if step == "*" else step)
        assert schema is not None
        kinds = {"object" if "discriminator" in option else option["type"] for option in options(schema)}
        assert {"object", {str: "string", list: "array", float: "number"}[type(sample)]} <= kinds
        assert isinstance(SHORTHANDS[path](sample), dict)
