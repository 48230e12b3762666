"""Suggestions in place of a path that does not exist."""

from __future__ import annotations

from pathlib import Path

from mergeopd.config.suggest import closest_path


def test_hidden_and_partial_files_are_not_suggested(tmp_path: Path) -> None:
    for name in ("experts.partial", ".experts"):
        (tmp_path / name / "base").mkdir(parents=True)
    assert closest_path("experts/base", tmp_path, directory=True) == ""
    (tmp_path / "expert" / "base").mkdir(parents=True)
    assert closest_path("experts/base", tmp_path, directory=True) == "expert/base"
