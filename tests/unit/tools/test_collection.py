"""Every file of tests is collected: pytest skips folders by name, `dist` among them, unless told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


def test_no_folder_of_tests_is_left_out(request: pytest.FixtureRequest) -> None:
    left_out = request.config.getini("norecursedirs")
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    assert {"dist", "e2e", "errors"} <= {folder.name for folder in folders}
    for folder in folders:
        parts = folder.relative_to(TESTS).parts
        assert not [part for part in parts for pattern in left_out if Path(part).match(pattern)]
