"""The largest logits of a head and of its shards, against a softmax over everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergeopd.loss.heads import Head
from mergeopd.loss.observe import observe, top_logits
from mergeopd.loss.targets import TopK


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


@pytest.mark.parametrize("k", [1, 4, 7])
def test_the_largest_of_a_top_k_are_those_of_a_smaller_one(k: int) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = 4 * torch.randn(50, 8, generator=generator, dtype=torch.float64)
    head = Head(torch.randn(30, 8, generator=generator, dtype=torch.float64))
    labels = torch.randint(30, (50,), generator=generator)
    logprobs = torch.log_softmax(hidden @ head.weight.T, 1)
    whole = observe(hidden, head, labels, top_k=7)
    assert isinstance(whole, TopK)
    cut = whole.largest(k)
    values, ids = logprobs.topk(k)
    order = cut.logprobs.argsort(dim=1, descending=True)
    assert torch.equal(cut.ids.gather(1, order), ids)
    torch.testing.assert_close(cut.logprobs.gather(1, order), values, rtol=0, atol=1e-12)
    others = logprobs.scatter(1, ids, -torch.inf).logsumexp(1)
    torch.testing.assert_close(cut.log_tail, others, rtol=0, atol=1e-12)
    assert torch.equal(cut.logprob, whole.logprob)
    assert torch.equal(cut.entropy, whole.entropy)
