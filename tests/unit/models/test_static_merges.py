"""Static merges: their definitions on small tensors, mergekit's own code where it is installed, whole models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergeopd.models.static_merges import (
    dare,
    slerp,
    static_merge,
    task_arithmetic,
    ties,
    weight_average,
    why_not,
)

CPU = torch.device("cpu")
BASE = torch.tensor([1.0, 1.0, 1.0, 1.0])
EXPERTS = [torch.tensor([1.0, 3.0, 0.5, 1.1]), torch.tensor([2.0, 0.0, 0.8, 1.2])]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_task_arithmetic_adds_scaled_task_vectors() -> None:
    merged = task_arithmetic(0.5)("w", BASE, EXPERTS)
    torch.testing.assert_close(merged, torch.tensor([1.5, 1.5, 0.65, 1.15]))


def test_ties_trims_elects_a_sign_and_takes_the_mean_of_those_that_agree() -> None:
    # Task vectors (0, 2, -0.5, 0.1) and (1, -1, -0.2, 0.2); the larger half of each: (0, 2, -0.5, 0), (1, -1, 0, 0).
    # Signs of the sums: +, +, -; only the first expert agrees in the second entry.
    merged = ties(0.5, 2.0)("w", BASE, EXPERTS)
    torch.testing.assert_close(merged, torch.tensor([3.0, 5.0, 0.0, 1.0]))


def test_ties_keeps_at_least_one_entry() -> None:
    merged = ties(0.01, 1.0)("w", BASE, EXPERTS[:1])
    torch.testing.assert_close(merged, torch.tensor([1.0, 3.0, 1.0, 1.0]))


def test_dare_keeps_the_mean_of_task_arithmetic() -> None:
    base = torch.zeros(100_000)
    experts = [torch.full_like(base, 1.0), torch.full_like(base, 3.0)]
    merged = dare(0.25, 0.5, seed=1)("w", base, experts)
    # Each entry is 0.5 (4 m1 + 12 m2) with masks of mean 1/4: the mean is 2, the variance 4 v + 36 v, v = 3/16.
    assert merged.mean().item() == pytest.approx(2.0, abs=5 * math.sqrt(40 * 3 / 16 / len(base)))
    assert sorted(set(merged.tolist())) == [0.0, 2.0, 6.0, 8.0]
    assert torch.equal(merged, dare(0.25, 0.5, seed=1)("w", base, experts))
    assert not torch.equal(merged, dare(0.25, 0.5, seed=1)("other", base, experts))
    assert not torch.equal(merged, dare(0.25, 0.5, seed=2)("w", base, experts))


def test_slerp_of_two_stays_on_the_sphere_and_of_three_adds_the_third() -> None:
    a, b, c = torch.eye(3)
    half = slerp()("w", a, [a, b])
    torch.testing.assert_close(half, torch.tensor([1.0, 1.0, 0.0]) / math.sqrt(2))
    torch.testing.assert_close(
        slerp()("w", a, [a, b, c]), math.sin(math.pi / 3) * half + math.sin(math.pi / 6) * c
    )


def test_slerp_of_collinear_tensors_is_linear() -> None:
    torch.testing.assert_close(slerp()("w", BASE, [BASE, 3.0 * BASE]), 2.0 * BASE)


METHODS = {
    "linear": (weight_average(), {"weight": 0.5}),
    "task_arithmetic": (task_arithmetic(0.4), {"weight": 0.4}),
    "ties": (ties(0.2, 0.7), {"weight": 1.0, "density": 0.2, "lambda": 0.7}),
    "slerp": (slerp(), {"t": 0.5}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_equals_that_of_mergekit(
    method: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    merge, parameters = METHODS[method]
    base = make_model("base", vocab=33, model_type="qwen3")
    experts = [make_model(f"expert{seed}", seed=seed, vocab=33, model_type="qwen3") for seed in (1, 2)]
    # SLERP takes the first of two experts as its base; the others take the model that both were tuned from.
    start = experts[0] if method == "slerp" else base
    document = {
        "merge_method": method,
        "models": [{"model": str(expert), "parameters": parameters} for expert in experts],
        **({} if method == "linear" else {"base_model": str(start)}),
        **({"parameters": parameters} if method in ("slerp", "ties") else {}),
        "dtype": "float32",
    }
    run_merge(MergeConfiguration.model_validate(document), str(tmp_path), MergeOptions(copy_tokenizer=False))
    expected = weights(tmp_path)
    found = dict(static_merge(base, experts, 33, CPU, merge).named_parameters())
    for name in expected:
        torch.testing.assert_close(found[name].detach(), expected[name], atol=1e-6, rtol=0)


def test_padding_rows_are_the_base_s(make_model: Callable[..., Path]) -> None:
    base, one, two = (
        make_model("base", vocab=36),
        make_model("one", seed=1, vocab=40),
        make_model("two", seed=2),
    )
    assert why_not(base, [one, two]) is None
    found = dict(static_merge(base, [one, two], 33, CPU, weight_average()).named_parameters())
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
