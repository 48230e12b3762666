"""Start SGLang's server on a machine without a GPU; the arguments are those of `sglang.launch_server`.

SGLang imports two packages that exist for CUDA only, and calls neither with the torch attention backend: its
own kernels, and the operators of torchvision. Their names are declared here. The server's child processes are
spawned, so they import this file first, too.
"""

from __future__ import annotations

import runpy
import sys
from types import ModuleType
from typing import Any, NoReturn

import torch


class _Kernels(ModuleType):
    """A module that has every name, and functions that cannot be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: object, **__: object) -> NoReturn:
            raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

        return missing


sys.modules["sgl_kernel"] = _Kernels("sgl_kernel")
_LIBRARY: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
