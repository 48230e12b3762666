"""Targets of the loss: a teacher's hidden states, its top k, or the sampled token's log-probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from mergeopd.loss.heads import Hidden

# Largest range of integers that are exact in float32; float64 is exact for any vocabulary.
_EXACT_IDS = 1 << 24
_PACKED_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's log-probabilities of k tokens at each of N positions, in nats, at the loss temperature.

    ids      `[N, k]` int64 token ids, none twice at a position, in any order
    logprobs `[N, k]` their log-probabilities over the whole vocabulary
    logprob  `[N]` of the sampled token
    entropy  `[N]` of the whole distribution; NaN where it is not known
    log_tail `[N]` log of the mass of all other tokens; 1 minus the sum of `logprobs` loses it where it is
             small. Unused where there are no others
    of       whose k most probable tokens they are; a support must be of the same model
    """

    ids: Tensor
    logprobs: Tensor
    logprob: Tensor
    entropy: Tensor
    log_tail: Tensor
    of: Literal["teacher", "student"] = "teacher"

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.shape[1] < 1 or self.ids.dtype != torch.int64:
            raise ValueError(
                f"TopK.ids must be int64 [N, k], k at least 1, got {self.ids.dtype} {list(self.ids.shape)}"
            )
        _require_shape("TopK.logprobs", self.logprobs, *self.ids.shape)
        for name in ("logprob", "entropy", "log_tail"):
            _require_shape(f"TopK.{name}", getattr(self, name), self.ids.shape[0])

    @property
    def k(self) -> int:
        """Tokens per position."""
        return self.ids.shape[1]

    def largest(self, k: int) -> TopK:
        """Keep the k most probable tokens; the mass of the others is added to the tail."""
        if k >= self.k:
            return self
        kept = self.logprobs.argsort(dim=1, descending=True, stable=True)[:, :k]
        others = self.logprobs.scatter(1, kept, -torch.inf).logsumexp(1)
        return TopK(
            ids=self.ids.gather(1, kept),
            logprobs=self.logprobs.gather(1, kept),
            logprob=self.logprob,
            entropy=self.entropy,
            log_tail=torch.logaddexp(self.log_tail, others),
        )

    def packed(self) -> Tensor:
        """Pack all fields, without loss, into one matrix `[N, 2k + 3]` of the dtype of `logprobs`.

        Raises ValueError for half precision, and for ids of 2^24 and more in float32.
        """
        dtype = self.logprobs.dtype
        _require_exact("TopK.packed", dtype)
        if dtype == torch.float32 and self.ids.numel() and int(self.ids.max()) >= _EXACT_IDS:
            raise ValueError(
                f"TopK.packed: token id {int(self.ids.max())} is not exact in float32, which ends at 2^24; "
                "give logprobs in float64"
            )
        scalars = torch.stack([self.logprob, self.entropy, self.log_tail], 1).to(dtype)
        return torch.cat([self.ids.to(dtype), self.logprobs, scalars], 1)

    @classmethod
    def unpack(cls, packed: Tensor, of: Literal["teacher", "student"] = "teacher") -> Self:
        """Invert `packed`; all fields but ids share its memory. Raises ValueError for another shape."""
        width = packed.shape[1] if packed.dim() == 2 else 0
        if width < 5 or not width % 2:
            raise ValueError(f"TopK.unpack: must be [N, 2k + 3], got {list(packed.shape)}")
        _require_exact("TopK.unpack", packed.dtype)
        k = (width - 3) // 2
        logprob, entropy, log_tail = packed[:, 2 * k :].unbind(1)
        return cls(packed[:, :k].long(), packed[:, k : 2 * k], logprob, entropy, log_tail, of)


@dataclass(frozen=True, eq=False)
class Sampled:
    """`logprob [N]` of the sampled token and `entropy [N]`, in nats, at the loss temperature.

    No divergence can be computed from it. The entropy is NaN where it is not known.
    """

    logprob: Tensor
    entropy: Tensor

    def __post_init__(self) -> None:
        num = self.logprob.shape[0] if self.logprob.dim() else 0
        _require_shape("Sampled.logprob", self.logprob, num)
        _require_shape("Sampled.entropy", self.entropy, num)

    def packed(self) -> Tensor:
        """Pack both into one matrix `[N, 2]`, float32 or float64. Raises ValueError for half precision."""
        _require_exact("Sampled.packed", self.logprob.dtype)
        return torch.stack([self.logprob, self.entropy], 1)

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """Invert `packed`, sharing its memory. Raises ValueError for another shape."""
        if packed.dim() != 2 or packed.shape[1] != 2:
            raise ValueError(f"Sampled.unpack: must be [N, 2], got {list(packed.shape)}")
        _require_exact("Sampled.unpack", packed.dtype)
        return cls(packed[:, 0], packed[:, 1])


Target = Hidden | TopK | Sampled


def _require_shape(name: str, values: Tensor, *shape: int) -> None:
    if values.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(values.shape)}")


def _require_exact(what: str, dtype: torch.dtype) -> None:
    if dtype not in _PACKED_DTYPES:
        raise ValueError(f"{what}: {dtype} cannot hold these numbers exactly; use float32 or float64")
