"""Properties of the schedule of any round."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopd.batch.packing import length_batches, pack
from mergeopd.engine.schedule import by_teacher, learning_rate, split_updates
from mergeopd.recipe.training import Optimizer
from mergeopd.types import Message, Prompt, Rollout

TEACHERS = ("code", "math", "search", "tools")


@st.composite
def rounds(draw: st.DrawFn) -> list[Rollout]:
    rollouts = []
    for i in range(draw(st.integers(1, 40))):
        names = draw(st.sets(st.sampled_from(TEACHERS), min_size=1, max_size=3))
        domain = draw(st.sampled_from(("a", "b", "c")))
        prompt = Prompt(f"p:{i}", "p", domain, (Message("user", "?"),), dict.fromkeys(names, 1.0))
        length = draw(st.integers(0, 9))
        ids = tuple(range(draw(st.integers(1, 9))))
        rollouts.append(Rollout(prompt, 0, ids, tuple(range(length)), "student", "eos"))
    return rollouts


@given(rounds(), st.integers(0, 5))
def test_every_rollout_is_scored_by_exactly_its_teachers_and_loads_are_minimal(
    rollouts: list[Rollout], index: int
) -> None:
    turns = by_teacher(rollouts, TEACHERS, index)
    scored = Counter((turn.teacher, i) for turn in turns for i in turn.rollouts)
    assert scored == Counter((t, i) for i, r in enumerate(rollouts) for t in r.prompt.teachers)
    needed = {t for r in rollouts for t in r.prompt.teachers}
    assert sorted(turn.teacher for turn in turns) == sorted(needed)


@given(rounds(), st.integers(0, 5))
def test_turns_are_serpentine(rollouts: list[Rollout], index: int) -> None:
    this = [turn.teacher for turn in by_teacher(rollouts, TEACHERS, index)]
    following = [turn.teacher for turn in by_teacher(rollouts, TEACHERS, index + 1)]
    assert this == following[::-1]
    assert this == sorted(this, reverse=index % 2 == 1)


def test_a_teacher_outside_the_order_is_an_error() -> None:
    prompt = Prompt("p:0", "p", "a", (Message("user", "?"),), {"unknown": 1.0})
    with pytest.raises(KeyError, match="unknown"):
        by_teacher([Rollout(prompt, 0, (1,), (2,), "student", "eos")], TEACHERS, 0)


@given(rounds(), st.integers(1, 5))
def test_updates_partition_the_round_and_are_stratified(rollouts: list[Rollout], num_updates: int) -> None:
    updates = split_updates(rollouts, num_updates)
    assert sorted(i for update in updates for i in update) == list(range(len(rollouts)))
    sizes = [len(update) for update in updates]
    assert max(sizes) - min(sizes) <= 1
    for domain in ("a", "b", "c"):
        counts = [sum(rollouts[i].prompt.domain == domain for i in update) for update in updates]
        assert max(counts) - min(counts) <= 1


@given(rounds(), st.integers(1, 60), st.integers(0, 3))
def test_packs_have_every_response_once_and_one_teacher_set_each(
    rollouts: list[Rollout], max_tokens: int, index: int
) -> None:
    update = range(0, len(rollouts), 2)
    packs = pack(rollouts, update, max_tokens, index)
    assert sorted(i for p in packs for i in p.rollouts) == [
        i for i in update if len(rollouts[i].response_ids)
    ]
    sets = [p.teachers for p in packs]
    # Equal sets stand together: each set's heads are fetched once.
    assert len([s for s, before in zip(sets, [None, *sets], strict=False) if s != before]) == len(set(sets))
    for p in packs:
        assert all(rollouts[i].teacher_set == p.teachers for i in p.rollouts)
        longest = max(rollouts[i].num_tokens for i in p.rollouts)
        assert len(p.rollouts) == 1 or longest * len(p.rollouts) <= max_tokens


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_length_batches(lengths: list[int], max_tokens: int) -> None:
    batches = length_batches(lengths, max_tokens)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for b in batches:
        assert len(b) == 1 or max(lengths[i] for i in b) * len(b) <= max_tokens


def test_learning_rate_by_hand() -> None:
    def lr(update: int, shape: str, warmup: int = 4) -> float:
        optimizer = Optimizer(lr=2.0, warmup_updates=warmup, schedule=shape, final_lr_fraction=0.1)
        return learning_rate(update, optimizer, 12)

    assert [lr(u, "constant") for u in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert lr(4, "linear") == pytest.approx(2.0)
    assert lr(8, "linear") == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert lr(11, "linear") == pytest.approx(2.0 * (0.1 + 0.9 * 0.125))
    assert lr(4, "cosine") == pytest.approx(2.0)
    assert lr(8, "cosine") == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert lr(6, "cosine") == pytest.approx(2.0 * (0.1 + 0.9 * 0.8535533905932737))
    assert lr(12, "cosine") == pytest.approx(0.2)
    assert lr(0, "constant", warmup=0) == 2.0
    assert learning_rate(5, Optimizer(lr=0.0, warmup_updates=2, schedule="linear"), 9) == 0.0
