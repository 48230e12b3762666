"""From logits to tokens: temperature, nucleus truncation, inverse-CDF draws from given uniforms."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row; returns `(token [B], logprob [B])`.

    `logits_BV` covers the true vocabulary only. The log-probability is that of the distribution drawn from:
    tempered, truncated to the smallest set of mass >= `top_p` and renormalised. `temperature` 0 takes the
    largest logit (the first of equals) with log-probability 0.
    """
    if temperature == 0.0:
        token = logits_BV.argmax(-1)
        return token, torch.zeros_like(token, dtype=torch.float32)
    logprob = torch.log_softmax(logits_BV.float() / temperature, dim=-1)
    if top_p < 1.0:
        logprob = _nucleus(logprob, top_p)
    # float64: in float32 the running sum over a large vocabulary would lose the small probabilities.
    cdf = logprob.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cdf, uniform_B.to(cdf)[:, None] * cdf[:, -1:], right=True)
    return drawn.squeeze(1), logprob.gather(1, drawn).squeeze(1)


def _nucleus(logprob_BV: Tensor, top_p: float) -> Tensor:
    ordered, index = logprob_BV.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = torch.zeros_like(logprob_BV, dtype=torch.bool).scatter_(1, index, mass_before >= top_p)
    return torch.log_softmax(logprob_BV.masked_fill(dropped, float("-inf")), dim=-1)
