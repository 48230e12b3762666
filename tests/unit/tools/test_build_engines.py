"""Environments of engines are built once, and again when the recipe changed or a build failed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "tools" / "engines" / "build.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, whose environments are folders with a list of the builds."""
    spec = importlib.util.spec_from_file_location("build_engines", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def install(python: Path) -> None:
        python.parent.mkdir(parents=True)
        python.write_text("")

    monkeypatch.setattr(module.venv, "create", lambda folder, **_: folder.mkdir(parents=True))
    monkeypatch.setattr(module, "BUILD", {"vllm": install, "sglang": install})
    return module


def test_an_environment_is_used_again_until_its_recipe_changes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script.build("vllm", tmp_path)
    assert not script.build("vllm", tmp_path)
    assert script.build("sglang", tmp_path)
    (tmp_path / "vllm" / "old").touch()
    monkeypatch.setitem(script.VERSIONS, "vllm", "9.9.9")
    assert script.build("vllm", tmp_path)
    assert not (tmp_path / "vllm" / "old").exists()


def test_a_failed_build_is_reported_and_built_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install = script.BUILD["vllm"]

    def fail(python: Path) -> None:
        raise script.BuildError("no torch here")

    monkeypatch.setitem(script.BUILD, "vllm", fail)
    assert script.main(["vllm", "--out", str(tmp_path)]) == 1
    assert "vllm 0.32.0 cannot be built: no torch here" in capsys.readouterr().err
    monkeypatch.setitem(script.BUILD, "vllm", install)
    assert script.main(["vllm", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "vllm" / "bin" / "python").exists()
