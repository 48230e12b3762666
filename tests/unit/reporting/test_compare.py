"""The page that compares runs: paired differences, curves over each other, settings that differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from report_pages import EVIL, PLAN, Page, update_line
from results import result_of

from mergeopd import api
from mergeopd.intervals import difference_interval
from mergeopd.reporting.page import html
from mergeopd.reporting.page.compare import differing_settings, load_runs, suite_rows, write_comparison
from mergeopd.storage.responses import EvaluatedResponse, write_responses


@pytest.fixture(autouse=True)
def _short_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_plotly", lambda: "var Plotly = {};")


def run_folder(
    folder: Path, rewards: Sequence[float], *, plan: str = PLAN, first: int = 0, updates: int = 3
) -> Path:
    """A finished run whose merged student got these rewards on the prompts from number `first` on."""
    (folder / "export").mkdir(parents=True)
    (folder / "plan.yaml").write_text(plan)
    lines = [update_line(n) for n in range(1, updates + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = result_of({"math": {"base": 0.25, "expert/math": 0.75, "merged": float(np.mean(rewards))}})
    (folder / "result.json").write_text(json.dumps(asdict(result)))
    rows = [
        EvaluatedResponse("math", "m", f"m:{i}", 0, f"prompt {i + first}", "2", "2", reward, None, "eos", 1)
        for i, reward in enumerate(rewards)
    ]
    write_responses(folder / "evaluation" / "merged.parquet", rows)
    return folder


def test_differences_are_paired_on_the_shared_prompts(tmp_path: Path) -> None:
    rewards = np.random.default_rng(0).integers(0, 2, (2, 60)).astype(float)
    one = run_folder(tmp_path / "one", rewards[0].tolist())
    other = run_folder(
        tmp_path / "other", rewards[1, 10:].tolist(), first=10
    )  # without the first ten prompts
    row = suite_rows(load_runs([one, other]))["math"]
    (difference,), (num_shared,) = row.difference, row.num_shared
    assert num_shared == 50
    expected = difference_interval(rewards[1, 10:], rewards[0, 10:])
    assert difference is not None
    assert difference.value == pytest.approx(rewards[1, 10:].mean() - rewards[0, 10:].mean())
    assert (difference.low, difference.high) == (expected.low, expected.high)


def test_the_page_says_who_is_ahead_and_overlays_the_curves(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one", [0.0] * 40, updates=2)
    changed = PLAN.replace("two-experts", json.dumps(EVIL)).replace("updates: 3", "updates: 4")
    other = run_folder(tmp_path / "other", [0.0] * 20 + [1.0] * 20, plan=changed, updates=4)
    path, notes = write_comparison([one, other], tmp_path / "page.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert [note.split(": ")[0] for note in notes] == ["two-experts", EVIL]  # no sampled responses
    assert f"{EVIL} is ahead in math, behind in none of 1 suite, compared with two-experts" in page.text
    assert "+50.0" in page.text
    assert "phases.merge.updates 3 4" in page.text
    assert not page.all("img")
    charts = json.loads(page.scripts[0])["charts"]
    assert [(s["name"], s["x"], s["values"]) for s in charts["run-loss"]["series"]] == [
        ("two-experts", [1, 2], [1 / 3 + 1, 1 / 3 + 2]),
        (EVIL, [1, 2, 3, 4], [1 / 3 + n for n in (1, 2, 3, 4)]),
    ]
    # The mean over the domains, which have as many responses.
    assert charts["domains-mean_length"]["series"][0]["values"] == [3.5, 4.5]


def test_equal_names_are_replaced_by_folders_and_equal_plans_have_no_differences(tmp_path: Path) -> None:
    runs = load_runs([run_folder(tmp_path / name, [1.0]) for name in ("one", "other")])
    assert [run.label for run in runs] == ["one", "other"]
    assert differing_settings(runs) == {}


def test_the_comparison_is_written_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [run_folder(tmp_path / name, [1.0]) for name in ("one", "other")]
    monkeypatch.chdir(tmp_path)
    assert api.report(*folders)[0].resolve() == tmp_path / "comparison.html"
    assert api.report(folders[0], output="here.html")[0].resolve() == tmp_path / "here.html"
    assert "two-experts" in (tmp_path / "here.html").read_text(encoding="utf-8")
