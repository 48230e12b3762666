"""Denominators and budgets against hand arithmetic and the golden vector of Open-MOPD M1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopd.batch.weights import ResponseSize, response_weights, token_share_weights


def test_m1_golden_vector() -> None:
    weights = token_share_weights({"math": 10000, "code": 9000, "if": 400}, None)
    assert weights["math"] == pytest.approx(0.646667, abs=1e-6)
    assert weights["code"] == pytest.approx(0.718519, abs=1e-6)
    assert weights["if"] == pytest.approx(16.166667, abs=1e-6)


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(1, 10_000), min_size=1),
    st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
)
def test_m1_gives_every_domain_its_share_and_keeps_the_scale(mass: dict[str, int], raw: list[float]) -> None:
    targets = dict(zip("abcde", raw, strict=True))
    weights = token_share_weights(mass, targets)
    total = sum(mass.values())
    assert sum(weights[d] * m for d, m in mass.items()) == pytest.approx(total)
    wanted = sum(targets[d] for d in mass)
    for domain, m in mass.items():
        assert weights[domain] * m / total == pytest.approx(targets[domain] / wanted)


def test_m1_edges() -> None:
    assert token_share_weights({"a": 5, "b": 5}, None) == {"a": 1.0, "b": 1.0}
    assert token_share_weights({"a": 7, "b": 0}, None) == {"a": 1.0}
    assert token_share_weights({}, None) == {}
    with pytest.raises(ValueError, match="no target share for b"):
        token_share_weights({"a": 1, "b": 1}, {"a": 1.0})
    # A round that drew only prompts whose share is 0.
    assert token_share_weights({"a": 1}, {"a": 0.0, "b": 1.0}) == {"a": 0.0}
    assert response_weights([ResponseSize("a", 3, 0.5)], "token", {"a": 0.0, "b": 1.0}, 1.0) == (
        [0.0],
        {"a": 0.0},
    )


ANSWERS = [ResponseSize("a", 4), ResponseSize("b", 1), ResponseSize("a", 0), ResponseSize("b", 5)]


def test_token_mean_divides_by_all_tokens() -> None:
    weights, factors = response_weights(ANSWERS, "token", "off")
    assert weights == [0.1] * 4
    assert factors == {"a": 1.0, "b": 1.0}


def test_sequence_mean_gives_every_answer_one_third() -> None:
    weights, _ = response_weights(ANSWERS, "sequence", "off")
    assert weights == pytest.approx([1 / 12, 1 / 3, 0.0, 1 / 15])


def test_budgets_scale_the_shares_of_the_mean() -> None:
    tokens, factors = response_weights(ANSWERS, "token", "equal")
    assert factors == pytest.approx({"a": 1.25, "b": 10 / 12})
    assert sum(w * a.num_tokens for w, a in zip(tokens, ANSWERS, strict=True)) == pytest.approx(1.0)
    sequences, factors = response_weights(ANSWERS, "sequence", {"a": 3.0, "b": 1.0})
    by_domain = {"a": 0.0, "b": 0.0}
    for weight, answer in zip(sequences, ANSWERS, strict=True):
        by_domain[answer.domain] += weight * answer.num_tokens
    assert by_domain == pytest.approx({"a": 0.75, "b": 0.25})


def test_a_batch_of_empty_answers_is_worth_nothing() -> None:
    assert response_weights([ResponseSize("a", 0)], "token", "equal") == ([0.0], {})
    assert response_weights([], "sequence", "off") == ([], {})
