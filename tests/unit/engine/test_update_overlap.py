"""Overlap and entropy gap of an update: the means of chosen tokens, whatever its micro-batches are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from loss_reference import entropy, overlap

from mergeopd.batch.collate import micro_batch, overlap_share
from mergeopd.batch.packing import MicroBatchPlan
from mergeopd.batch.records import PreparedRollout, PreparedUpdate
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.update_stats import UpdateStats
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.divergence import ReverseKL
from mergeopd.loss.heads import Head, Hidden
from mergeopd.loss.objective import build_objective
from mergeopd.loss.observe import observe
from mergeopd.loss.targets import Target
from mergeopd.reporting.events import TeacherStats
from mergeopd.student.loss import Measured, micro_loss
from mergeopd.teacher.token_view import SameTokens
from mergeopd.types import Message, Prompt, Rollout

VOCAB, SHARE = 40, 0.3
LENGTHS = (5, 9, 1, 17, 12, 30)
OBJECTIVE = build_objective({"reverse_kl": (ReverseKL(), 1.0)})
NOBODY: Any = None
LIKE = torch.empty((), dtype=torch.float64)


class Problem:
    """An update of responses to one teacher; logits are hidden states, through heads that are identities."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(9)
        sizes = [(num, VOCAB) for num in LENGTHS]
        self.student = [2 * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        self.teacher = [2 * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        self.head = Head(torch.eye(VOCAB, dtype=torch.float64))
        prompt = Prompt("p:0", "p", "d", (Message("user", "?"),), {"t": 1.0})
        ids = [torch.randint(VOCAB, (num,), generator=generator).tolist() for num in LENGTHS]
        members = {
            i: PreparedRollout(Rollout(prompt, 0, (0,), own, "student", "eos"), 0.1, {"t": 1.0}, {})
            for i, own in enumerate(ids)
        }
        self.prepared = PreparedUpdate(members, {}, SHARE)

    def run(
        self, packs: Sequence[tuple[int, ...]], top_k: int | None = None
    ) -> tuple[TeacherStats, set[tuple[int, int]]]:
        """Return the teacher's figures, and which token (response, position) was measured."""
        stats, chosen = UpdateStats(OBJECTIVE), set()
        view = SameTokens(NOBODY, NOBODY)
        for pack in packs:
            hidden_T = torch.cat([self.teacher[i] for i in pack])
            labels = torch.tensor(
                np.concatenate([self.prepared.rollouts[i].rollout.response_ids for i in pack])
            )
            target: Target = Hidden(hidden_T, self.head)
            if top_k is not None:
                target = observe(hidden_T, self.head, labels.long(), top_k=top_k or None)
            plan = MicroBatchPlan(("t",), pack)
            micro = micro_batch(plan, self.prepared, {"t": target}, {"t": view}, LIKE, with_policy=False)
            assert micro.overlap_rows is not None
            places = [(i, t) for i in pack for t in range(LENGTHS[i])]
            chosen |= {places[row] for row in micro.overlap_rows.tolist()}
            what = Measured.of(OBJECTIVE) if top_k is None else Measured((), None, 1.0)
            hidden = torch.cat([self.student[i] for i in pack])
            loss = OBJECTIVE.per_token(micro.teacher_weight_KN, micro.nll_weight_N)
            if top_k is not None:
                loss = build_objective({}).per_token(micro.teacher_weight_KN, micro.nll_weight_N)
                stats.objective = build_objective({})
            _, seen = micro_loss(hidden, self.head, micro, loss, what, Workspace(), "auto")
            stats.add(micro, self.prepared, seen)
        stats.together(SingleProcess())
        views: Any = {"t": view}
        return stats.teachers(views)["t"], chosen


def test_means_over_the_chosen_tokens_of_any_packing() -> None:
    problem = Problem()
    [whole, tokens], [parts, same] = problem.run([(0, 1, 2, 3, 4, 5)]), problem.run([(5, 0), (3,), (1, 2, 4)])
    assert tokens == same
    assert len(tokens) == pytest.approx(SHARE * sum(LENGTHS), abs=2)
    rows = [overlap(problem.student[i][t], problem.teacher[i][t], 16) for i, t in tokens]
    for found in (whole, parts):
        figures = (found.overlap, found.overlap_advantage, found.shared_mass_S, found.shared_mass_T)
        assert figures == pytest.approx(np.nanmean(rows, axis=0))
        gap = [
            entropy(torch.log_softmax(z_T, 1)) - entropy(torch.log_softmax(z_S, 1))
            for z_S, z_T in zip(problem.student, problem.teacher, strict=True)
        ]
        assert found.entropy_gap == pytest.approx(torch.cat(gap).abs().mean().item())


def test_what_a_target_does_not_contain_is_absent() -> None:
    """A teacher's 16 likeliest tokens are enough, 15 are not; the entropy is known in all of them."""
    problem, packs = Problem(), [(0, 1, 2), (3, 4, 5)]
    exact, _ = problem.run(packs)
    known, _ = problem.run(packs, top_k=16)
    assert known.overlap == pytest.approx(exact.overlap)
    assert known.overlap_advantage == pytest.approx(exact.overlap_advantage)
    for top_k in (15, 0):
        found, _ = problem.run(packs, top_k=top_k)
        assert (found.overlap, found.overlap_advantage, found.shared_mass_S, found.shared_mass_T) == (
            None,
        ) * 4
        assert found.entropy_gap == pytest.approx(exact.entropy_gap)


def test_large_updates_measure_a_small_share() -> None:
    assert [overlap_share(n) for n in (0, 100, 16384, 1 << 20)] == [1 / 8, 1 / 8, 1 / 8, 2048 / (1 << 20)]
