"""Sampling: exact distributions, keyed randomness."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergeopd.errors import NumericsError
from mergeopd.rollout import sampling
from mergeopd.rollout.keyed import stream_key, uniforms
from mergeopd.rollout.sampling import sample


def grid(n: int) -> torch.Tensor:
    """Midpoints of n equal cells of [0, 1): integrates a distribution without any randomness."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_frequencies_equal_their_probabilities(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    expected = torch.softmax(logits.double() / temperature, -1)
    n = 100_000
    token, logprob = sample(logits.expand(n, -1), grid(n), temperature, 1.0)
    shares = torch.bincount(token, minlength=5) / n
    assert torch.allclose(shares.double(), expected, atol=2 / n)
    assert torch.allclose(logprob.double(), expected[token].log(), atol=1e-6)


@pytest.mark.parametrize("vocab", [255, 256, 257, 1500])
def test_a_large_vocabulary_is_drawn_from_like_a_float64_sum_over_all_of_it(vocab: int) -> None:
    logits = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    logits[vocab // 2] = 12.0
    expected = torch.softmax(logits.double(), -1)
    n = 4_000
    token, logprob = sample(logits.expand(n, -1), grid(n), 1.0, 1.0)
    assert (token == torch.searchsorted(expected.cumsum(0), grid(n), right=True)).double().mean() > 0.999
    shares = torch.bincount(token, minlength=vocab) / n
    assert torch.allclose(shares.double(), expected, atol=1.5 / n)
    assert torch.allclose(logprob.double(), expected[token].log(), atol=1e-5)


@pytest.mark.parametrize(("top_p", "spread"), [(0.5, 8.0), (0.9, 2.0), (0.999, 0.1)])
def test_the_nucleus_of_a_large_vocabulary_equals_that_of_a_full_sort(top_p: float, spread: float) -> None:
    logits = spread * torch.randn(3, 3000, generator=torch.Generator().manual_seed(1)).double()
    logits[1] *= 10  # rows of one batch whose nuclei differ in size by orders of magnitude
    p = torch.softmax(logits, -1)
    for row in p:
        order = row.argsort(descending=True)
        row[order[int((row[order].cumsum(0) < top_p).sum()) + 1 :]] = 0.0
    p /= p.sum(-1, keepdim=True)
    n = 200
    token, logprob = sample(logits.repeat_interleave(n, 0), grid(n).repeat(3), 1.0, top_p)
    expected = torch.searchsorted(p.cumsum(1), grid(n).expand(3, n).contiguous(), right=True)
    assert torch.equal(token.view(3, n), expected)
    assert torch.allclose(logprob.view(3, n), p.gather(1, expected).log(), atol=1e-9)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_distribution_are_refused(bad: float, top_p: float) -> None:
    logits = torch.zeros(2, 400)
    logits[1, 300] = bad
    with pytest.raises(NumericsError, match="NaN or infinite"):
        sample(logits, torch.full((2,), 0.3), 1.0, top_p)
    with pytest.raises(NumericsError, match="NaN or infinite"):
        sample(logits, torch.full((2,), 0.3), 0.0, top_p)


def test_only_a_cpu_draws_in_blocks_of_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampling._block_rows(256, 152_064, torch.device("cpu")) == 3
    assert sampling._block_rows(256, 152_064, torch.device("cuda")) == 256
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(2))
    whole = sample(logits, grid(7), 0.8, 0.9)
    monkeypatch.setattr(sampling, "_BLOCK_ELEMENTS", 600)
    for one, other in zip(whole, sample(logits, grid(7), 0.8, 0.9), strict=True):
        assert torch.equal(one, other)


def test_nucleus_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.3, 0.2])
    n = 10_000
    token, logprob = sample(probabilities.log().expand(n, -1), grid(n), 1.0, 0.65)
    assert set(token.tolist()) == {1, 2}
    shares = torch.bincount(token, minlength=4) / n
    assert torch.allclose(shares, torch.tensor([0.0, 4 / 7, 3 / 7, 0.0]), atol=2e-4)
    # The recorded log-probability is that of the distribution drawn from, not of the whole vocabulary.
    assert torch.allclose(logprob.exp(), shares[token], atol=2e-4)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    edges = torch.tensor([0.0, 0.5, 1.0 - 2.0**-48], dtype=torch.float64)
    token, _ = sample(logits.expand(3, -1), edges, 1.0, 1.0)
    assert token.tolist() == [1, 3, 3]


def test_greedy_takes_the_largest() -> None:
    token, logprob = sample(torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]), torch.zeros(2), 0.0, 1.0)
    assert token.tolist() == [1, 0]
    assert logprob.tolist() == [0.0, 0.0]


def test_uniforms_are_uniform_uncorrelated_and_below_one() -> None:
    keys = [stream_key(7, f"prompt:{i}", s) for i in range(200) for s in range(2)]
    u = uniforms(keys, 250)
    assert u.min() >= 0.0
    assert u.max() < 1.0
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi2 = ((counts - u.size / 100) ** 2 / (u.size / 100)).sum()
    assert chi2 < 160  # 99 degrees of freedom: about 4 standard deviations
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(u[0::2].ravel(), u[1::2].ravel())[0, 1]) < 0.015


def test_a_number_depends_on_its_key_and_position_only() -> None:
    a, b = stream_key(7, "p:0", 0), stream_key(7, "p:0", 1)
    assert a != b
    assert stream_key(8, "p:0", 0) != a
    together, alone = uniforms([a, b], 10), uniforms([b], 4)
    assert (together[1, :4] == alone[0]).all()
