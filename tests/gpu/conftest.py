"""Tests that need a GPU: skipped where torch sees none. `make test-gpu` runs them alone.

MERGEOPD_GPU_FIGURES=FILE writes what they measured as JSON. MERGEOPD_GPU_DEVICE=cpu rehearses the tests
themselves on a CPU, with small figures.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Figures = dict[str, Any]


@pytest.fixture(scope="session")
def device() -> Any:
    import torch

    chosen = os.environ.get("MERGEOPD_GPU_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device(chosen)


@pytest.fixture(scope="session")
def figures(device: Any) -> Iterator[Figures]:
    """Figures by name; written when the last test is done."""
    import torch
    import transformers

    found: Figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    yield found
    path = os.environ.get("MERGEOPD_GPU_FIGURES")
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
