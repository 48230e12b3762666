"""Where the tensors of a micro-batch are made: all on the student's device, whatever is kept on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergeopd.align.responses import Alignment
from mergeopd.batch.collate import micro_batch
from mergeopd.batch.packing import MicroBatchPlan
from mergeopd.batch.records import PreparedRollout, PreparedUpdate
from mergeopd.loss.cross_tokenizer import Uld
from mergeopd.loss.heads import Head, Hidden
from mergeopd.teacher.token_view import AlignedTokens
from mergeopd.types import Message, Origin, Prompt, Rollout

META = torch.empty((), device="meta")


def prepared(origin: Origin, response: tuple[int, ...], teachers: Mapping[str, float]) -> PreparedRollout:
    prompt = Prompt("k", "s", "d", (Message("user", "x"),), teachers)
    own = origin == "student"
    mu = (-1.0,) * len(response) if own else None
    rollout = Rollout(prompt, 0, (1, 2), response, origin, "eos", mu)
    plain = PreparedRollout(rollout, 0.5, teachers, {})
    if not own:
        return plain
    # As the pass over the prior policy leaves them: float64 beside a float32 student, on the CPU.
    kept = torch.arange(len(response), dtype=torch.float64)
    return replace(plain, logprob_old=kept, teacher_advantage=kept, span_advantage=kept)


def tensors_of(record: object) -> dict[str, Tensor]:
    values = {f.name: getattr(record, f.name) for f in fields(record)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def test_prior_policy_beside_text_of_others() -> None:
    """The prior policy's rows come from the CPU, zeros for other text from the device."""
    members = {0: prepared("student", (3, 4, 5), {}), 1: prepared("dataset", (6, 7), {})}
    micro = micro_batch(
        MicroBatchPlan((), (0, 1)), PreparedUpdate(members, {}), {}, {}, META, with_policy=True
    )
    assert micro.policy is not None
    rows = tensors_of(micro.policy)
    assert len(rows) == 7
    assert {(t.device.type, t.dtype, t.shape) for t in rows.values()} == {("meta", torch.float32, (5,))}
    on_cpu = micro_batch(
        MicroBatchPlan((), (0, 1)), PreparedUpdate(members, {}), {}, {}, torch.empty(()), with_policy=True
    )
    assert on_cpu.policy is not None
    assert on_cpu.policy.old_N is not None
    assert on_cpu.policy.old_N.tolist() == [0.0, 1.0, 2.0, 0.0, 0.0]


def test_teachers_with_other_tokens() -> None:
    one = np.arange(2)
    alignment = Alignment(np.array([8, 9, 8]), one, one + 1, one, one + 1, {}, False)
    members = {
        i: replace(prepared("student", (3, 4, 5), {"t": 1.0}), alignments={"t": alignment}) for i in (0, 1)
    }
    hidden = Hidden(torch.empty(6, 4, device="meta"), Head(torch.empty(7, 4, device="meta")))
    crossing: Any = SimpleNamespace(teacher="t")
    view = AlignedTokens(crossing, student=crossing, bridge=Uld())
    micro = micro_batch(
        MicroBatchPlan(("t",), (0, 1)),
        PreparedUpdate(members, {}),
        {"t": hidden},
        {"t": view},
        META,
        with_policy=True,
    )
    [bridged] = micro.bridged
    found = [*tensors_of(bridged).values(), *tensors_of(bridged.groups).values()]
    assert {t.device.type for t in (*found, micro.nll_weight_N, micro.teacher_weight_KN)} == {"meta"}
