"""The smallest job of inspect_trials.py, and the defects that it plants."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from small_experts import TOOLS, load_script, small_settings  # puts TOOLS on the path

from mergeopd.reporting.inspection import Verdict

UPDATES = 60  # fewer leave models that give all tokens the same probability, which no run accepts


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_trials", TOOLS / "inspect_trials.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the tool's command line in this process and returns what it prints."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["inspect_trials.py", *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def small_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `merge_bench.ROOT` with small experts for the sets of the inspections."""

    root = tmp_path_factory.mktemp("inspected")
    load_script().make(
        root / "experts" / "bench" / "quickstart-0", small_settings(UPDATES), 0, 1, Console(quiet=True)
    )
    return root


def test_inspect_trials(
    small_quickstart: Path, tool: ModuleType, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pairs whose verdict needs no training, and the merges of one domain."""
    monkeypatch.setattr(tool.merge_bench, "ROOT", small_quickstart)
    monkeypatch.setattr(tool, "OUT", small_quickstart)
    monkeypatch.setitem(tool.SETTINGS, "quickstart", small_settings(UPDATES))
    printed = call("verdicts", "--sets", "A", "--only", "the student itself", "re-initialised head")
    assert "set A: right on 2 of 2" in printed
    monkeypatch.setattr("planted_pairs.merges.PROMPTS", 4)
    monkeypatch.setattr("planted_pairs.merges.EVALUATED", 8)
    few = ("--domains", "sort", "--updates", 4)
    assert "expert for tool, sort" in call("cold_start", *few)
    assert "rank correlation by domain" in call("order", *few)
    for folder in ("base_sort/cold-4-0", "base_early_sort/merge-4-0"):
        assert (small_quickstart / "merges" / folder / "run" / "result.json").is_file()


def test_planted_defects(tool: ModuleType, small_quickstart: Path, tmp_path: Path) -> None:
    """What the folders hold: rows of end tokens changed places, other end tokens, noise behind a depth."""
    from planted_pairs.experts import Experts, random_tails, swapped_tails
    from planted_pairs.experts import load as load_model
    from planted_pairs.pairs import Maker
    from tiny_experts.tokens import Encoded

    experts = Experts(small_quickstart / "experts/bench/quickstart-0", small_settings(UPDATES), 0)
    make = Maker(experts, tmp_path)
    pair = make.other_end("sort", of_student=True, in_template=True)
    old, new = (
        load_model(folder).get_input_embeddings().weight for folder in (make.of("base"), pair.student)
    )
    end = experts.with_tokens(["<|endoftext|>"]).token_to_id("<|endoftext|>")
    assert end == 300
    noisy = dataclasses.replace(pair, right=("noisy",), depth=8)
    assert [noisy.accepts(Verdict("noisy", "", beyond=i)) for i in (5, 9, None)] == [False, True, False]
    assert not noisy.accepts(Verdict("ready", ""))
    assert new[[1, end]].equal(old[[end, 1]])
    assert json.loads((pair.student / "generation_config.json").read_text())["eos_token_id"] == end
    assert "<|endoftext|>" in (pair.student / "chat_template.jinja").read_text()
    assert json.loads((pair.teacher / "generation_config.json").read_text())["eos_token_id"] == 1

    rows = [Encoded([9], [*range(i, i + 6), 1]) for i in range(10, 40, 10)]
    for tails in (random_tails, swapped_tails):
        noisy = tails(rows, 2, 0)
        assert [row.answer_ids[:2] + row.answer_ids[6:] for row in noisy] == [
            [i, i + 1, 1] for i in (10, 20, 30)
        ]
        assert all(len(row.answer_ids) == 7 for row in noisy)
        assert noisy != rows


def test_rank_correlation(tool: ModuleType) -> None:
    """By hand: ranks 1, 2, 3 against 2, 1, 3 give 1 - 6 * 2 / (3 * 8); ties share their ranks."""
    from planted_pairs.merges import ranks, spearman

    assert ranks([0.5, 0.1, 0.5]) == [2.5, 1.0, 2.5]
    assert spearman([0.1, 0.2, 0.9], [0.5, 0.4, 0.6]) == pytest.approx(0.5)
    assert spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1.0)
