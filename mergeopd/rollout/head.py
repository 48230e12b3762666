"""Compute next-token logits: products of few rows with the head of a large vocabulary, repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.heads import Head, Projection

# Rows for which the packed layout is chosen; other numbers work with it too.
_TYPICAL_ROWS = 16


class DecodingHead:
    """A prediction head prepared for many small products; later changes of its weights have no effect.

    On a CPU, a product with few rows spends most of its time reordering the head. oneDNN accepts a head that
    was reordered once: 2.8 times as fast for 16 rows, 1.3 times for 256. This needs memory for a second copy
    of the head during generation. On other devices the head is used as it is stored.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._workspace = Workspace()
        weight = head.weight.detach()[: len(head.vocab)]
        self._packed: Tensor | None = None
        # For float32 only: heads of other precisions are converted when they are used.
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and has_onednn:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits `[rows, V]` over the true vocabulary, in float64 for float64 states, else float32.

        The next call may reuse the memory.
        """
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        projection = Projection("rollout", self._head, hidden, 1.0, dtype, self._workspace)
        if self._packed is not None and hidden.dtype == torch.float32:
            logits: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, None, "none", [], "")
        else:
            logits = projection.raw_logits(slice(0, len(hidden)))
        projection.finish_logits(logits)
        return logits
