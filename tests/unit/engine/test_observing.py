"""What is kept of a teacher after its turn, and what is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from enumeration import Plain, methods_parts

from mergeopd.engine.observing import Observed, kept
from mergeopd.engine.scoring import score
from mergeopd.loss.heads import Head
from mergeopd.report.events import Reporters
from mergeopd.teacher.cache import HiddenCache


@pytest.mark.parametrize(
    ("loss", "width"),
    [
        ({"sampled_reverse_kl": 1.0}, 2),
        ({"reverse_kl": 1.0, "support": {"top_k": 3, "of": "teacher", "rest": "tail"}}, 9),
    ],
)
def test_a_reduced_teacher_leaves_a_few_numbers_and_no_head(
    write_job: Callable[..., Path], loss: dict[str, object], width: int
) -> None:
    parts = methods_parts(write_job, loss=loss)
    rollouts, what = Plain(parts).rollouts, kept(parts.plan.phases[0].loss)
    assert what is not None
    fetched: list[weakref.ref[Head]] = []
    alive: list[int] = []
    original = parts.store.heads

    def spy(names: Iterable[str], vocab: range | None = None) -> dict[str, Head]:
        gc.collect()
        alive.append(sum(ref() is not None for ref in fetched))
        found = original(names, vocab)
        fetched.extend(weakref.ref(head) for head in found.values())
        return found

    parts.store.heads = spy  # type: ignore[method-assign]
    with HiddenCache(1 << 30, Path(parts.plan.output), torch.device("cpu")) as cache:
        score(parts, rollouts, parts.work(rollouts, 0, 1), Observed(cache, what), Reporters())
        gc.collect()
        assert len(fetched) == 2  # one for each teacher
        assert not any(ref() is not None for ref in fetched)
        assert alive == [0, 1, 0, 1]  # and never both
        assert cache.gather("two", [0]).shape == (rollouts[0].num_trained, width)
