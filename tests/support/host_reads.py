"""Counts the places where a program would wait for an accelerator to read a number of it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import mergeopd

_READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
} | {torch.nonzero, torch.masked_select}
_PACKAGE = mergeopd.__path__[0]


class HostReads(TorchFunctionMode):
    """Counts, by module of the package, reads of tensors in main memory, and selections of unknown size.

    On a CPU every tensor is counted, also those that stay there when a GPU computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_module: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        if func in _READS or by_mask:
            self.by_module[_caller()] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else frame.f_globals["__name__"].removeprefix("mergeopd.")
