"""Logits of the next token: the prediction head where few rows meet a large vocabulary, again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.heads import Head, Projection

# Rows for which the packed layout is chosen; other numbers work with it too.
_TYPICAL_ROWS = 16


class DecodingHead:
    """A head as it is now, prepared for many small products; later changes of its weights do not count.

    On a CPU a product with few rows spends most of its time rearranging the head. oneDNN takes a head that
    was rearranged once: 2.8 times as fast for 16 rows, 1.3 times for 256, for a second copy of its true
    vocabulary in memory while answers are written. Elsewhere the head is used as it is stored.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._workspace = Workspace()
        weight = head.weight.detach()[: len(head.vocab)]
        self._packed: Tensor | None = None
        # Written for float32 alone: the other precisions of a head are converted as they are used.
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and has_onednn:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[rows, V]` over the true vocabulary, float64 for float64 states, else float32.

        The memory may be that of the call before.
        """
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        projection = Projection("rollout", self._head, hidden, 1.0, dtype, self._workspace)
        if self._packed is not None and hidden.dtype == torch.float32:
            logits: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, None, "none", [], "")
        else:
            logits = projection.raw_logits(slice(0, len(hidden)))
        projection.finish_logits(logits)
        return logits
