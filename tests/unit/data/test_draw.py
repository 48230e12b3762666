"""The stream of prompts: shares in every prefix, epochs, exact restarts."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeopd.data.draw import PhasedDraw, PhaseShares, PromptDraw
from mergeopd.errors import DataError
from mergeopd.types import Message, Prompt


def make(sizes: dict[str, int]) -> dict[str, list[Prompt]]:
    return {
        name: [Prompt(f"{name}:{row}", name, "d", (Message("user", "x"),)) for row in range(size)]
        for name, size in sizes.items()
    }


def stream(draw: PromptDraw, start: int, count: int) -> list[tuple[int, str]]:
    return [(epoch, prompt.key) for epoch, prompt in draw.draw(start, count)]


RECORDED = [
    (0, "a:0"),
    (0, "b:0"),
    (0, "a:2"),
    (0, "a:1"),
    (0, "b:1"),
    (1, "a:2"),
    (1, "a:1"),
    (1, "b:1"),
    (1, "a:0"),
]
SHARES = st.lists(
    st.one_of(st.integers(1, 9).map(float), st.sampled_from([0.1, 0.25, 0.3, 1 / 3, 1e-3, 7.77, 1e6])),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(SHARES)
def test_every_prefix_is_within_one_of_its_share(shares: list[float]) -> None:
    named = {f"s{i}": share for i, share in enumerate(shares)}
    draw = PromptDraw(make(dict.fromkeys(named, 3)), named, seed=1)
    exact = {name: Fraction(repr(share)) for name, share in named.items()}
    total = sum(exact.values())
    bound = 1 - Fraction(1, 2 * len(named) - 2) if len(named) > 1 else Fraction(0)
    counts: Counter[str] = Counter()
    for position, (_, prompt) in enumerate(draw.draw(0, 400), start=1):
        counts[prompt.source] += 1
        assert all(abs(counts[name] - position * exact[name] / total) <= bound for name in named)


@given(st.integers(1, 12), st.integers(0, 2**62), st.integers(1, 4))
def test_an_epoch_holds_every_prompt_once(size: int, seed: int, epochs: int) -> None:
    sources = make({"a": size, "b": 5})
    drawn = [
        (e, p)
        for e, p in PromptDraw(sources, {"a": 1, "b": 2}, seed).draw(0, 3 * size * epochs)
        if p.source == "a"
    ]
    for epoch in range(epochs):
        part = drawn[epoch * size : (epoch + 1) * size]
        assert {e for e, _ in part} == {epoch}
        assert sorted(p.key for _, p in part) == sorted(p.key for p in sources["a"])


@settings(deadline=None)
@given(st.integers(0, 300), st.lists(st.integers(0, 40), max_size=6), SHARES, st.integers(0, 99))
def test_restarts_and_call_sizes_have_no_effect(
    start: int, sizes: list[int], shares: list[float], seed: int
) -> None:
    named = {f"s{i}": share for i, share in enumerate(shares)}
    sources = make({name: 3 + i for i, name in enumerate(named)})
    whole = stream(PromptDraw(sources, named, seed), 0, start + sum(sizes))
    resumed, position = PromptDraw(sources, named, seed), start
    for size in sizes:
        assert stream(resumed, position, size) == whole[position : position + size]
        position += size
    assert stream(resumed, 0, start) == whole[:start]


def test_the_order_of_sources_in_the_recipe_does_not_matter() -> None:
    sizes = {"b": 4, "a": 3}
    first = PromptDraw(make(sizes), {"b": 2.0, "a": 1.0}, 5)
    second = PromptDraw(make(dict(sorted(sizes.items()))), {"a": 1.0, "b": 2.0}, 5)
    assert stream(first, 0, 50) == stream(second, 0, 50)


def test_seed_source_and_epoch_key_the_order() -> None:
    orders = []
    for seed in (1, 2):
        for name in ("a", "b"):
            keys = [
                k.split(":")[1] for _, k in stream(PromptDraw(make({name: 30}), {name: 1.0}, seed), 0, 60)
            ]
            orders += [tuple(keys[:30]), tuple(keys[30:])]
    assert len(set(orders)) == len(orders)


def test_the_stream_is_the_same_in_every_version() -> None:
    """Recorded: a change here breaks the resumption of every run."""
    draw = PromptDraw(make({"a": 3, "b": 2}), {"a": 2.0, "b": 1.0}, 17)
    assert stream(draw, 0, 9) == RECORDED


def test_far_cursors_are_reached_by_whole_periods() -> None:
    draw = PromptDraw(make({"a": 10, "b": 10}), {"a": 0.1, "b": 0.2}, 0)
    far = 3 * 10**12  # a third and two thirds of it, ten prompts an epoch
    assert sorted(epoch for epoch, _ in stream(draw, far, 3)) == [10**11, 2 * 10**11, 2 * 10**11]


@pytest.mark.parametrize(
    ("sizes", "shares", "message"),
    [
        ({"a": 0}, {"a": 1.0}, "source 'a' has no prompts"),
        ({"a": 1}, {"a": 0.0}, "share 0.0"),
        ({"a": 1}, {"a": float("nan")}, "share nan"),
        ({"a": 1}, {"b": 1.0}, "do not fit"),
        ({}, {}, "do not fit"),
    ],
)
def test_bad_arguments(sizes: dict[str, int], shares: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        PromptDraw(make(sizes), shares, 0)


def test_phases_with_the_same_proportions_continue_one_stream() -> None:
    sources, shares = make({"a": 3, "b": 2}), {"a": 2.0, "b": 1.0}
    phases = {"one": PhaseShares(shares, 7), "two": PhaseShares({"a": 4.0, "b": 2.0}, 11)}
    draw = PhasedDraw(sources, phases, 17)
    found = [*draw.draw("one", 0, 7), *draw.draw("two", 0, 5), *draw.draw("two", 5, 6)]
    assert found == PromptDraw(sources, shares, 17).draw(0, 18)


def test_no_occurrence_of_a_prompt_is_drawn_twice_over_phases() -> None:
    """Whatever the phases draw from, a source's prompts come in its own order, epoch after epoch."""
    sources = make({"a": 5, "b": 4})
    phases = {
        "a": PhaseShares({"a": 1.0}, 7),
        "both": PhaseShares({"a": 1.0, "b": 2.0}, 13),
        "b": PhaseShares({"b": 3.0}, 6),
        "a again": PhaseShares({"a": 1.0}, 9),
    }
    draw = PhasedDraw(sources, phases, 3)
    drawn = {name: draw.draw(name, 0, phase.num_prompts) for name, phase in phases.items()}
    for source in sources:
        found = [(e, p.key) for part in drawn.values() for e, p in part if p.source == source]
        assert found == stream(PromptDraw({source: sources[source]}, {source: 1.0}, 3), 0, len(found))
    for name, phase in phases.items():  # as after a restart
        resumed = PhasedDraw(sources, phases, 3)
        half = phase.num_prompts // 2
        assert resumed.draw(name, half, phase.num_prompts - half) == drawn[name][half:]
