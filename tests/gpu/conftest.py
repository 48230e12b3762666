"""Tests that need a GPU: skipped where torch sees none. `make test-gpu` runs them alone.

MERGEOPD_GPU_FIGURES=FILE writes what they measured as JSON. MERGEOPD_GPU_DEVICE=cpu rehearses the tests
themselves on a CPU, with small figures.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
