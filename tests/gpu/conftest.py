"""Tests that need a GPU: skipped where torch sees none. `make test-gpu` runs them alone.

MERGEOPD_GPU_FIGURES=FILE writes what they measured as JSON. MERGEOPD_GPU_DEVICE=cpu rehearses the tests
themselves on a CPU, with small figures.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Record = Callable[[str, object], None]


@pytest.fixture(scope="session")
def device() -> Any:
    import torch

    chosen = os.environ.get("MERGEOPD_GPU_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device(chosen)


@pytest.fixture(scope="session")
def record(device: Any) -> Record:
    """Keep a figure by name. The file is written each time, so that an interrupted session keeps its figures."""
    import torch
    import transformers

    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

    def keep(name: str, value: object) -> None:
        figures[name] = value
        path = os.environ.get("MERGEOPD_GPU_FIGURES")
        if path:
            Path(path).write_text(json.dumps(figures, indent=1) + "\n")

    return keep


@pytest.fixture(scope="session")
def project(device: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes, the cards, and the experts: those of the checkout, or new ones."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("recipes", "teachers"):
        shutil.copytree(ROOT / name, folder / name)
    if (ROOT / "experts").is_dir():
        shutil.copytree(ROOT / "experts", folder / "experts")
    _python("tools/make_tiny_experts.py", "--out", str(folder / "experts"), cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def command() -> Callable[..., float]:
    return _python


@pytest.fixture(scope="session")
def shortened() -> Callable[..., list[str]]:
    """Function that returns options of a quickstart with few updates and prompts."""
    return _shortened


def _shortened(output: str, updates: int, prompts: int, *settings: str) -> list[str]:
    every = [
        f"output={output}", f"phases.0.updates={updates}", f"phases.0.prompts_per_round={prompts}",
        "optimizer.warmup_updates=2", "evaluation.static_merges=[]", *settings,
    ]  # fmt: skip
    every += [f"evaluation.prompts.{i}.limit=4" for i in range(5)]
    return [part for one in every for part in ("--set", one)]


def _python(*arguments: str, cwd: Path, returns: int = 0) -> float:
    """Run Python in a new process; its seconds. Shows the output if the process fails."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == returns, done.stdout[-3000:] + done.stderr[-3000:]
    return time.perf_counter() - start
