"""Controls beside a run: their folders, how they resume, and when the run is compared with them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import mergeopd
from mergeopd.errors import StorageError
from mergeopd.reporting.result import AlarmSummary, Result, read_result, write_result

PHASES = [
    {"name": "cold", "text": "teacher", "updates": 1, "loss": "forward_kl", "prompts_per_round": 4},
    {"name": "merge", "updates": 2, "loss": "reverse_kl", "prompts_per_round": 4},
]
EVALUATION = {
    "prompts": [{"source": "held_out.jsonl", "domain": "right", "verifier": "exact"}],
    "max_new_tokens": 2,
}


@pytest.fixture
def recipe(write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    return write_job({"phases": PHASES, "evaluation": EVALUATION})


def result_of(folder: Path) -> Result:
    result = read_result(folder / "result.json")
    assert result is not None
    return result


def test_a_control_after_the_run_is_added_to_its_result(recipe: Path) -> None:
    run = mergeopd.run(recipe)
    assert "control" not in run.accuracies["right"]
    # What only the run itself knows outlives the second evaluation.
    assert run.result is not None
    alarm = AlarmSummary(1, "truncation", "right", "100% of responses")
    write_result(run.folder / "result.json", replace(run.result, alarms=(alarm,), update=2))
    half = mergeopd.run(recipe, control="sft", updates=1)
    assert (half.folder, half.num_updates, half.is_finished) == (run.folder / "controls" / "sft", 1, False)
    control = mergeopd.run(recipe, control="sft")
    assert control.is_finished
    assert [row["phase"] for row in control.metrics] == ["cold", "merge", "merge"]
    assert {row["on_policy_fraction"] for row in control.metrics} == {0.0}
    after = result_of(run.folder)
    assert (after.alarms, after.update) == ((alarm,), 2)
    assert [m.key for m in after.models if m.kind == "control"] == ["control/sft"]
    row = after.suites["right"]
    merged, other = row.accuracy["merged"].value, row.accuracy["control/sft"].value
    assert merged is not None
    assert other is not None
    assert row.over_control["control/sft"].value == merged - other
    assert "level with SFT on expert text" in after.verdict
    assert after.trained_tokens == {
        "merged": sum(line["num_tokens"] for line in run.metrics),
        "control/sft": sum(line["num_tokens"] for line in control.metrics),
    }
    assert after.seconds == run.result.seconds
    assert (run.folder / "evaluation" / "control-sft.parquet").is_file()
    assert "SFT on expert text" in (run.folder / "report.html").read_text()
    assert mergeopd.run(recipe).result == after


def test_controls_before_the_run_are_measured_by_it(recipe: Path) -> None:
    text = io.StringIO()
    mergeopd.run(recipe, control="sft", console=Console(file=text))
    mergeopd.run(recipe, control="sampled")
    assert "its evaluation then measures this control" in text.getvalue()
    run = mergeopd.run(recipe)
    assert run.result is not None
    assert [m.title for m in run.result.models if m.kind == "control"] == [
        "SFT on expert text",
        "sampled reverse KL",
    ]
    assert set(run.result.suites["right"].over_control) == {"control/sft", "control/sampled"}
    sampled = [json.loads(s) for s in (run.folder / "controls/sampled/metrics.jsonl").open()]
    assert all("reverse_kl" not in row["teachers"]["two"] for row in sampled[1:])
    assert all(row["teachers"]["two"]["sampled_reverse_kl"] is not None for row in sampled[1:])


def test_a_control_of_other_settings_is_not_measured(recipe: Path) -> None:
    settings = {"optimizer.lr": 0.02}
    mergeopd.run(recipe, control="sft", set=settings)
    text = io.StringIO()
    run = mergeopd.run(recipe, console=Console(file=text, width=200))
    assert run.result is not None
    assert not [m for m in run.result.models if m.kind == "control"]
    note = "the control in run/controls/sft is not measured: it belongs to other settings of the recipe"
    assert note in text.getvalue()
    with pytest.raises(StorageError, match=r"run belongs to a run that started with other settings"):
        mergeopd.run(recipe, control="sampled", set=settings)
