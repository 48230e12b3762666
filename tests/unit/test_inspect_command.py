"""`mergeopd inspect` and `mergeopd.inspect`: what they print and write, and bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from jsonschema import Draft202012Validator

import mergeopd
from mergeopd.api import _with_cost
from mergeopd.cli import main
from mergeopd.errors import RecipeError, StorageError
from mergeopd.reporting.inspection import inspection_schema, read_inspection

SMALL = {"inspect": {"prompts": 8, "samples": 2}}


@pytest.fixture
def recipe(write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_job(SMALL).relative_to(tmp_path)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `mergeopd inspect ARGUMENTS` in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mergeopd", "inspect", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_verdicts_are_printed_and_files_written(
    recipe: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = command(recipe)
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    assert "Teachers of base from 4 prompts" in words
    assert " one " in words
    assert "all the teacher's licence is unknown" in words
    assert "run/inspect/inspect.json" in words
    document = json.loads(Path("run/inspect/inspect.json").read_text())
    Draft202012Validator(inspection_schema()).validate(document)
    assert [teacher["name"] for teacher in document["teachers"]] == ["one", "two"]
    assert all(teacher["compatibility"]["findings"] for teacher in document["teachers"])
    assert "<html" in Path("run/inspect/inspect.html").read_text()
    # What a run costs, with responses as long as the student's.
    assert "A run on this machine: " in words
    length = sum(domain["share"] * domain["mean_length"] for domain in document["domains"])
    planned = mergeopd.plan(recipe, response_tokens=max(1, round(length))).document()
    assert document["cost"]["phases"][0]["tokens"] == planned["phases"][0]["tokens"]
    # The inspection does not keep a run from starting there.
    assert mergeopd.check(recipe).notes[-1].startswith("teachers one and two have no canary")
    assert mergeopd.run(recipe, updates=1).num_updates == 1


def test_json_is_all_of_stdout_and_equals_the_file(
    recipe: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = command(recipe, "--json", "--teacher", "two", "--prompts", 2, "--out", "elsewhere")
    assert code == 0
    document = json.loads(out)
    assert [teacher["name"] for teacher in document["teachers"]] == ["two"]
    assert json.loads(Path("elsewhere/inspect.json").read_text()) == document
    assert not Path("run").exists()


def test_the_function_repeats_the_numbers_and_writes_nothing_by_itself(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(Path().rglob("*"))
    first, second = (mergeopd.inspect(recipe, set={"inspect.samples": 1}, teachers=["one"]) for _ in range(2))
    assert first.to_rows() == second.to_rows()
    assert set(Path().rglob("*")) == before
    assert capsys.readouterr() == ("", "")
    mergeopd.inspect(recipe, set={"inspect.samples": 1}, teachers=["one"], output="there")
    read = read_inspection(Path("there/inspect.json"))
    assert read.teachers == first.teachers
    assert read.cost is not None
    # Lengths of some domains say nothing of the others.
    assert read.cost.document() == mergeopd.plan(recipe, set={"inspect.samples": 1}).document()


def test_a_gpu_is_not_planned_as_a_cpu(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspection = mergeopd.inspect(recipe, set={"inspect.samples": 1}, teachers=["one"])
    monkeypatch.setattr("mergeopd.models.causal.pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("mergeopd.planner.estimate.estimate", Mock(side_effect=AssertionError))
    planned = _with_cost(replace(inspection, cost=None), recipe, [])
    assert planned.cost is None
    assert "mergeopd plan --measure" in planned.notes[-1]


def test_bad_input_is_refused_before_models_are_loaded(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"--teacher\n.*unknown teacher 'ome'; did you mean 'one'\?"):
        mergeopd.inspect(recipe, teachers=["ome"])
    with pytest.raises(RecipeError, match="unknown key 'modle'"):
        mergeopd.inspect(recipe, set={"student.modle": "base"})
    Path("text.jsonl").write_text('{"text": "a b c d"}\n')
    prompts = [
        {"source": "left.jsonl", "domain": "left", "teachers": "one"},
        {"source": "text.jsonl", "domain": "left", "teachers": "two", "text_field": "text", "max_tokens": 9},
    ]
    phases = [{"name": "p", "updates": 1, "text": "dataset", "loss": "reverse_kl", "prompts_per_round": 4}]
    documents = {"prompts": prompts, "phases": phases}
    with pytest.raises(RecipeError, match="no prompt is routed to teacher 'two'; give a source"):
        mergeopd.inspect(recipe, set=documents, teachers=["two"])
    assert [t.verdict.kind for t in mergeopd.inspect(recipe, set=documents).teachers][1] == "unknown"
    Path("file").touch()
    with pytest.raises(StorageError, match="file cannot be written: file is a file; name another folder"):
        mergeopd.inspect(recipe, output="file")
