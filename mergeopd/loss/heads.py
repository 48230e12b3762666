"""Prediction heads: hidden states to logits, and logit gradients back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.slicing import slices

_HALVES = (torch.bfloat16, torch.float16)
# Head rows converted at a time when the dtype of storage differs from the dtype of the product.
_TILE_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Head:
    """A prediction head, or this rank's rows of it: `z = h W^T + bias`, then scale, then soft cap.

    weight      `[V_rows, d]`; padding rows, if any, are at the end
    bias        `[V_rows]`
    scale       multiplies the logits (Cohere's `logit_scale`; one over Granite's `logits_scaling`)
    softcap     `z = softcap * tanh(z / softcap)`, after the scale (Gemma)
    num_valid   rows that belong to the true vocabulary, 0 to V_rows; the rest is excluded from every softmax
                and gets no gradient. None: all rows
    vocab_start token id of row 0
    weight_grad `[V_rows, d]`, owned by the caller, in the dtype of computation. The loss functions add the
                weight's gradient to it at once, without a matrix of their own and without rounding it to the
                weight's dtype; backward then returns none, and must be called on the plain loss
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    num_valid: int | None = None
    vocab_start: int = 0
    weight_grad: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ValueError(f"head weight must be [V, d], got {list(self.weight.shape)}")
        rows = self.weight.shape[0]
        like = (("head bias", self.bias, (rows,)), ("weight_grad", self.weight_grad, self.weight.shape))
        for name, tensor, shape in like:
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} like the weight, got {list(tensor.shape)}")
        if self.num_valid is not None and not 0 <= self.num_valid <= rows:
            raise ValueError(f"num_valid is {self.num_valid}, but the head has {rows} rows")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}, must be positive; None means no cap")

    @property
    def vocab(self) -> range:
        """The true token ids scored by this head (shard)."""
        num = self.weight.shape[0] if self.num_valid is None else self.num_valid
        return range(self.vocab_start, self.vocab_start + num)


@dataclass(frozen=True, eq=False)
class Hidden:
    """An exact target: a teacher's last hidden states `[N, d_T]` (after the final norm) and its head."""

    hidden: Tensor
    head: Head


class Projection:
    """Products of one model's head into and out of logit space, without padding rows.

    For half-precision hidden states the head is rounded to their dtype, as in the model's own forward pass,
    but products accumulate in `dtype` and logits are `dtype`. CUDA multiplies halves natively; a CPU would
    round the result, so there the (exactly representable) operands are widened, the head tile by tile.
    """

    def __init__(
        self,
        name: str,
        head: Head,
        hidden_ND: Tensor,
        temperature: float,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        self._name = name
        self._workspace = workspace
        self._hidden_ND = hidden_ND.detach()
        self._weight_VD = head.weight.detach()[: len(head.vocab)]
        self.bias_V = None if head.bias is None else head.bias.detach()[: len(head.vocab)].to(dtype)
        self._scale, self._softcap = head.scale, head.softcap
        self._temperature = temperature
        self.dtype, self.device = dtype, hidden_ND.device
        is_half = hidden_ND.dtype in _HALVES
        self._rounding = hidden_ND.dtype if is_half else self._weight_VD.dtype
        self.operand = hidden_ND.dtype if is_half and _multiplies_halves(hidden_ND.device) else dtype

    @property
    def gain(self) -> float:
        """d(tempered logit) / d(raw logit), without the soft cap's slope."""
        return self._scale / self._temperature

    @property
    def factors(self) -> tuple[float, float]:
        """Factors of the (biased) logits before and after the soft cap; without a cap, 0 after it."""
        if self._softcap is None:
            return self.gain, 0.0
        return self._scale / self._softcap, self._softcap / self._temperature

    def take(self, name: str, rows: int) -> Tensor:
        """Return a buffer `[rows, V]` of this projection."""
        return self._workspace.take(
            f"{self._name}.{name}", (rows, self._weight_VD.shape[0]), self.dtype, self._weight_VD.device
        )

    def raw_logits(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Compute `h W^T` of the rows, `[n, V]`, in `out` or in a buffer that the next call reuses."""
        hidden = self._hidden_ND[rows].to(self.operand)
        if out is None:
            out = self.take("logits", hidden.shape[0])
        with _exact_bfloat16_products() if self._has_bfloat16_operands else nullcontext():
            for tile, weight in self._tiles():
                _mm(hidden, weight.t(), out[:, tile])
        return out

    @property
    def _has_bfloat16_operands(self) -> bool:
        """Whether states and head are bfloat16 numbers, which are multiplied as float32."""
        is_wide = self.operand == torch.float32 and self.device.type == "cpu"
        return is_wide and self._hidden_ND.dtype == torch.bfloat16 and _has_amx()

    def finish_logits(self, raw_nV: Tensor, slope: Tensor | None = None) -> None:
        """Apply bias, scale, soft cap and temperature in place; `slope [n, V]` receives the cap's slope."""
        if self.bias_V is not None:
            raw_nV.add_(self.bias_V)
        before, after = self.factors
        if before != 1.0:
            raw_nV.mul_(before)
        if self._softcap is None:
            return
        raw_nV.tanh_()
        if slope is not None:
            torch.mul(raw_nV, raw_nV, out=slope).neg_().add_(1.0)
        raw_nV.mul_(after)

    @property
    def is_capped(self) -> bool:
        return self._softcap is not None

    def grad_hidden(self, dz_nV: Tensor, out_nD: Tensor) -> None:
        """Compute `dH = dz W` of the rows; `out_nD` may have the hidden states' narrower dtype."""
        wide = out_nD
        if out_nD.dtype != self.dtype:
            shape, device = tuple(out_nD.shape), out_nD.device
            wide = self._workspace.take(f"{self._name}.dH", shape, self.dtype, device)
        dz = self._converted("dz", dz_nV, self.operand)
        if not self._weight_VD.shape[0]:
            wide.zero_()
        for index, (tile, weight) in enumerate(self._tiles()):
            _mm(dz[:, tile], weight, wide, accumulate=index > 0)
        if wide is not out_nD:
            out_nD.copy_(wide)

    def grad_weight(self, dz_nV: Tensor, rows: slice, out_VD: Tensor, *, accumulate: bool) -> None:
        """Compute `dW (+)= dz^T h` of the rows, in `dtype`, true vocabulary only."""
        hidden = self._hidden_ND[rows].to(self.operand)
        dz = self._converted("dz", dz_nV, self.operand)
        for tile in self._tile_slices(whole=self.operand == self.dtype):
            _mm(dz[:, tile].t(), hidden, out_VD[tile], accumulate=accumulate)

    def _converted(self, name: str, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the matrix in another dtype, in a buffer of this name unless it has that dtype already."""
        if matrix.dtype == dtype:
            return matrix
        shape, device = tuple(matrix.shape), matrix.device
        return self._workspace.take(f"{self._name}.{name}", shape, dtype, device).copy_(matrix)

    def _tile_slices(self, *, whole: bool) -> Iterator[slice]:
        rows = self._weight_VD.shape[0]
        return slices(0, rows, max(rows, 1) if whole else _TILE_ROWS)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the head in the dtype of its products, converted into a small fixed buffer if needed."""
        weight = self._weight_VD
        as_stored = weight.dtype == self._rounding == self.operand
        for tile in self._tile_slices(whole=as_stored):
            part = weight[tile]
            if not as_stored:
                part = self._converted("rounded", part, self._rounding)
                part = self._converted("operand", part, self.operand)
            yield tile, part


@contextmanager
def _exact_bfloat16_products() -> Iterator[None]:
    """Multiply float32 matrices of bfloat16 numbers with a CPU's bfloat16 units, which add up in float32.

    Nothing is rounded. The logit gradient is no such matrix: its products stay those of float32.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _multiplies_halves(device: torch.device) -> bool:
    """Whether the device multiplies half-precision operands into a float32 result."""
    return device.type == "cuda"


def _mm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """`out (+)= a b` in the precision of `out`, without a temporary."""
    if a.dtype == out.dtype and accumulate:
        out.addmm_(a, b)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
