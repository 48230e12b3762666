"""The largest logits of a head and of its shards, against a softmax over everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergeopd.loss.heads import Head
from mergeopd.loss.observe import top_logits


@pytest.mark.parametrize("cut", [None, 7, 38], ids=["whole", "two shards", "few rows in the second"])
def test_top_logits_of_shards_are_those_of_the_whole_vocabulary(cut: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(42, 8, generator=generator), torch.randn(42, generator=generator)
    hidden = 3.0 * torch.randn(600, 8, generator=generator)  # several chunks
    head = Head(weight, bias, scale=0.5, softcap=4.0, num_valid=40)
    raw = 0.5 * (hidden.double() @ weight[:40].double().T + bias[:40].double())
    expected = torch.log_softmax(4.0 * torch.tanh(raw / 4.0) / 1.5, -1).topk(3)
    heads = [head]
    if cut is not None:
        first = replace(head, weight=weight[:cut], bias=bias[:cut], num_valid=cut)
        heads = [
            first,
            replace(head, weight=weight[cut:], bias=bias[cut:], num_valid=40 - cut, vocab_start=cut),
        ]
    ids, logits, masses = zip(*(top_logits(hidden, one, 3, temperature=1.5) for one in heads), strict=True)
    assert all(part.diff(dim=1).le(0).all() for part in logits)  # the largest first
    log_mass = torch.stack(masses).logsumexp(0)
    best, order = torch.cat(logits, 1).topk(3)
    torch.testing.assert_close((best - log_mass[:, None]).double(), expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat(ids, 1).gather(1, order), expected.indices)
