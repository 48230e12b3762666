"""Targets that are kept of a teacher after its pass."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from enumeration import Plain, methods_parts, trainer_of

from mergeopd.engine.score import CollectedRound
from mergeopd.loss.heads import Head
from mergeopd.teacher.local import TeacherStore


@pytest.mark.parametrize(
    ("loss", "width"),
    [
        ({"sampled_reverse_kl": 1.0}, 2),
        ({"reverse_kl": 1.0, "support": {"top_k": 3, "of": "teacher", "rest": "tail"}}, 9),
    ],
)
def test_a_reduced_teacher_leaves_a_few_numbers_and_no_head(
    write_job: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    loss: dict[str, object],
    width: int,
) -> None:
    parts = methods_parts(write_job, loss=loss)
    rollouts, trainer = Plain(parts).rollouts, trainer_of(parts)
    fetched: list[weakref.ref[Head]] = []
    alive: list[int] = []
    original = TeacherStore.head

    def spy(store: TeacherStore, name: str, vocab: range | None = None) -> Head:
        gc.collect()
        alive.append(sum(ref() is not None for ref in fetched))
        found = original(store, name, vocab)
        fetched.append(weakref.ref(found))
        return found

    monkeypatch.setattr(TeacherStore, "head", spy)
    work = trainer.pipeline.work(rollouts, 0, 1)
    collected = CollectedRound(parts.plan.phases[0], 0, rollouts, [None] * len(rollouts), work)
    with trainer.scorer.score(collected) as scored:
        gc.collect()
        assert len(fetched) == 2  # one for each teacher
        assert not any(ref() is not None for ref in fetched)
        assert alive == [0, 0]  # and never both
        assert scored.targets.cache.gather("two", [0]).shape == (rollouts[0].num_trained, width)
