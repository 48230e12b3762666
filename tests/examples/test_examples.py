"""Every example runs and prints its documented results."""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PHASES = [{"name": "merge", "updates": 4, "text": "dataset", "loss": "reverse_kl", "prompts_per_round": 4}]
EVALUATION = {
    "prompts": [{"source": "held_out.jsonl", "domain": "right", "verifier": "exact"}],
    "max_new_tokens": 2,
}
Run = Callable[..., str]


@pytest.fixture
def recipe(write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    return write_job({"phases": PHASES, "evaluation": EVALUATION})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script of the folder with arguments; its output."""

    def call(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_kl_in_your_trainer(run: Run) -> None:
    differences = re.findall(r"relative difference from autograd (\S+)", run("kl_in_your_trainer.py"))
    assert len(differences) == 2
    assert all(0 < float(difference) < 1e-5 for difference in differences)


def test_align_tokenizers(run: Run) -> None:
    out = run("align_tokenizers.py")
    rows = [line.split(" | ") for line in out.splitlines() if " | " in line][1:]
    sides = ["".join(row[side] for row in rows) for side in (0, 1)]
    # Both columns spell the text, apart from the marks between tokens and the padding of the table.
    assert ["".join(side.replace("·", "").split()) for side in sides] == ["Twotokenizersofonetext."] * 2
    assert "tokens in no group: none" in out


def test_run_recipe(run: Run, recipe: Path) -> None:
    out = run("run_recipe.py", recipe, "by_hand")
    assert re.findall(r"update (\d): loss", out) == ["1", "2"]
    assert "1 of 2 updates; the next call resumes the run" in out
    assert Path("by_hand/export/model.safetensors").is_file()
    assert "'update': [1, 2]" in out


def test_the_notebook(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPD_RECIPE", str(recipe))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    folder = {"metadata": {"path": str(recipe.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
    text = "".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )
    assert "unknown key 'lrr'; did you mean 'lr'?" in text
    assert re.search(r"\(True,\s+3,", text)
    assert (recipe.parent / "runs/notebook/report.html").is_file()


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text()
    for file in EXAMPLES.iterdir():
        assert file.name in source
