"""Alarms in real runs: a stop with a checkpoint, and a resume that knows what was raised."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import mergeopd
from mergeopd.cli.errors import exit_code
from mergeopd.engine.update_stats import repetition
from mergeopd.errors import StoppedByAlarm
from mergeopd.reporting.page.html import write_report
from mergeopd.reporting.result import read_result


def test_a_stop_is_saved_and_the_same_run_goes_on_and_ends(
    tmp_path: Path, write_job: Callable[..., Path]
) -> None:
    evaluated = {"source": "copy.jsonl", "domain": "left", "verifier": "exact", "expert": "two"}
    recipe = write_job(
        {
            "alarms": {"action": "off", "identical_teacher": "stop", "overlap": "warn"},
            "evaluation": {
                "prompts": [{**evaluated, "allow_overlap": True}],
                "static_merges": [],
                "max_new_tokens": 2,
            },
        }
    )
    shutil.copy(tmp_path / "left.jsonl", tmp_path / "copy.jsonl")
    (tmp_path / "two.yaml").write_text(json.dumps({"card": 1, "name": "two", "model": "base"}))
    text = io.StringIO()
    console = Console(file=text, width=200)
    with pytest.raises(
        StoppedByAlarm, match=r"stopped by the alarm identical_teacher \(two\) after 1 of 2"
    ) as error:
        mergeopd.run(recipe, console=console)
    assert exit_code(error.value) == 4
    stopped = mergeopd.load_run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert [(a.update, a.name, a.stops) for a in stopped.alarms] == [
        (0, "overlap", False),
        (1, "identical_teacher", True),
    ]
    assert "ALARM identical_teacher (two) at update 1: divergence" in text.getvalue()
    assert "Remedy: name the expert in `model`" in text.getvalue()

    done = mergeopd.run(recipe, console=console)
    assert done.is_finished
    assert done.alarms == stopped.alarms
    result = read_result(tmp_path / "run" / "result.json")
    assert result is not None
    assert [(a.update, a.name) for a in result.alarms] == [(0, "overlap"), (1, "identical_teacher")]
    assert "alarm   identical_teacher at update 1: two" in text.getvalue()
    page = write_report(tmp_path / "run")[0].read_text()
    assert ">finished</span>" in page
    assert "is-done" not in page.split("</style>")[1]
    assert page.index("identical_teacher</b> at update 1: two") < page.index('<dl class="facts">')


def test_repetition_counts_4_grams_seen_before() -> None:
    generator = np.random.default_rng(0)
    responses = [generator.integers(0, 3, size).astype(np.int32) for size in (2, 4, 30, 200)]
    num_repeated = num_all = 0
    for ids in responses:
        seen = set()
        for start in range(len(ids) - 3):
            gram = tuple(ids[start : start + 4].tolist())
            num_repeated += gram in seen
            num_all += 1
            seen.add(gram)
    assert repetition(responses) == pytest.approx(num_repeated / num_all)
    assert repetition(responses[:1]) is None
