"""All processes must have the same inputs as the first one."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from mergeopd.engine import run as command
from mergeopd.errors import StorageError
from mergeopd.preflight.inputs import preflight
from mergeopd.storage.run_folder import RunFolder


@pytest.fixture
def begun(write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose run the first process has begun."""
    monkeypatch.chdir(tmp_path)
    recipe = write_job().relative_to(tmp_path)
    inputs = preflight(recipe, ())
    RunFolder(Path(inputs.plan.output)).claim(inputs.plan, inputs.files, inputs.now, ())
    return recipe


def test_the_same_files_are_fine(begun: Path) -> None:
    assert command._same_inputs(begun, ()).files == preflight(begun, ()).files


def test_other_prompts_and_weights_are_named(begun: Path) -> None:
    """The plan is the same: it has paths alone."""
    import torch
    from safetensors.torch import load_file, save_file

    prompts, weights = Path("right.jsonl"), Path("two/model.safetensors")
    prompts.write_text(prompts.read_text().replace('"b"', '"c c"'))
    changed = load_file(weights)
    first = next(iter(changed))
    changed[first] = torch.zeros_like(changed[first])
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(StorageError) as caught:
        command._same_inputs(begun, ())
    assert str(caught.value) == (
        f"{platform.node()} has other contents in right.jsonl and two than the machine of the first process; "
        "give every machine the same files"
    )


def test_another_run_is_refused(begun: Path) -> None:
    with pytest.raises(StorageError, match=": the run of the first process is not in run; recipe"):
        command._same_inputs(begun, ("optimizer.lr=0.5",))
