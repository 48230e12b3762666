"""Next-token logits against a float64 product."""

from __future__ import annotations

import pytest
import torch

from mergeopd.loss.heads import Head
from mergeopd.rollout.head import DecodingHead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_valid", [None, 1000])
def test_logits_equal_a_float64_product_for_any_number_of_rows(
    dtype: torch.dtype, num_valid: int | None
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(1031, 48, dtype=dtype), torch.randn(1031, dtype=dtype)
    prepared = DecodingHead(Head(weight, bias, scale=0.25, softcap=3.0, num_valid=num_valid))
    for rows in (16, 1, 300, 7):  # a batch shrinks as sequences end
        hidden = torch.randn(rows, 48, dtype=dtype)
        raw = 0.25 * (hidden.double() @ weight.double().t() + bias.double())
        expected = (3.0 * torch.tanh(raw / 3.0))[:, :num_valid]
        logits = prepared.logits(hidden)
        assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(logits.double(), expected, atol=1e-5 if dtype != torch.float64 else 1e-12)


def test_later_changes_of_the_weights_have_no_effect() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(400, 32), torch.randn(3, 32)
    DecodingHead(Head(weight))
    weight += 1.0
    assert torch.allclose(DecodingHead(Head(weight)).logits(hidden), hidden @ weight.t(), atol=1e-4)
