"""Choice between the torch operations and the Triton kernels that work between the matrix products."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

KernelName = Literal["auto", "torch", "triton"]


def kernel_problem(kernel: KernelName, device_type: str) -> str | None:
    """Return why a kernel cannot run on a device, and the remedy; None if it can. Imports nothing."""
    if kernel != "triton":
        return None
    if not _has_triton():
        return "Triton is not installed; use `torch`, or install the package `triton`"
    if device_type != "cuda" and not _interprets():
        return (
            f"Triton needs a GPU, this device is {device_type!r}; use `auto` or `torch`, "
            "or set TRITON_INTERPRET=1 for its (slow) interpreter"
        )
    return None


def choose_kernel(kernel: KernelName, device_type: str) -> Literal["torch", "triton"]:
    """Resolve `auto`: Triton on a GPU where it is installed. Raises ValueError for one that cannot run."""
    problem = kernel_problem(kernel, device_type)
    if problem is not None:
        raise ValueError(f"kernel 'triton': {problem}")
    if kernel == "auto":
        return "triton" if device_type == "cuda" and _has_triton() else "torch"
    return kernel


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interprets() -> bool:
    """Whether Triton runs kernels in its interpreter: decided by the environment when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "y", "yes")
