"""Phases that select their prompts: which ones, by whose numbers, over a resume, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mergeopd.data.draw import PhasedDraw, PhaseShares
from mergeopd.engine.pipeline import SynchronousPipeline
from mergeopd.engine.rollouts import Rewards
from mergeopd.engine.run import run_recipe
from mergeopd.engine.selection import PromptSelection
from mergeopd.errors import DataError, RecipeError, StorageError, UpdateLimitReached
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.page.html import write_report
from mergeopd.types import Prompt, Rollout

VERIFIER = {"kind": "regex", "pattern": "^(b|c)"}
PROMPTS = ("a", "b", "c", "d", "a b", "b c", "A  b", "c d a")  # the seventh equals the fifth
FRONTIER = {"low": 0.25, "high": 0.75, "samples": 4}


@pytest.fixture
def recipe(write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A phase on all prompts, and one on those at the frontier."""
    monkeypatch.chdir(tmp_path)
    phase = {"updates_per_round": 2, "prompts_per_round": 6, "loss": "reverse_kl"}
    path = write_job(
        {
            "rollout": {"max_new_tokens": 6},
            "phases": [
                {**phase, "name": "all", "updates": 2},
                {
                    **phase,
                    "name": "hard",
                    "updates": 4,
                    "select": {"deduplicate": "exact", "frontier": FRONTIER},
                },
            ],
            "prompts": [
                {"source": "left.jsonl", "domain": "left", "teachers": {"one": 1.0}, "verifier": VERIFIER},
                {"source": "right.jsonl", "domain": "right", "teachers": {"two": 0.7}, "verifier": VERIFIER},
            ],
            "checkpoint": {"every": 1},
        }
    )
    Path("left.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in PROMPTS))
    others = (f"{text} d" for text in PROMPTS)
    Path("right.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in others))
    return path


def rows(run: str = "run") -> dict[str, dict[str, Any]]:
    lines = Path(run, "rollouts/selection.jsonl").read_text().splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def is_right(tokenizer: Tokenizer, rollout: Rollout) -> bool:
    return tokenizer.decode(rollout.response_ids.tolist()).startswith(("b", "c"))


def test_only_prompts_at_the_frontier_are_drawn_and_the_others_are_counted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled, drawn = [], []
    of_student, collect = PromptSelection._of_student, SynchronousPipeline._collect

    def spy(self: Any, *arguments: Any) -> list[Rollout]:
        sampled.extend(of_student(self, *arguments))
        return sampled

    def collected(self: Any, tasks: Any, settings: Any, progress: Any) -> list[Rollout]:
        drawn.append([(task.prompt.key, task.occurrence) for task in tasks])
        return collect(self, tasks, settings, progress)

    monkeypatch.setattr(PromptSelection, "_of_student", spy)
    monkeypatch.setattr(SynchronousPipeline, "_collect", collected)
    run_recipe(recipe, (), None, ())
    tokenizer = Tokenizer.load(Path("base"))
    assert len(sampled) == 4 * 14, "the two duplicates are not measured"
    assert {rollout.policy_version for rollout in sampled} == {2}, "with the weights at the phase's start"
    right: dict[str, list[bool]] = {}
    for rollout in sampled:
        right.setdefault(rollout.prompt.key.partition("#")[0], []).append(is_right(tokenizer, rollout))
    kept, seen = set(), rows()
    for key, row in seen.items():
        if key in ("left:6", "right:6"):
            assert (row["dropped"], row["twin"], row["pass_rate"]) == (
                "duplicate",
                key.replace("6", "4"),
                None,
            )
            continue
        rate = sum(right[key]) / 4
        assert row["pass_rate"] == rate
        assert row["dropped"] == ("below" if rate < 0.25 else "above" if rate > 0.75 else "")
        kept |= {key} if 0.25 <= rate <= 0.75 else set()
    assert len(seen) == 16
    assert 2 <= len(kept) < 14
    [first, *later] = drawn
    assert not {key for key, _ in first} <= kept
    assert {key for one in later for key, _ in one} <= kept
    assert min(occurrence for one in later for _, occurrence in one) >= 1 << 20, "apart from other phases"
    shares = {d: sum(key.startswith(d) for key in kept) / 8 for d in ("left", "right")}
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["selected"] for line in metrics] == [{}] * 2 + [shares] * 4
    out = " ".join(capsys.readouterr().out.split())
    assert f"phase 'hard' draws from {round(8 * shares['left'])} of 8 prompts of left" in out
    assert "1 equal to an earlier prompt" in out
    write_report(Path("run"))
    assert "Selected prompts" in Path("run/report.html").read_text()


def test_a_resumed_run_reads_its_selection(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it measures, it measures again; killed later, it does not, and needs the file."""
    run_recipe(recipe, ("output=whole",), None, ())
    of = Rewards.of

    def killed(self: Any, *arguments: Any) -> Any:
        raise KeyboardInterrupt

    def of_training(self: Any, rollouts: Any, stop: Any, origin: Any = "student") -> Any:
        assert not any("#select" in rollout.prompt.key for rollout in rollouts), "measured again"
        return of(self, rollouts, stop, origin)

    monkeypatch.setattr(PromptSelection, "_pass_rates", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, (), None, ())
    assert not Path("run/rollouts/selection.jsonl").exists()
    monkeypatch.undo()
    monkeypatch.chdir(recipe.parent)
    with pytest.raises(UpdateLimitReached):
        run_recipe(recipe, (), 2, ())
    kept = Path("run/rollouts/selection.jsonl").read_bytes()
    Path("run/rollouts/selection.jsonl").write_bytes(kept.replace(b'"pass_rate"', b'"other"', 1)[:-40])
    with pytest.raises(StorageError, match=r"lacks the prompts that phase 'hard' has selected, and the"):
        run_recipe(recipe, (), None, ())
    Path("run/rollouts/selection.jsonl").write_bytes(kept)
    monkeypatch.setattr(Rewards, "of", of_training)
    run_recipe(recipe, (), None, ())
    whole, resumed = (load_file(f"{run}/export/model.safetensors") for run in ("whole", "run"))
    assert all(bool((whole[name] == resumed[name]).all()) for name in whole)
    assert rows("whole") == rows()


def test_a_source_without_a_prompt_left_is_an_error_with_its_numbers(recipe: Path) -> None:
    always = ("prompts.1.verifier={kind: regex, pattern: .}",)
    text = (
        "phase 'hard' selects none of the 8 prompts of 'right': 1 equal to an earlier prompt, "
        "7 solved too often by the student; raise `frontier.high`"
    )
    with pytest.raises(DataError, match=text):
        run_recipe(recipe, always, None, ())


def test_prompts_near_the_teacher_and_those_that_it_solves(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against log-probabilities of transformers, and the responses of the teacher itself."""
    select = (
        "phases.1.select={teacher_right: {least: 0.3, samples: 3}, near_teacher: {nats: 1.1, samples: 2}}"
    )
    near, texts = [], []
    of_student, of_teachers = PromptSelection._of_student, PromptSelection._of_teachers
    monkeypatch.setattr(PromptSelection, "_of_student", lambda *a: near.extend(of_student(*a)) or near[:])
    monkeypatch.setattr(PromptSelection, "_of_teachers", lambda *a: texts.extend(of_teachers(*a)) or texts[:])
    only = ("phases.0.updates=2", "phases.1.prompts=[right]", "phases.1.updates=2", select)
    with pytest.raises(UpdateLimitReached):  # the student stays the base until the second phase
        run_recipe(recipe, (*only, "optimizer.lr=0.0"), 2, ())
    run_recipe(recipe, (*only, "optimizer.lr=0.0"), None, ())
    tokenizer, seen = Tokenizer.load(Path("base")), rows()
    assert len(texts) == 24
    solved: dict[str, list[bool]] = {}
    for rollout in texts:
        solved.setdefault(rollout.prompt.key, []).append(is_right(tokenizer, rollout))
    for key, own in solved.items():
        assert seen[key]["teacher_pass_rate"] == pytest.approx(np.mean(own))
        assert (seen[key]["dropped"] == "teacher_wrong") == (np.mean(own) < 0.3)
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in ("base", "two")]
    gaps: dict[str, list[float]] = {}
    for rollout in near:
        ids = torch.tensor([*rollout.prompt_ids, *rollout.response_ids])
        start = len(rollout.prompt_ids)
        with torch.no_grad():
            rows_S, rows_T = (
                torch.log_softmax(model(ids[None]).logits[0, start - 1 : -1, :5], 1) for model in models
            )
        taken = ids[start:, None]
        own_gaps = (rows_S.gather(1, taken) - rows_T.gather(1, taken))[:, 0].tolist()
        gaps.setdefault(rollout.prompt.key.partition("#")[0], []).extend(own_gaps)
    assert gaps
    assert gaps.keys() == {key for key, row in seen.items() if row["dropped"] != "teacher_wrong"}
    for key, own_gaps in gaps.items():
        assert seen[key]["gap"] == pytest.approx(np.mean(own_gaps), abs=1e-5)
        assert seen[key]["dropped"] == ("far" if np.mean(own_gaps) > 1.1 else "")
    assert {row["dropped"] for row in seen.values()} == {"", "far", "teacher_wrong"}


def test_other_phases_draw_as_if_there_were_no_selection() -> None:
    prompts = {"s": [Prompt(f"s:{i}", "s", "d", ()) for i in range(5)]}
    shares = {name: PhaseShares({"s": 1.0}, 7) for name in ("a", "b")}
    plain = PhasedDraw(prompts, shares, 1)
    with_selection = {"a": shares["a"], "x": PhaseShares({"s": 1.0}, 9, selects=True), "b": shares["b"]}
    draw = PhasedDraw(prompts, with_selection, 1)
    draw.narrow("x", {"s": prompts["s"][1:3]})
    assert [draw.draw(name, 0, 7) for name in "ab"] == [plain.draw(name, 0, 7) for name in "ab"]
    epochs = [(epoch, prompt.key) for epoch, prompt in draw.draw("x", 0, 4)]
    assert sorted(epochs) == [((2 << 20) + e, key) for e in (0, 1) for key in ("s:1", "s:2")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("prompts.0.verifier=null", "prompts.1.verifier=null"), "frontier needs rewards, and no prompt source has"),
        (("prompts.1.verifier=null",), "prompts without a verifier cannot be selected: 'right.jsonl'"),
        (("phases.1.select={frontier: {low: 0.8, high: 0.2}}",), "low 0.8 is above high 0.2"),
        (("phases.1.select={}",), "nothing selects: name one of deduplicate, teacher_right"),
        (
            ("phases.1.select={near_teacher: {}}", "teachers.two.targets=recorded"),
            "near_teacher compares log-probabilities of the student's tokens, and teacher 'two' has recorded",
        ),
        (
            ("phases.1.select={deduplicate: exact}", "phases.1.text=teacher", "teachers.two.targets=recorded"),
            "phase 'hard' selects its prompts when it starts, so targets of teacher 'two' cannot be recorded",
        ),
        (
            (
                "phases=[{name: p, updates: 1, text: dataset, loss: nll, select: {teacher_right: {}}}]",
                "prompts.1.teachers=null",
            ),
            "no teacher is named, and no card lists the domain 'right'",
        ),
    ],
)  # fmt: skip
def test_selections_that_cannot_be_measured_are_refused(
    recipe: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        preflight(recipe, overrides)
    assert message in str(caught.value)
