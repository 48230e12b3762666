"""Whether a run folder can be written to, found without creating anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergeopd.config.folders import unwritable


def test_a_folder_that_can_be_created_is_not_created(tmp_path: Path) -> None:
    assert unwritable(tmp_path / "runs" / "new") is None
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_existing_folder_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with contents may be read-only: a finished run can still be evaluated."""
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.R_OK)  # root may write to all
    done, empty = tmp_path / "done", tmp_path / "empty"
    for folder in (done, empty):
        folder.mkdir()
    (done / "plan.yaml").touch()
    assert unwritable(done) is None
    assert unwritable(empty) == empty
    assert unwritable(done / "new" / "run") == done
    assert unwritable(done / "plan.yaml" / "run") == done / "plan.yaml"
