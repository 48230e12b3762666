"""Whose AdamW trains on a grid, decided in this process: nothing here needs a second one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core", reason="the extra mergeopd[megatron] is not installed")

from types import SimpleNamespace

from megatron.core import optimizer as library

from mergeopd.recipe.training import Optimizer
from mergeopd.student.megatron import optimizer


def test_it_is_torchs_where_another_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are made of its state; transformer engine's, which the library prefers, has another."""
    chosen = []

    def get(*_: object, **__: object) -> SimpleNamespace:
        chosen.append(library.USING_PYTORCH_OPTIMIZER)
        return SimpleNamespace(param_groups=[])

    monkeypatch.setattr(library, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(optimizer, "get_megatron_optimizer", get)
    grid = SimpleNamespace(data=1, groups=None)
    optimizer.build_adamw(None, Optimizer(lr=1e-3), torch.bfloat16, grid)  # type: ignore[arg-type]
    assert chosen == [True]
