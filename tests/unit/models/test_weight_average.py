"""The weight-average baseline: the mean of the experts, in the base's shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from mergeopd.models.weight_average import average, why_not

CPU = torch.device("cpu")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_mean_of_experts_with_different_padding(make_model: Callable[..., Path]) -> None:
    base, one, two = (
        make_model("base", vocab=36),
        make_model("one", seed=1, vocab=40),
        make_model("two", seed=2),
    )
    assert why_not(base, [one, two]) is None
    found = dict(average(base, [one, two], 33, CPU).named_parameters())
    a, b, before = weights(one), weights(two), weights(base)
    for name, tensor in before.items():
        rows = 33 if "embed_tokens" in name else len(tensor)
        assert torch.allclose(found[name][:rows], (a[name][:rows] + b[name][:rows]) / 2, atol=1e-7), name
        assert torch.equal(found[name][rows:], tensor[rows:])


def test_models_of_other_shapes_are_refused(make_model: Callable[..., Path]) -> None:
    base = make_model("base")
    assert "different tensors" in str(why_not(base, [make_model("deep", layers=3)]))
    assert "has shape" in str(why_not(base, [make_model("wide", hidden=48)]))
    assert "different tensors" in str(why_not(base, [make_model("untied", tied=False)]))
