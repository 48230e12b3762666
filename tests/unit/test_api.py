"""The Python API: `import mergeopd`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

import mergeopd
from mergeopd.errors import RecipeError, StorageError
from mergeopd.reporting.events import RunFinished, RunStarted, UpdateDone

PHASES = [{"name": "merge", "updates": 2, "text": "dataset", "loss": "reverse_kl", "prompts_per_round": 4}]
EVALUATION = {
    "prompts": [{"source": "held_out.jsonl", "domain": "right", "verifier": "exact"}],
    "max_new_tokens": 2,
}


@pytest.fixture
def recipe(write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    return write_job({"phases": PHASES, "evaluation": EVALUATION})


def test_importing_is_light_until_a_name_is_used() -> None:
    code = (
        "import sys, mergeopd\n"
        "print(*sorted({'mergeopd.api', 'pydantic', 'torch'} & sys.modules.keys()))\n"
        "mergeopd.load, mergeopd.check, mergeopd.run, mergeopd.RunResult\n"
        "print(*sorted({'mergeopd.api', 'pydantic', 'torch', 'transformers', 'pandas'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "mergeopd.api pydantic"]


def test_every_name_is_there_and_none_is_also_a_package() -> None:
    """Importing a submodule `mergeopd.x` would put the module where the function `mergeopd.x` should be."""
    for name in mergeopd.__all__:
        assert getattr(mergeopd, name).__doc__
        assert not list(Path(mergeopd.__file__).parent.glob(f"{name}"))
        assert not Path(mergeopd.__file__).with_name(f"{name}.py").exists()
    with pytest.raises(AttributeError, match="no attribute 'chek'"):
        mergeopd.chek  # noqa: B018


def test_load_and_check(recipe: Path) -> None:
    plan = mergeopd.load(recipe, set={"optimizer.lr": 1e-05, "prompts[0].share": 2})
    assert (plan.optimizer.lr, plan.sources[0].share) == (1e-5, 2.0)
    assert plan == mergeopd.load(recipe, set=["optimizer.lr=1e-5", "prompts.0.share=2"])
    result = mergeopd.check(recipe)
    assert (result.plan, result.num_prompts) == (mergeopd.load(recipe), 4)
    assert str(result) == "2 teachers, 4 prompts, 2 updates in 1 phase"
    for function in (mergeopd.load, mergeopd.check, mergeopd.run):
        with pytest.raises(RecipeError, match="unknown key 'lrr'; did you mean 'lr'"):
            function(recipe, set={"optimizer.lrr": 1})
    with pytest.raises(TypeError, match="write set="):
        mergeopd.load(recipe, set="seed=1")


def test_set_takes_any_value(recipe: Path) -> None:
    """Texts that YAML or recipes could read as other types are kept."""
    for text in ("yes", "1e5", "${HOME}", 'a "b": c', "Grüße 🦊"):
        assert mergeopd.load(recipe, set={"rollout.stop": [text]}).rollout.stop == (text,)
    phases = [{**PHASES[0], "updates": 3}]
    assert mergeopd.load(recipe, set={"phases": phases, "output": Path("x")}).num_updates == 3
    assert mergeopd.load(recipe, set={"evaluation": None}).evaluation is None


def test_run_in_two_parts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[object] = []
    half = mergeopd.run(recipe, updates=1, on_event=events.append)
    assert (half.is_finished, half.num_updates, half.planned_updates) == (False, 1, 2)
    assert (half.export, dict(half.accuracies)) == (None, {})
    assert [type(e) for e in events if isinstance(e, RunStarted | UpdateDone | RunFinished)] == [
        RunStarted,
        UpdateDone,
    ]
    whole = mergeopd.run(recipe)
    assert (whole.is_finished, whole.num_updates) == (True, 2)
    assert whole.export == whole.folder / "export"
    assert (whole.folder / "export" / "model.safetensors").is_file()
    result = json.loads((whole.folder / "result.json").read_text())
    accuracy = result["suites"]["right"]["accuracy"]
    assert whole.accuracies["right"] == {
        "base": accuracy["base"]["value"],
        "expert": accuracy["expert/two"]["value"],
        "static_merge": None,  # experts of other shapes
        "merged": accuracy["merged"]["value"],
    }
    assert whole.result is not None
    assert whole.result.verdict == result["verdict"]
    assert capsys.readouterr() == ("", "")
    assert mergeopd.run(recipe) == whole == mergeopd.load_run(whole.folder)


def test_metrics_as_tables(recipe: Path) -> None:
    result = mergeopd.run(recipe, set={"evaluation": None})
    assert result.is_finished
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    table = result.to_arrow()
    assert table.num_rows == 2
    assert table["teachers.two.reverse_kl"].to_pylist() == [
        line["teachers"]["two"]["reverse_kl"] for line in lines
    ]
    assert table["loss"].to_pylist() == [line["loss"] for line in lines]
    (result.folder / "metrics.jsonl").open("a").write('{"update": 3, "lo')  # as a kill leaves it
    assert mergeopd.load_run(result.folder) == result


def test_evaluate_and_report(recipe: Path) -> None:
    result = mergeopd.run(recipe)
    document = mergeopd.evaluate(recipe, model="two", output="measured.json")
    headline = document.headline("right")
    assert headline["merged"] == headline["expert"]
    assert json.loads(Path("measured.json").read_text())["suites"]["right"] == asdict(
        document.suites["right"]
    )
    assert Path("measured/merged.parquet").is_file()
    (result.folder / "report.html").unlink()
    path, notes = mergeopd.report(result.folder)
    assert path == result.folder / "report.html"
    assert path.is_file()
    assert notes == ()
    with pytest.raises(StorageError, match="not a run folder; name the `output`"):
        mergeopd.load_run("nowhere")
