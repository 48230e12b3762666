"""Compare the documents with the code: reference up to date, examples valid, error samples real, sizes kept."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from mergeopd.config.load import load
from mergeopd.config.schema import model_schema
from mergeopd.config.tree import plain
from mergeopd.recipe.models import TeacherCard, TeacherRef
from mergeopd.recipe.schema import NAMED, SHORTHANDS, Recipe
from mergeopd.recipe.training import Phase

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(language: str, *documents: Path) -> list[str]:
    text = "\n".join(document.read_text(encoding="utf-8") for document in documents or DOCUMENTS)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_recipe_reference_is_up_to_date() -> None:
    reference = runpy.run_path(str(ROOT / "tools" / "make_recipe_reference.py"))["reference"]
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert text == reference(), "run tools/make_recipe_reference.py"


def described(schema: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    for name, part in {"": schema, **schema.get("$defs", {})}.items():
        yield name, "description" in part
        for key, value in part["properties"].items():
            yield f"{name}.{key}", "description" in value


@pytest.mark.parametrize("model", [Recipe, TeacherCard])
def test_every_key_is_described(model: Any) -> None:
    assert [key for key, has_text in described(model_schema(model)) if not has_text] == []


def validate(document: dict[str, Any]) -> None:
    model = Recipe if "recipe" in document else TeacherCard
    model.model_validate(document)


def test_recipes_and_cards_in_the_documents_are_valid() -> None:
    documents = [YAML(typ="safe").load(block) for block in blocks("yaml")]
    whole = [document for document in documents if document and {"recipe", "card"} & document.keys()]
    assert len(whole) >= 5
    for document in whole:
        validate(document)


REFERENCE = ROOT / "tools" / "recipe_examples.yaml"
EXAMPLES: dict[str, str] = YAML(typ="safe").load(REFERENCE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_reference_are_valid(name: str) -> None:
    example = YAML(typ="safe").load(EXAMPLES[name])
    whole: dict[str, Any] = {} if "card" in example else YAML(typ="safe").load(EXAMPLES["Recipe"])
    validate({**whole, **example})


def test_every_example_belongs_to_a_section_of_the_reference() -> None:
    sections = {"Recipe", "TeacherCard", *model_schema(Recipe)["$defs"], *model_schema(TeacherCard)["$defs"]}
    assert EXAMPLES.keys() <= sections


def test_the_example_of_the_kernel_gives_the_reverse_kl() -> None:
    (example,) = (block for block in blocks("python", ROOT / "docs/api.md") if "fused_loss(" in block)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/api.md", "exec"), names)
    logits = [
        names["hidden_S"].detach() @ names["weight_S"].detach().T,
        names["hidden_T"] @ names["weight_T"].T,
    ]
    S, T = (logit.log_softmax(-1) for logit in logits)
    expected = float((S.exp() * (S - T)).sum(-1).mean())
    assert float(names["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert names["hidden_S"].grad.abs().sum() > 0


def test_the_error_sample_is_real() -> None:
    expected = (ROOT / "tests/errors/several_sections/expected.txt").read_text(encoding="utf-8")
    (sample,) = (block for block in blocks("text") if "did you mean" in block)
    problems = re.findall(r"^\S.*\n    .*\n", sample, re.MULTILINE)
    assert len(problems) >= 3
    for problem in problems:
        assert problem in expected


def test_front_page_architecture_and_pictures_stay_small() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert len((ROOT / "docs/architecture.md").read_text(encoding="utf-8").split()) <= 1500
    for picture in (ROOT / "docs/pictures").iterdir():
        assert picture.stat().st_size < 300_000, picture.name


def anchors(text: str) -> set[str]:
    """Names that a link into this text may use: explicit ones, and headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    linked = re.findall(r"""\]\(([^)\s]+)\)|\bsrc(?:set)?="([^"]+)\"""", text)
    for target in (one or other for one, other in linked):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{document.name}: {target}"


def test_files_that_the_documents_name_exist() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:mergeopd|tools|tests|docs|recipes)/[\w./]+)`", text):
            assert (ROOT / name).exists(), f"{document.name} names {name}"


PACKAGES = "|".join(sorted(path.parent.name for path in (ROOT / "mergeopd").glob("*/__init__.py")))


def test_modules_that_the_architecture_names_exist() -> None:
    for document in (ROOT / "docs" / "architecture.md", *(ROOT / "docs" / "design").glob("*.md")):
        text = document.read_text(encoding="utf-8")
        # Below `mergeopd/`: `engine/loop.py`, `student/megatron`.
        for name in re.findall(rf"`((?:{PACKAGES})/[\w./]*)`", text):
            assert (ROOT / "mergeopd" / name).exists(), f"{document.name} names {name}"
        if document.name == "architecture.md":
            assert len(text.split()) <= 1500


def test_classes_and_functions_that_the_architecture_names_exist() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mergeopd").rglob("*.py"))
    for document in (ROOT / "docs" / "architecture.md", *(ROOT / "docs" / "design").glob("*.md")):
        for name in re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`", document.read_text(encoding="utf-8")):
            assert re.search(rf"\b(class|def) {name}\b|^{name} = ", code, re.MULTILINE), (
                f"{document.name}: {name}"
            )


METHODS = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
# A row of the table: the recipe that it links, and its second cell.
METHOD_ROWS = dict(
    re.findall(r"^\| \[[^]]*\]\(\.\./(recipes/[\w/]+\.yaml)\)[^|]*\| ([^|]*) \|", METHODS, re.MULTILINE)
)
SIZES = {"name", "updates", "prompts_per_round"}


def test_every_method_recipe_has_its_row() -> None:
    files = (ROOT / "recipes" / "methods").glob("[!_]*.yaml")
    methods = {str(file.relative_to(ROOT)) for file in files}
    assert methods <= METHOD_ROWS.keys()


@pytest.mark.parametrize("file", METHOD_ROWS)
def test_lines_in_the_table_of_methods_are_those_of_the_recipe(file: str) -> None:
    """Phases in their order and in full, sizes and budgets of the quick start apart; and its own teachers."""
    root = load(ROOT / file, (), {}, SHORTHANDS, NAMED).root
    assert root is not None
    recipe = Recipe.model_validate(plain(root))
    spans = re.findall(r"(teacher )?`([^`]+)`", METHOD_ROWS[file])
    written = [(bool(teacher), YAML(typ="safe").load(f"{{{text}}}")) for teacher, text in spans]
    apart = SIZES if "methods" in file else {*SIZES, "balance"}
    phases = [fragment for is_teacher, fragment in written if not is_teacher]
    for fragment, phase in zip(phases, recipe.phases, strict=True):
        sizes = phase.model_dump(include=apart)
        assert Phase.model_validate({**sizes, **fragment}) == phase
    for fragment in (fragment for is_teacher, fragment in written if is_teacher):
        assert TeacherRef.model_validate(fragment) in recipe.teachers.values()
