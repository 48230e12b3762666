"""Options of the torch student's passes: packing, recomputation and compilation change no numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_cases import MIXED, micro_batches, with_policy, write_dense

from mergeopd.models.causal import response_hidden
from mergeopd.recipe.training import Optimizer
from mergeopd.student.layer_options import PassOptions
from mergeopd.student.torch import TorchStudent
from mergeopd.types import token_flags, token_ids

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "cohere2")


def student_of(folder: Path, options: PassOptions) -> TorchStudent:
    return TorchStudent(
        folder, dtype="float32", num_valid=35, optimizer=Optimizer(), device=CPU, options=options
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_hidden_states_are_those_of_padded_rows(family: str, tmp_path: Path) -> None:
    """Families with full, sliding and mixed attention; sequences longer than the window, and of one token."""
    torch.manual_seed(1)
    folder = write_dense(tmp_path / family, family, tied=family != "llama", sliding_window=4)
    body = student_of(folder, PassOptions()).body
    prompts = [token_ids(np.arange(n) % 35) for n in (1, 7, 3, 12)]
    responses = [token_ids(np.arange(n) + 3) for n in (9, 1, 0, 5)]
    trained = [None, None, None, token_flags([True, False, True, True, False])]
    sequences = prompts, responses, CPU, trained
    expected = response_hidden(body, *sequences)
    actual = response_hidden(body, *sequences, packing=True)
    scale = expected.detach().abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0.0, atol=1e-6)


def gradients(student: TorchStudent, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = with_policy(micro_batches(generator, 3), student, generator)
    stats = student.accumulate_gradients(batches, MIXED)
    return sum(float(s.loss.sum()) for s in stats), student.gradients()


@pytest.mark.parametrize(
    "options",
    [
        PassOptions(packing=True),
        PassOptions(recompute=True),
        PassOptions(compiled=True),
    ],
    ids=["packing", "recompute", "compiled"],
)
def test_losses_and_gradients_are_those_of_plain_passes(
    options: PassOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Graphs and their gradients are traced as with the default backend, which would spend a minute in a compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    folder = write_dense(tmp_path / "qwen3", "qwen3", tied=True, layers=1)
    loss, expected = gradients(student_of(folder, PassOptions()), folder)
    student, calls = student_of(folder, options), []
    attention = student.body.get_submodule("layers.0.self_attn")
    attention.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    actual_loss, actual = gradients(student, folder)
    assert actual_loss == pytest.approx(loss, rel=1e-6)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).abs().max()) <= 1e-6 * largest, name
    if not options.compiled:
        # Scores of three micro-batches without gradient, then passes; recomputed layers run twice.
        assert calls.count(True) == (6 if options.recompute else 3)
