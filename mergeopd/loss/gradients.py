"""Gradients computed before backward: accumulated chunk by chunk, then attached to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mergeopd.loss.heads import Head, Projection
from mergeopd.loss.slicing import compute_dtype

_NOT_SCALED = (
    "the head's gradient is already in weight_grad: call backward on the plain loss, not on a multiple of it"
)


class HeadGradients:
    """dH, dW and dbias of one head, each only where it is required."""

    def __init__(self, hidden_ND: Tensor, head: Head) -> None:
        inputs = (hidden_ND, head.weight, head.bias)
        needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
        dtype, num_valid = compute_dtype(hidden_ND), len(head.vocab)
        total = head.weight_grad if needs[1] else None
        if total is not None and total.dtype != dtype:
            raise ValueError(f"weight_grad is {total.dtype}, must be {dtype}, the dtype of computation")

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=hidden_ND.device)

        self._inputs = inputs
        self._num_valid = num_valid
        self._dH = torch.empty_like(hidden_ND, requires_grad=False) if needs[0] else None
        self._dW = (empty(*head.weight.shape) if total is None else total) if needs[1] else None
        self._dbias = empty(head.weight.shape[0]).zero_() if needs[2] else None
        self._accumulates = self._is_kept = total is not None
        if self._dW is not None and not self._is_kept:
            self._dW[num_valid if hidden_ND.shape[0] else 0 :].zero_()

    @property
    def any(self) -> bool:
        return any(gradient is not None for gradient in (self._dH, self._dW, self._dbias))

    def add(self, projection: Projection, dz_nV: Tensor, rows: slice) -> None:
        """Add the products of one chunk; every row of the hidden states must be added exactly once."""
        if self._dH is not None:
            projection.grad_hidden(dz_nV, self._dH[rows])
        if self._dW is not None:
            projection.grad_weight(dz_nV, rows, self._dW[: self._num_valid], accumulate=self._accumulates)
        if self._dbias is not None:
            self._dbias[: self._num_valid].add_(dz_nV.sum(0, dtype=self._dbias.dtype))
        self._accumulates = True

    def attach(self, loss: Tensor) -> Tensor:
        """Return `loss` with a backward that returns these gradients, in their inputs' dtypes.

        The weight's has already been added to the head's `weight_grad` where the head has one.
        """
        if not self.any:
            return loss
        gradients = [
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip((self._dH, self._dW, self._dbias), self._inputs, strict=True)
        ]
        if self._is_kept:
            gradients[1] = None
        attached: Tensor = _Attach.apply(loss, self._is_kept, *self._inputs, *gradients)  # type: ignore[no-untyped-call]
        return attached


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, is_kept: bool, *inputs_and_gradients: Tensor | None) -> Tensor:
        """`inputs_and_gradients`: hidden states, weight and bias, then the gradient of each."""
        ctx.is_kept = is_kept
        ctx.save_for_backward(*inputs_and_gradients[3:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients times `grad_loss`; on a CPU they are not copied for a plain `loss.backward()`."""
        gradients = ctx.saved_tensors
        if ctx.is_kept:
            torch._assert_async(grad_loss == 1.0, _NOT_SCALED)
        elif grad_loss.device.type != "cpu" or grad_loss != 1.0:  # reading it waits for any other device
            gradients = [None if gradient is None else gradient * grad_loss for gradient in gradients]
        return (None, None, *gradients, None, None, None)
