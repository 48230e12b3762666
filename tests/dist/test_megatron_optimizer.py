"""Choice of the AdamW implementation on a grid, tested in this process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ranks import needs_megatron

from mergeopd.recipe.training import Optimizer


@pytest.mark.long  # as Megatron is imported here, for seconds
@needs_megatron
def test_the_optimizer_is_torchs_also_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints contain its state; Transformer Engine's AdamW, the library's choice, has another one."""
    from megatron.core import optimizer as library

    from mergeopd.student.megatron import optimizer

    chosen = []

    def get(*_: object, **__: object) -> SimpleNamespace:
        chosen.append(library.USING_PYTORCH_OPTIMIZER)
        return SimpleNamespace(param_groups=[])

    monkeypatch.setattr(library, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(optimizer, "get_megatron_optimizer", get)
    grid = SimpleNamespace(data=1, groups=None)
    ddp = SimpleNamespace(ddp_config=SimpleNamespace(use_distributed_optimizer=False))
    optimizer.build_adamw(ddp, Optimizer(lr=1e-3), torch.bfloat16, grid)  # type: ignore[arg-type]
    assert chosen == [True]
