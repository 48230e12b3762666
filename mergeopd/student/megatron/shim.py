"""CPU stand-ins for the CUDA calls that megatron-core 0.16 makes unconditionally.

Megatron calls `torch.cuda.current_device()`, creates tensors on "cuda", compares `Tensor.type()` with
`torch.cuda.FloatTensor`, and copies the numbers of tokens for experts on a stream of its own. `install`
redirects these to the CPU. It changes the whole process, so use it only in processes of a grid; with a GPU it
has no effect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _Stream:
    """The CPU's stream: what was submitted has been computed."""

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        """Return at once."""


class _OnCpu(TorchFunctionMode):
    """Redirects every torch call that names a CUDA device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:  # the mode stays active for recomputation in backward
            renamed = {"grad_tensors" if k == "gradient" else k: v for k, v in kwargs.items()}
            with self:
                return torch.autograd.backward(args[0], *args[1:], **renamed)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def install() -> None:
    """Make megatron-core run on the CPU in this process, permanently. No effect where CUDA is present."""
    if torch.cuda.is_available() or vars(torch.cuda)["current_device"] is _current_device:
        return
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    stream = _Stream()
    replacements: dict[str, Callable[..., Any]] = {
        "current_device": _current_device,
        "synchronize": lambda *_, **__: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *_, **__: stream,
        "stream": lambda _: nullcontext(),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = stream
    token_dispatcher.maybe_move_tensor_to_cpu = _counts
    megatron_random._get_cuda_rng_state = replacements["get_rng_state"]
    megatron_random._set_cuda_rng_state = replacements["set_rng_state"]
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    # torch.autograd.backward would dispatch to the mode, which calls it: infinite recursion.
    vars(torch.autograd)["has_torch_function"] = lambda _: False
    _OnCpu().__enter__()  # type: ignore[no-untyped-call]


def _counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return numbers of tokens as Megatron does with those of a GPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _is_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _current_device() -> torch.device:
    return _CPU
