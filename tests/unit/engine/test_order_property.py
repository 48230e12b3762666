"""For any round, the gradient depends neither on the order of teachers nor on the packing."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeopd.batch.collate import PreparedRollout, PreparedUpdate, micro_batch
from mergeopd.batch.packing import pack
from mergeopd.batch.weights import ResponseSize, response_weights
from mergeopd.engine.schedule import by_teacher, split_updates
from mergeopd.loss.divergence import JSD, ForwardKL, ReverseKL
from mergeopd.loss.fused import fused_loss
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.objective import build_objective
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.token_view import SameTokens
from mergeopd.types import Message, Prompt, Rollout

NOBODY: Any = None  # targets are taken as they are
VOCAB, D = 6, 3
OBJECTIVE = build_objective({"a": (ReverseKL(), 1.0), "b": (ForwardKL(), 0.5), "c": (JSD(0.2), 0.7)})


@st.composite
def rounds(draw: st.DrawFn) -> list[Rollout]:
    rollouts = []
    for i in range(draw(st.integers(1, 10))):
        names = draw(st.sets(st.sampled_from("abc"), min_size=1))
        weights = {name: draw(st.sampled_from((0.2, 1.0, 3.0))) for name in sorted(names)}
        prompt = Prompt(f"p:{i}", "p", draw(st.sampled_from("xy")), (Message("user", "?"),), weights)
        response = tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=4)))
        rollouts.append(Rollout(prompt, 0, (0,) * draw(st.integers(1, 5)), response, "student", "eos"))
    return rollouts


def renamed(rollouts: Sequence[Rollout], names: Mapping[str, str]) -> list[Rollout]:
    """The same round with other names for its teachers: their order is that of their names."""
    from dataclasses import replace

    return [
        replace(r, prompt=replace(r.prompt, teachers={names[n]: w for n, w in r.prompt.teachers.items()}))
        for r in rollouts
    ]


def gradient(
    rollouts: Sequence[Rollout], names: Mapping[str, str], max_tokens: int, index: int
) -> list[Tensor]:
    """Gradients with respect to a head and to every rollout's hidden states, a student without a body."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = {names[n]: Head(noise(VOCAB, D)) for n in "abc"}
    states = [noise(len(r.response_ids), D) for r in rollouts for _ in "abc"]
    hidden = [noise(len(r.response_ids), D).requires_grad_() for r in rollouts]
    weight = noise(VOCAB, D).requires_grad_()
    rollouts = renamed(rollouts, names)
    with (
        tempfile.TemporaryDirectory() as folder,
        HiddenCache(200, Path(folder), torch.device("cpu")) as cache,
    ):
        for turn in by_teacher(rollouts, sorted(names.values()), index):
            letter = next(n for n in "abc" if names[n] == turn.teacher)
            for i in turn.rollouts:
                cache.put(turn.teacher, i, states[3 * i + "abc".index(letter)])
        for update in split_updates(rollouts, 2):
            answers = [ResponseSize(rollouts[i].prompt.domain, len(rollouts[i].response_ids)) for i in update]
            weights, budgets = response_weights(answers, "token", "equal")
            prepared = PreparedUpdate(
                {
                    i: PreparedRollout(rollouts[i], w, rollouts[i].prompt.teachers, {})
                    for i, w in zip(update, weights, strict=True)
                },
                budgets,
            )
            for one in pack(rollouts, update, max_tokens, index):
                targets = {n: Hidden(cache.gather(n, one.rollouts), heads[n]) for n in one.teachers}
                like = torch.empty((), dtype=torch.float64)
                views = dict.fromkeys(one.teachers, SameTokens(NOBODY, NOBODY))
                micro = micro_batch(one, prepared, targets, views, like, with_policy=False)
                loss, _ = fused_loss(
                    torch.cat([hidden[i] for i in one.rollouts]),
                    Head(weight),
                    micro.targets,
                    torch.tensor([t for r in micro.responses for t in r.tolist()]),
                    OBJECTIVE.per_token(micro.teacher_weight_KN, micro.nll_weight_N),
                    divergences=OBJECTIVE.divergences,
                )
                loss.backward()
    return [torch.zeros(()) if t.grad is None else t.grad for t in (weight, *hidden)]


@settings(max_examples=40, deadline=None)
@given(rounds(), st.permutations("pqr"), st.integers(1, 40), st.integers(0, 1))
def test_neither_teachers_nor_packing_change_the_gradient(
    rollouts: list[Rollout], order: list[str], max_tokens: int, index: int
) -> None:
    expected = gradient(rollouts, dict(zip("abc", "pqr", strict=True)), 1000, 0)
    found = gradient(rollouts, dict(zip("abc", order, strict=True)), max_tokens, index)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)
