"""Sample tokens from logits: temperature, nucleus truncation, inverse-CDF sampling with given uniforms."""

from __future__ import annotations

import torch
from torch import Tensor

from mergeopd.errors import NumericsError

# The distribution function is inverted in two steps: a segment of the vocabulary by the masses of segments,
# then the token in it. Only these short sums are in float64: over a whole vocabulary, they would take several
# times as long as the softmax, and sums in float32 would lose small probabilities.
_SEGMENT = 256
# Number of logits per block, so that every pass over a block reads them from the processor's cache.
_BLOCK_ELEMENTS = 1 << 19
# Numbers of likeliest tokens among which a nucleus is searched, in order until one suffices.
_NUCLEUS_SIZES = (128, 1024)


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row; return `(token [B], logprob [B])`.

    `logits_BV` (float32 or float64) covers the true vocabulary only; `uniform_B` is in [0, 1). The
    log-probability is that of the sampled distribution: tempered, truncated to the smallest set of mass
    >= `top_p` and renormalised. `temperature` 0 takes the largest logit (the first of equal ones) with
    log-probability 0. Raises NumericsError if a row's logits are no distribution (NaN, +inf, all -inf).
    """
    if temperature == 0.0:
        largest, token = logits_BV.max(-1)  # NaN where a row has any
        _require_distribution(torch.isfinite(largest))
        return token, torch.zeros_like(token, dtype=torch.float32)
    rows = _block_rows(len(logits_BV), logits_BV.shape[1], logits_BV.device)
    parts = []
    for logits, uniform in zip(torch.split(logits_BV, rows), torch.split(uniform_B, rows), strict=True):
        parts.append(draw(masses(logits, temperature, top_p), uniform))
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def masses(logits_nV: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return the distributions of `sample` before renormalisation, for a positive temperature."""
    mass = torch.softmax(logits_nV if temperature == 1.0 else logits_nV / temperature, dim=-1)
    return mass if top_p >= 1.0 else _nucleus(mass, top_p)


def _block_rows(num_rows: int, vocab: int, device: torch.device) -> int:
    """Return the rows per block: on a GPU all, as a block costs some 25 kernel launches and a host sync."""
    return max(_BLOCK_ELEMENTS // vocab, 1) if device.type == "cpu" else max(num_rows, 1)


def draw(mass_nV: Tensor, uniform_n: Tensor) -> tuple[Tensor, Tensor]:
    """Draw tokens from masses that need not sum to one; return them with log-probabilities."""
    num, vocab = mass_nV.shape
    width = min(_SEGMENT, vocab)
    segments = torch.nn.functional.pad(mass_nV, (0, -vocab % width)).view(num, -1, width)
    size = segments.sum(2).double()
    reach = size.cumsum(1)
    total = reach[:, -1:].contiguous()
    _require_distribution((total > 0.0) & (total < torch.inf))
    target = uniform_n.to(total)[:, None] * total
    segment = torch.searchsorted(reach, target, right=True)
    within = segments.take_along_dim(segment[:, :, None], 1)[:, 0].double().cumsum(1)
    whole = within[:, -1:].contiguous()
    chosen = size.gather(1, segment)
    # The sum of this segment is float32 in `size` and float64 in `within`, so the target is scaled.
    share = (target - (reach.gather(1, segment) - chosen)) / chosen
    last = torch.searchsorted(within, whole)  # the last token with a probability above 0
    column = torch.searchsorted(within, share * whole, right=True).minimum(last)
    token = segment * width + column
    logprob = mass_nV.gather(1, token).log() - total.log().to(mass_nV.dtype)
    return token.squeeze(1), logprob.squeeze(1)


def _require_distribution(is_valid: Tensor) -> None:
    if not is_valid.all():
        raise NumericsError(
            "the logits of a generating model are NaN or infinite; "
            "its weights are damaged or its dtype is too narrow (try dtype: float32)"
        )


def _nucleus(mass_nV: Tensor, top_p: float) -> Tensor:
    """Set the masses outside each row's smallest set of mass >= `top_p` to zero.

    Sorting a large vocabulary takes much longer than sampling from it, and few tokens usually suffice.
    """
    kept = torch.zeros_like(mass_nV)
    rows = torch.arange(len(mass_nV), device=mass_nV.device)
    vocab = mass_nV.shape[1]
    for num in (*(size for size in _NUCLEUS_SIZES if size < vocab), vocab):
        largest, index = mass_nV[rows].topk(num, dim=1)
        reach = largest.cumsum(1, dtype=torch.float64)
        inside = torch.where(reach - largest < top_p, largest, 0.0)
        kept[rows] = torch.zeros_like(mass_nV[rows]).scatter(1, index, inside)
        rows = rows[reach[:, -1] < top_p]
        if not len(rows):
            break
    return kept
