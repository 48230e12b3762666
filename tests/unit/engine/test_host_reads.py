"""Reads of device memory by the host: how many a round has does not depend on its micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from enumeration import ANSWERS, build_parts, engine_round, prompts_of
from host_reads import HostReads

from mergeopd.types import Rollout

PHASES: dict[str, dict[str, Any]] = {
    "whole distributions": {"loss": {"reverse_kl": 1.0, "nll": 0.1}},
    "likeliest tokens": {
        "loss": {"forward_kl": 1.0, "support": {"top_k": 3, "of": "teacher", "rest": "tail"}},
    },
    "policy": {
        "text": "student", "loss": {"sampled_reverse_kl": 1.0}, "correction": "truncate",
        "updates_per_round": 1, "balance": {"tokens": "equal", "follow_gap": 1.0},
    },
}  # fmt: skip


def reads(write_job: Callable[..., Path], phase: dict[str, Any], tokens: int) -> tuple[Counter[str], int]:
    """Host reads of a round, by module, and its micro-batches."""
    parts = build_parts(write_job, f"student.micro_batch_tokens={tokens}", **phase)
    render = parts.inputs.student.render
    rollouts = [
        Rollout(p, i, render(p), answer, "student", "length", (-1.0,) * len(answer))
        for p in prompts_of(parts)
        for i, answer in enumerate(ANSWERS)
    ]
    student, num = parts.student, 0
    accumulate = student.accumulate_gradients

    def counted(micro_batches: Any, *rest: Any) -> Any:
        nonlocal num
        num += len(micro_batches)
        return accumulate(micro_batches, *rest)

    student.accumulate_gradients = counted  # type: ignore[method-assign]
    with HostReads() as counted_reads:
        engine_round(parts, rollouts)
    return counted_reads.by_module, num


@pytest.mark.parametrize("name", PHASES)
def test_reads_do_not_grow_with_micro_batches(write_job: Callable[..., Path], name: str) -> None:
    """Apart from those of the kernel, and of transformers, which looks for packed sequences in each pass."""
    few, num_few = reads(write_job, PHASES[name], 100_000)
    many, num_many = reads(write_job, PHASES[name], 30)
    assert num_many >= 4 * num_few
    assert few["engine.update_stats"] == few["student.torch"] == 1
    assert few["loss.fused"] <= 2 * num_few
    per_pass = {module for module in many if module.startswith("loss.")} | {"models.causal"}
    of_few, of_many = (Counter({m: n for m, n in own.items() if m not in per_pass}) for own in (few, many))
    assert of_few == of_many
