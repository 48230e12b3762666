"""Recipes that would hang or exhaust `check`: each is refused at once, at its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergeopd.config import load, parse
from mergeopd.recipe.resolve import read


def messages(path: str | Path, *overrides: str) -> str:
    return "\n".join(map(str, read(path, overrides).problems))


def write(text: str, name: str = "hostile.yaml") -> Path:
    path = Path("recipes") / name
    path.write_text(text, newline="")
    return path


@pytest.mark.parametrize("line", ["a{i}: &a{i} [{before}]", "a{i}: &a{i} {{{keys}}}"])
def test_aliases_that_multiply_are_counted(project: Path, line: str) -> None:
    lines = ["a0: &a0 [x, x]"]
    for i in range(1, 30):
        alias = f"*a{i - 1}"
        lines.append(
            line.format(
                i=i, before=", ".join([alias] * 10), keys=", ".join(f"k{j}: {alias} " for j in range(10))
            )
        )
    assert f"more than {parse.MAX_VALUES:,} values" in messages(write("\n".join(lines)))


def test_merge_keys_that_multiply_are_counted(project: Path) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 30)]
    assert f"more than {parse.MAX_VALUES:,} values" in messages(write("\n".join(lines)))


def test_few_aliases_are_no_problem(project: Path) -> None:
    text = (
        Path("recipes/merge.yaml").read_text().replace("{forward_kl: 1.0, nll: 0.5}", "&l {forward_kl: 1.0}")
    )
    resolution = read(write(text.replace("{reverse_kl: 1.0, jsd: {weight: 0.1, beta: 0.5}}", "*l")))
    assert resolution.problems == ()
    assert resolution.plan is not None
    assert resolution.plan.phases[0].loss == resolution.plan.phases[1].loss


@pytest.mark.parametrize("text", ["a: " + "[" * 200 + "]" * 200, "a: " + "[" * 20_000 + "]" * 20_000])
def test_depth_is_bounded(project: Path, text: str) -> None:
    assert "nested" in messages(write(text))


def test_a_base_named_twice_at_every_level_is_read_once(project: Path) -> None:
    write("seed: 1\n", "f0.yaml")
    for i in range(1, 60):
        write(f"extends: [f{i - 1}.yaml, f{i - 1}.yaml]\n", f"f{i}.yaml")
    resolution = read("recipes/f59.yaml")
    assert resolution.origins.at("seed").file == "recipes/f0.yaml"


def test_the_number_and_size_of_extended_files_are_bounded(project: Path) -> None:
    write("seed: 1\n", "f0.yaml")
    for i in range(1, load.MAX_FILES + 5):
        write(f"extends: f{i - 1}.yaml\n", f"f{i}.yaml")
    assert "at most 100 files and 1 MiB" in messages(f"recipes/f{load.MAX_FILES + 4}.yaml")
    write("# " + "x" * load.MAX_BYTES, "large.yaml")
    assert "at most 100 files and 1 MiB" in messages(write("extends: large.yaml\n"))
    assert "larger than 1 MiB" in messages("recipes/large.yaml")


def test_a_pipe_and_a_device_are_refused(project: Path) -> None:
    os.mkfifo("recipes/pipe.yaml")
    Path("recipes/zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        assert "a pipe, a device or a socket" in messages(f"recipes/{name}.yaml")
        assert f"unknown recipe '{name}.yaml'" in messages(write(f"extends: {name}.yaml\n"))


def test_half_characters_are_reported_and_pairs_joined(project: Path) -> None:
    text = messages(write('"\\ud800x": 1\rname: "\\udc00"\n'))
    assert "unpaired surrogate U+D800" in text
    assert "unpaired surrogate U+DC00" in text
    assert "found the end" in messages(write('"\\ud800x": 1\rb: [\r'))
    text = Path("recipes/merge.yaml").read_text().replace('["\\n\\n"]', '["\\ud83d\\ude42"]')
    plan = read(write(text)).plan
    assert plan is not None
    assert plan.rollout.stop == ("\N{SLIGHTLY SMILING FACE}",)


@pytest.mark.parametrize("key", ["output", "text_cache"])
def test_no_path_has_a_nul_character(project: Path, key: str) -> None:
    assert "the text has a NUL character; remove it" in messages("recipes/merge.yaml", f'{key}="a\\0b"')


@pytest.mark.parametrize("number", ["0x" + "f" * 10_000, "9" * 5_000])
def test_a_number_that_cannot_be_printed_is_too_large(project: Path, number: str) -> None:
    assert "is a number too large to read" in messages("recipes/merge.yaml", f"seed={number}")


@pytest.mark.parametrize("tag", ["!!int", "!!float"])
def test_an_empty_number_does_not_match_its_tag(project: Path, tag: str) -> None:
    assert f"'' does not match its tag '{tag}'" in messages("recipes/merge.yaml", f'seed={tag} ""')


@pytest.mark.parametrize(
    "revision", ["/", "/dev/zero", "..", "a/../../../x", "~/x", ".hidden", "a//b", "a b", ""]
)
def test_a_revision_is_no_path(project: Path, revision: str) -> None:
    overrides = ("student.model=org/model", f"student.revision='{revision}'")
    assert "expected a branch, a tag or a commit, found" in messages("recipes/merge.yaml", *overrides)
    card = Path("teachers/math.yaml")
    card.write_text(f"{card.read_text()}\nrevision: '{revision}'\n")
    assert "teachers.math.card.revision\n    expected a branch" in messages("recipes/merge.yaml")


@pytest.mark.parametrize("revision", ["main", "refs/pr/3", "v1.0-rc_1", "8" * 40])
def test_branches_tags_and_commits_are_revisions(project: Path, revision: str) -> None:
    text = messages("recipes/merge.yaml", "student.model=org/model", f"student.revision='{revision}'")
    assert f"'org/model' is neither a folder nor at revision '{revision}' in the local cache" in text


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a{99999999999999999999}", "the repetition number is too large"),
        ("(" * 4000 + ")" * 4000, "nested too deeply"),
        ("x" * 10_001, "a regular expression of more than 10,000 characters"),
        ("(", "missing ), unterminated subpattern"),
    ],
)
def test_a_pattern_that_cannot_be_compiled_is_refused(project: Path, pattern: str, why: str) -> None:
    assert why in messages("recipes/merge.yaml", f"prompts.2.verifier={{kind: regex, pattern: '{pattern}'}}")
