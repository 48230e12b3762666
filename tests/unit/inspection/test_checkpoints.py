"""Checkpoints in the place of a teacher: ranks by hand, and a comparison of two folders from end to end."""

import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console

from mergeopd.errors import RecipeError
from mergeopd.inspection.checkpoints import MeasuredCheckpoint, rank
from mergeopd.inspection.run import inspect_recipe
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.inspection import Verdict
from mergeopd.reporting.result import Estimate

ANY = {"kind": "regex", "pattern": ".*"}
READY = Verdict("ready", "can teach")


def measured(label, solved, reverse_kl):
    rate = Estimate(sum(solved.values()) / len(solved)) if solved else Estimate(None)
    signal = SimpleNamespace(pass_rate_T=rate, reverse_kl=Estimate(reverse_kl))
    record = SimpleNamespace(by_domain={"d": signal}, domain_verdicts={"d": READY}, verdict=READY)
    return MeasuredCheckpoint(SimpleNamespace(label=label), record, solved)


def test_the_highest_pass_rate_and_of_equal_ones_the_closest_is_the_best():
    prompts = dict.fromkeys(range(40), "d")
    half = {i: float(i % 2) for i in prompts}
    one_less = {**half, 1: 0.0}
    best, second, *others = rank(
        [
            measured("far", half, 2.0),
            measured("less", one_less, 0.1),
            measured("near", half, 1.0),
            measured("lost", dict.fromkeys(prompts, 0.0), 0.0),
        ],
        prompts,
    )
    assert [best.checkpoint, second.checkpoint, *(one.checkpoint for one in others)] == [
        "near",
        "far",
        "less",
        "lost",
    ]
    assert [one.is_best for one in (best, second, *others)] == [True, False, False, False]
    assert best.behind == Estimate(0.0)
    less, lost = others
    # Paired: one prompt of forty differs, so the interval is narrow.
    assert less.behind.value == pytest.approx(1 / 40)
    assert less.behind.low <= 0.0 < less.behind.high < 0.15
    assert lost.behind.value == 0.5
    assert lost.behind.low > 0.25


def test_without_a_verifier_no_checkpoint_is_the_best():
    [only] = rank([measured("only", {}, 1.0)], {0: "d"})
    assert not only.is_best
    assert only.behind == Estimate(None)


def compare(recipe, folders, cards, teachers=("two",)):
    return inspect_recipe(
        recipe,
        ["inspect.prompts=4", "inspect.samples=2", "rollout.max_new_tokens=3"],
        teachers=teachers,
        checkpoints=folders,
        cards=cards,
        console=Console(quiet=True),
    )


def test_two_checkpoints_on_one_sample(write_job, tmp_path):
    right = {"source": "right.jsonl", "domain": "right", "teachers": {"two": 1.0}, "verifier": ANY}
    left = {"source": "left.jsonl", "domain": "left", "teachers": {"one": 1.0}}
    recipe = write_job({"prompts": [left, right]})
    run = tmp_path / "run of two"
    for name, model in (("checkpoint-10", "two"), ("checkpoint-9", "base")):
        shutil.copytree(tmp_path / model, run / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # it has that of the teacher
        (run / "checkpoint-10" / name).unlink()
    inspection = compare(recipe, [run], tmp_path / "cards")
    assert [teacher.name for teacher in inspection.teachers] == ["checkpoint-9", "checkpoint-10"]
    student, other = (teacher.by_domain["right"] for teacher in inspection.teachers)
    assert student.pass_rate_S == other.pass_rate_S  # the same responses
    assert student.num_tokens == other.num_tokens
    assert student.reverse_kl.value == pytest.approx(0.0, abs=1e-6)
    assert other.reverse_kl.value > 0.01
    best, second = inspection.checkpoints
    assert (best.checkpoint, best.is_best, second.checkpoint) == ("checkpoint-9", True, "checkpoint-10")
    [card] = (tmp_path / "cards").iterdir()
    assert card.name == "two-checkpoint-9.yaml"
    plan = preflight(recipe, [f"teachers.two.card={card}"]).plan.teachers["two"]
    assert plan.folder == run / "checkpoint-9"
    assert plan.fingerprint is not None
    assert plan.canary is not None


def test_what_cannot_be_compared(write_job, tmp_path):
    recipe = write_job()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"no model in .*empty"):
        compare(recipe, [tmp_path / "empty"], None)
    with pytest.raises(RecipeError, match="the recipe has the teachers one and two"):
        compare(recipe, [tmp_path / "two"], None, teachers=())
