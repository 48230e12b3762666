"""From the rewards of an evaluation to a result: figures by hand, intervals, the sentence."""

from __future__ import annotations

import numpy as np
import pytest

from mergeopd.intervals import Values, wilson
from mergeopd.reporting.comparison import Measured, build_result
from mergeopd.reporting.result import Estimate, Model

MODELS = (
    Model("base", "base", "base"),
    Model.expert("one"),
    Model.expert("two"),
    Model("merge/ties", "static_merge", "ties"),
    Model("merge/slerp", "static_merge", "slerp"),
    Model("merged", "merged", "merged"),
)
EXPERTS = {"math": "expert/one", "code": "expert/two"}


def rewards(correct: int, num: int = 100) -> Values:
    """The first prompts are answered correctly, so a better model is correct wherever a worse one is."""
    return (np.arange(num) < correct).astype(float)


def measured(scores: dict[str, tuple[int, int]], **changes: object) -> Measured:
    values = {k: {"math": rewards(m), "code": rewards(c)} for k, (m, c) in scores.items()}
    models = tuple(model for model in MODELS if model.key in scores)
    return Measured(models, values, EXPERTS, {"math": 0, "code": 3}, **changes)  # type: ignore[arg-type]


SCORES = {
    "base": (20, 30),
    "expert/one": (90, 25),
    "expert/two": (10, 80),
    "merge/ties": (40, 40),
    "merge/slerp": (50, 20),
    "merged": (83, 60),
}


def test_figures_are_those_of_the_rewards() -> None:
    result = build_result(measured(SCORES), {"rollout": 1.5})
    math, code = result.suites["math"], result.suites["code"]
    assert math.accuracy["expert/two"].value == 0.1
    assert (math.accuracy["merged"].low, math.accuracy["merged"].high) == pytest.approx(
        (wilson(rewards(83)).low, wilson(rewards(83)).high)
    )
    assert math.recovered.value == pytest.approx((0.83 - 0.2) / (0.9 - 0.2))
    assert code.recovered.value == pytest.approx((0.6 - 0.3) / (0.8 - 0.3))
    assert result.mean_recovered.value == pytest.approx((0.9 + 0.6) / 2)
    assert (result.best_static, result.best_expert) == ("merge/ties", "expert/one")
    assert math.over_static is not None
    assert [e.value for e in (math.over_base, math.over_expert, math.over_static)] == pytest.approx(
        [0.63, -0.07, 0.43]
    )
    assert {kind: estimate.value for kind, estimate in result.mean.items()} == pytest.approx(
        {"base": 0.25, "expert": 0.85, "static_merge": 0.4, "merged": 0.715}
    )
    assert (math.num_prompts, math.overlap, code.overlap) == (100, 0, 3)
    assert result.headline("code")["expert"] == code.accuracy["expert/two"]
    assert result.seconds == {"rollout": 1.5}


def test_intervals_contain_their_figures_and_shrink_with_the_sample() -> None:
    result = build_result(measured(SCORES), {})
    estimates = [result.mean_recovered, *result.mean.values()]
    for row in result.suites.values():
        estimates += [row.recovered, row.over_base, row.over_expert, *row.accuracy.values()]
    for estimate in estimates:
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high
    large = Measured(
        MODELS,
        {
            k: {"math": rewards(100 * m, 10_000), "code": rewards(100 * c, 10_000)}
            for k, (m, c) in SCORES.items()
        },
        EXPERTS,
        {},
    )
    small, wide = build_result(large, {}).mean_recovered, result.mean_recovered
    assert small.low is not None
    assert small.high is not None
    assert wide.low is not None
    assert wide.high is not None
    assert (small.high - small.low) / (wide.high - wide.low) == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "reaches its expert within noise in 0 of 2 domains, ahead of the best static merge in 2 of 2, "
            "below the base in none",
        ),
        (
            {"merged": (89, 95)},
            "reaches its expert within noise in 2 of 2 domains (code: above it), ahead of the best static merge "
            "in 2 of 2, below the base in none",
        ),
        (
            {"merged": (41, 5)},
            "reaches its expert within noise in 0 of 2 domains, ahead of the best static merge in 0 of 2, "
            "below the base in code",
        ),
    ],
)
def test_the_sentence_counts_what_intervals_resolve(
    changes: dict[str, tuple[int, int]], sentence: str
) -> None:
    assert build_result(measured({**SCORES, **changes}), {}).verdict == sentence


def test_without_headroom_or_static_merges() -> None:
    scores = {k: v for k, v in SCORES.items() if not k.startswith("merge/")}
    result = build_result(measured({**scores, "expert/two": (10, 30)}), {})
    assert result.suites["code"].recovered == Estimate(None)
    assert result.mean_recovered == result.suites["math"].recovered
    assert result.suites["math"].over_static is None
    assert result.best_static is None
    assert "static_merge" not in result.mean
    assert "static merge" not in result.verdict
    flat = build_result(measured({**scores, "expert/one": (20, 0), "expert/two": (0, 30)}), {})
    assert flat.mean_recovered == Estimate(None)


def test_models_may_lack_domains() -> None:
    own = measured(SCORES)
    scores = {**own.scores, "expert/two": {"code": rewards(80)}}
    result = build_result(Measured(MODELS, scores, EXPERTS, {}), {})
    assert "expert/two" not in result.suites["math"].accuracy
    assert result.best_expert == "expert/one"


def test_a_skill_that_no_prompt_trains() -> None:
    """It has no headroom, counts in no mean, and the sentence says what was kept of it."""
    own = measured(SCORES)
    retained = {
        "base": 90,
        "expert/one": 70,
        "expert/two": 80,
        "merge/ties": 60,
        "merge/slerp": 99,
        "merged": 70,
    }
    scores = {key: {**row, "facts": rewards(retained[key])} for key, row in own.scores.items()}
    result = build_result(Measured(MODELS, scores, {**EXPERTS, "facts": None}, {}), {})
    facts = result.suites["facts"]
    assert (facts.expert, facts.recovered, facts.over_expert) == (None, Estimate(None), Estimate(None))
    assert facts.over_base.value == pytest.approx(-0.2)
    assert set(facts.accuracy) == set(retained)
    assert result.headline("facts")["expert"] is None
    plain = build_result(own, {})
    assert (result.mean, result.mean_recovered) == (plain.mean, plain.mean_recovered)
    assert result.best_static == plain.best_static
    assert result.verdict == plain.verdict + ", forgets facts: -20.0 points"
    for num, words in ((88, "keeps facts (-2.0 points) within noise"), (100, "gains facts: +10.0 points")):
        changed = {**scores, "merged": {**scores["merged"], "facts": rewards(num)}}
        verdict = build_result(Measured(MODELS, changed, {**EXPERTS, "facts": None}, {}), {}).verdict
        assert verdict == f"{plain.verdict}, {words}"


def test_models_that_were_not_measured() -> None:
    own = measured(SCORES)
    merged = build_result(Measured(MODELS[-1:], {"merged": own.scores["merged"]}, EXPERTS, {}), {})
    assert merged.suites["math"].over_base == merged.suites["math"].recovered == Estimate(None)
    assert set(merged.mean) == {"merged"}
    assert merged.verdict == "was measured without the models to compare it with"
    without = {key: row for key, row in own.scores.items() if key != "merged"}
    assert build_result(Measured(MODELS[:-1], without, EXPERTS, {}), {}).verdict == "was not measured"


def test_controls_are_compared_one_by_one() -> None:
    controls = {"control/sft": (83, 58), "control/sampled": (40, 90)}
    scores = {**SCORES, **controls}
    values = {k: {"math": rewards(m), "code": rewards(c)} for k, (m, c) in scores.items()}
    models = (*MODELS, Model.control("sft"), Model.control("sampled"))
    result = build_result(Measured(models, values, EXPERTS, {}, {"merged": 7}), {})
    math = result.suites["math"].over_control
    assert {key: e.value for key, e in math.items()} == pytest.approx(
        {"control/sft": 0.0, "control/sampled": 0.43}
    )
    assert result.best_control == "control/sft"
    assert result.mean["control"].value == pytest.approx((0.83 + 0.58) / 2)
    assert result.headline("code")["control"] == result.suites["code"].accuracy["control/sft"]
    assert (
        ", level with SFT on expert text, ahead of sampled reverse KL in 1 of 2 and behind it in 1 of 2, "
        in (result.verdict)
    )
    assert result.trained_tokens == {"merged": 7}
    assert "control" not in build_result(measured(SCORES), {}).headline("code")
