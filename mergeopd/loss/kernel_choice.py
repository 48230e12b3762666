"""Choice between the torch operations and the Triton kernels that work between the matrix products."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

KernelName = Literal["auto", "torch", "triton"]


def choose_kernel(kernel: KernelName, device_type: str) -> Literal["torch", "triton"]:
    """Resolve `auto`: Triton on a GPU where it is installed. Raises ValueError for one that cannot run."""
    if kernel == "auto":
        return "triton" if device_type == "cuda" and _has_triton() else "torch"
    if kernel == "triton" and not _has_triton():
        raise ValueError("kernel 'triton': it is not installed; pip install triton, or use 'auto' or 'torch'")
    if kernel == "triton" and device_type != "cuda" and not _interprets():
        raise ValueError(
            f"kernel 'triton': it needs a GPU, and the tensors are on the device {device_type!r}; use 'auto' "
            "or 'torch', or set TRITON_INTERPRET=1 for Triton's (slow) interpreter"
        )
    return kernel


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interprets() -> bool:
    """Whether Triton runs kernels in its interpreter: decided by the environment when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
