"""Duplicates against all pairs by brute force."""

from __future__ import annotations

import random

import pytest

from mergeopd.data.duplicates import duplicates, normal_text
from mergeopd.types import Message, Prompt


def jaccard(one: str, other: str) -> float:
    sets = [{text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def texts() -> list[str]:
    """Random sentences, and copies of earlier ones with some words replaced."""
    rng = random.Random(4)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
    made: list[str] = ["ab", "ab"]
    for _ in range(150):
        own = rng.choices(words, k=25) if rng.random() < 0.5 or len(made) < 3 else rng.choice(made).split()
        for _ in range(rng.choice((0, 1, 2, 4))):
            own[rng.randrange(len(own))] = rng.choice(words)
        made.append(" ".join(own))
    return made


@pytest.mark.parametrize("similarity", [0.7, 0.8, 0.9])
def test_equals_the_comparison_of_all_pairs(similarity: float) -> None:
    made = texts()
    kept: list[int] = []
    wanted = {}
    for index, text in enumerate(made):
        equal = next((other for other in range(index) if made[other] == text), None)
        near = next((other for other in kept if jaccard(text, made[other]) >= similarity), None)
        if equal is not None or near is not None:
            wanted[index] = near if equal is None else equal
        else:
            kept.append(index)
    found = duplicates(made, similarity)
    assert found.keys() == wanted.keys()
    assert 20 < len(found) < 120
    assert all(jaccard(made[i], made[twin]) >= similarity for i, twin in found.items())
    exact = duplicates(made, None)
    assert exact.keys() == {i for i, text in enumerate(made) if text in made[:i]}


def test_case_space_and_roles() -> None:
    def prompt(*messages: tuple[str, str]) -> Prompt:
        return Prompt("k", "s", "d", tuple(Message(role, text) for role, text in messages))  # type: ignore[arg-type]

    same = [prompt(("user", "What is  2 + 2?\n")), prompt(("user", " what is 2 + 2?"))]
    assert normal_text(same[0]) == normal_text(same[1])
    assert normal_text(prompt(("system", "Be brief."), ("user", "x"))) != normal_text(prompt(("user", "x")))
