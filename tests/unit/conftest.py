"""A small project with a valid recipe, from which the broken recipes under `tests/errors` are made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1] / "errors" / "project"

Write = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the project and make the copy the current folder."""
    folder = tmp_path / "project"
    shutil.copytree(PROJECT, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def variant(project: Path) -> Write:
    """`variant((old, new), ...)` writes the good recipe with some texts replaced and returns its path."""

    def write(*changes: tuple[str, str], name: str = "variant.yaml") -> Path:
        text = (project / "recipes" / "merge.yaml").read_text()
        for old, new in changes:
            assert text.count(old) >= 1, old
            text = text.replace(old, new, 1)
        path = Path("recipes") / name
        path.write_text(text)
        return path

    return write
