"""Damaged run folders: the damage is reported and intact parts are used, or the run is refused unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeopd.storage.folders import MANIFEST, atomic_folder, verify


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def half_delete(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / "state.json").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda c: cut(c / "student-1-of-1.safetensors"), "bytes instead of"),
    "flipped in the weights": (lambda c: flip(c / "student-1-of-1.safetensors", -9), "SHA-256 differs"),
    "flipped in the state": (lambda c: flip(c / "state.json", 12), "SHA-256 differs"),
    "flipped in the manifest": (lambda c: flip(c / MANIFEST, 40), "manifest.json is damaged"),
    "no weights": (
        lambda c: (c / "student-1-of-1.safetensors").unlink(),
        "student-1-of-1.safetensors is missing",
    ),
    "no state": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "empty manifest": (lambda c: (c / MANIFEST).write_text(""), "manifest.json is empty"),
    "no manifest": (half_delete, "manifest.json is missing"),
    "a file": (lambda c: (shutil.rmtree(c), c.write_text("")), "is not a folder"),
}


@pytest.fixture(scope="module")
def half_way(runs: Any) -> str:
    """A run with two checkpoints, step-2 and step-4."""
    assert runs("half-way", "--updates", "4")[0] == 3
    return "half-way"


@pytest.fixture
def copy(runs: Any, tmp_path: Path) -> Callable[[str], str]:
    """Copy a run and its teacher rollouts to a folder for this test."""

    def make(source: str) -> str:
        name = f"copy-{tmp_path.name}"
        for suffix in ("", "-texts"):
            shutil.copytree(runs.folder(source + suffix), runs.folder(name + suffix))
        return name

    return make


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    runs: Any, ends_well: Callable[..., str], half_way: str, copy: Callable[[str], str], damage: str
) -> None:
    name = copy(half_way)
    spoil, reason = DAMAGE[damage]
    checkpoint = runs.folder(name) / "checkpoints" / "step-4"
    spoil(checkpoint)
    printed = ends_well(name)
    [warning] = [line for line in printed.splitlines() if "  warning: skipped" in line]
    assert str(checkpoint) in warning
    assert reason in warning
    assert "resumes after update 2" in printed


def test_a_run_without_intact_checkpoints_starts_from_the_beginning(
    runs: Any, ends_well: Callable[..., str], half_way: str, copy: Callable[[str], str]
) -> None:
    name = copy(half_way)
    for step in ("step-2", "step-4"):
        cut(runs.folder(name) / "checkpoints" / step / "state.json")
    printed = ends_well(name)
    assert printed.count("warning: skipped") == 2
    assert "no intact checkpoint is left: the run starts from the beginning" in printed


def rewrite(checkpoint: Path, change: Callable[[Path], object]) -> None:
    """Change the content of a checkpoint and write a matching manifest."""
    old = checkpoint.with_name("old")
    checkpoint.rename(old)
    with atomic_folder(checkpoint) as folder:
        for name in ("student-1-of-1.safetensors", "index.json", "state.json"):
            shutil.copyfile(old / name, folder / name)
        change(folder)
    shutil.rmtree(old)


def edit_state(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def other_student(folder: Path) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    name = next(n for n in index["tensors"]["student"] if n.startswith("master."))
    index["tensors"]["student"][name]["shape"][0] -= 1
    path.write_text(json.dumps(index))


def other_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "student-1-of-1.safetensors")
    name = next(n for n in tensors if n.startswith("master.") and tensors[n].ndim == 2)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, folder / "student-1-of-1.safetensors")


STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another recipe": (edit_state(plan="0" * 64), "belongs to another recipe"),
    "another format": (edit_state(format=7), "has format 7, and this version of mergeopd reads 2"),
    "no format": (lambda f: (f / "state.json").write_text("[]"), "has format None"),
    "no plan": (edit_state(plan=None), "state.json is not that of a run (plan: Input should be"),
    "no JSON": (lambda f: (f / "state.json").write_text("{"), "is not a checkpoint of a run"),
    "other files": (lambda f: (f / "state.json").rename(f / "status.json"), "is not a checkpoint of a run"),
    "no tensors": (
        lambda f: (f / "student-1-of-1.safetensors").write_text("x" * 99),
        "student-1-of-1.safetensors is not what index.json lists",
    ),
    "other tensors": (other_tensors, "numbers as master."),
    "another student": (other_student, "is of another student"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_an_intact_checkpoint_of_another_run_is_refused(
    runs: Any, half_way: str, copy: Callable[[str], str], stranger: str
) -> None:
    name = copy(half_way)
    change, message = STRANGERS[stranger]
    checkpoint = runs.folder(name) / "checkpoints" / "step-4"
    rewrite(checkpoint, change)
    code, printed = runs(name)
    assert code == 1
    [error] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "step-4" in error
    assert message in error
    assert "move it away to resume from the previous one" in error
    assert verify(checkpoint) is None  # it is unchanged


def test_lost_metrics_are_reported_and_change_nothing_else(
    runs: Any,
    undisturbed: dict[str, str],
    outcome: Callable[..., Any],
    half_way: str,
    copy: Callable[[str], str],
) -> None:
    name = copy(half_way)
    metrics = runs.folder(name) / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0] + lines[1][:50] + "\n" + "".join(lines[2:]))
    shutil.rmtree(runs.folder(name) / "rollouts")
    code, printed = runs(name)
    assert code == 1
    assert "metrics.jsonl: line 2 is damaged; correct or remove that line" in printed
    for left, message in ((lines[:1] + lines[2:], "lines of 3 of the 4"), ([], "lines of 0 of the 4")):
        metrics.write_text("".join(left))
        code, printed = runs(name, "--updates", "1")
        assert message in printed
        assert "samples.jsonl lacks sampled responses of the 4 updates made so far" in printed
        shutil.rmtree(runs.folder(name) / "checkpoints" / "step-5", ignore_errors=True)
    metrics.unlink()
    code, printed = runs(name)
    assert code == 0
    result = outcome(runs.folder(name))
    assert [key for key in result if result[key] != undisturbed[key]] == ["metrics", "samples"]
    assert result["metrics"] == "\n".join(undisturbed["metrics"].splitlines()[4:])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("lr: 0.01", "lr: 0.02"),
        lambda text: text.replace("started: '2", "started: 'x"),
        lambda text: "",
    ],
    ids=["torn", "changed", "no date", "empty"],
)
def test_a_damaged_plan_is_reported(
    runs: Any, half_way: str, copy: Callable[[str], str], spoil: Callable[[str], str]
) -> None:
    name = copy(half_way)
    path = runs.folder(name) / "plan.yaml"
    text = path.read_text()
    path.write_text(spoil(text))
    assert path.read_text() != text
    code, printed = runs(name)
    assert code in (1, 2)
    assert "plan.yaml is damaged or of another version of mergeopd" in printed


@pytest.fixture
def finished(undisturbed: dict[str, str], copy: Callable[[str], str]) -> str:
    return copy("undisturbed")


EXPORT_DAMAGE: dict[str, Callable[[Path], object]] = {
    "half deleted": lambda e: (e / "config.json").unlink(),
    "flipped": lambda e: flip(e / "model.safetensors", -9),
    "no manifest": lambda e: (e / MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", EXPORT_DAMAGE)
def test_a_damaged_export_is_exported_again(
    runs: Any, ends_well: Callable[..., str], finished: str, damage: str
) -> None:
    export = runs.folder(finished) / "export"
    EXPORT_DAMAGE[damage](export)
    printed = ends_well(finished)
    assert "the export was damaged" in printed
    assert "update 1/6" not in printed
    assert (export.parent / "export.broken").is_dir()


def test_a_damaged_export_without_checkpoints_is_not_trained_over(runs: Any, finished: str) -> None:
    folder = runs.folder(finished)
    cut(folder / "export" / "config.json")
    shutil.rmtree(folder / "checkpoints")
    metrics = (folder / "metrics.jsonl").read_bytes()
    code, printed = runs(finished)
    assert code == 1
    assert "and no checkpoint is left to export from; move it away to train from the beginning" in printed
    assert (folder / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("content", ['{"suites": {', "{}", None])
def test_a_lost_result_is_evaluated_again(runs: Any, finished: str, content: str | None) -> None:
    """Also without checkpoints, as the export is enough."""
    folder = runs.folder(finished)
    path = folder / "result.json"
    expected = json.loads(path.read_text())["suites"]
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    metrics = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    code, printed = runs(finished)
    assert code == 0, printed
    assert json.loads(path.read_text())["suites"] == expected
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert not (folder / "checkpoints").exists()
    assert "This run is finished" in runs(finished)[1]
