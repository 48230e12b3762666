"""Phases that keep some of the teachers' responses: which ones, what takes their places, resume, reports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mergeopd.engine import rollouts as rollouts_module
from mergeopd.engine.progress import Task
from mergeopd.engine.run import run_recipe
from mergeopd.engine.teacher_rollouts import replace_unsolved
from mergeopd.errors import RecipeError, TeacherError, UpdateLimitReached
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.preflight.inputs import preflight
from mergeopd.recipe.training import Phase
from mergeopd.reporting.page.html import write_report
from mergeopd.storage.teacher_text import GradedText, kept_shares
from mergeopd.types import Origin, Prompt

VERIFIER = {"kind": "regex", "pattern": "^(b|c)"}
PROMPTS = ("a", "b", "c", "d", "a b", "b c")


@pytest.fixture
def recipe(write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two rounds of teachers' text on six prompts a domain, of which correct responses are kept."""
    monkeypatch.chdir(tmp_path)
    phase = {"name": "cold", "updates": 4, "updates_per_round": 2, "prompts_per_round": 6, "loss": "nll"}
    path = write_job(
        {
            "rollout": {"max_new_tokens": 6, "samples_per_prompt": 4},
            "phases": [{**phase, "text": "teacher", "keep": "right"}],
            "prompts": [
                {"source": "left.jsonl", "domain": "left", "teachers": {"one": 1.0}, "verifier": VERIFIER},
                {"source": "right.jsonl", "domain": "right", "teachers": {"two": 0.7}, "verifier": VERIFIER},
            ],
            "evaluation": {
                "prompts": [{"source": "eval.jsonl", "domain": "left", "verifier": VERIFIER}],
                "static_merges": [],
            },
            "checkpoint": {"every": 1},
        }
    )
    for name in ("left", "right"):
        Path(f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in PROMPTS))
    Path("eval.jsonl").write_text('{"prompt": "d d d"}\n')
    return path


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_only_correct_responses_are_learned_from_and_counted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergeopd.engine.pipeline import SynchronousPipeline

    rounds = []
    collect = SynchronousPipeline._collect

    def collected(self: SynchronousPipeline, tasks: list[Task], settings: Any, progress: Any) -> Any:
        rounds.append((tasks, collect(self, tasks, settings, progress)))
        return rounds[-1][1]

    monkeypatch.setattr(SynchronousPipeline, "_collect", collected)
    run_recipe(recipe, (), None, ())
    tokenizer = Tokenizer.load(Path("base"))
    texts = [tokenizer.decode(r.response_ids.tolist()) for _, rollouts in rounds for r in rollouts]
    assert texts
    assert all(text.startswith(("b", "c")) for text in texts)
    # Every round has its prompts, each with a response, and the shares of the domains.
    for tasks, rollouts in rounds:
        assert Counter(task.prompt.domain for task in tasks) == {"left": 3, "right": 3}
        assert {task.prompt.key for task in tasks} == {rollout.prompt.key for rollout in rollouts}
    rows = lines("run/rollouts/teacher_text.jsonl")
    assert all(not row["kept"] for row in rows if row["truncated"])
    assert any(row["reward"] == 1 for row in rows if row["truncated"]), "one that only its length excludes"
    assert Counter(row["domain"] for row in rows) == {"left": 24, "right": 24}
    shares = {d: sum(r["kept"] for r in rows if r["domain"] == d) / 24 for d in ("left", "right")}
    assert min(shares.values()) > 0
    assert max(shares.values()) < 1
    metrics = lines("run/metrics.jsonl")
    assert [line["text_kept"] for line in metrics] == [{"one": {"left": shares["left"]}, "two": {"right": shares["right"]}}] * 4  # fmt: skip
    result = json.loads(Path("run/result.json").read_text())
    assert [(row["teacher"], row["num_kept"] / row["num_responses"]) for row in result["text_kept"]] == [("one", shares["left"]), ("two", shares["right"])]  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert f"phase 'cold' keeps {round(24 * shares['left'])} of 24 responses" in out
    write_report(Path("run"))
    assert "kept by the verifiers" in Path("run/report.html").read_text()


def test_a_resumed_run_is_the_same_whatever_the_verifier_says_now(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(recipe, ("output=whole",), None, ())
    with pytest.raises(UpdateLimitReached):
        run_recipe(recipe, (), 2, ())
    of = rollouts_module.Rewards.of

    def of_student(self: Any, rollouts: Any, stop: Any, origin: Origin = "student") -> Any:
        assert not (origin == "teacher" and rollouts), "graded again"
        return of(self, rollouts, stop, origin)

    monkeypatch.setattr(rollouts_module.Rewards, "of", of_student)
    run_recipe(recipe, (), None, ())
    whole, resumed = (load_file(f"{run}/export/model.safetensors") for run in ("whole", "run"))
    assert all(bool((whole[name] == resumed[name]).all()) for name in whole)
    text = [Path(run, "rollouts/teacher_text.jsonl").read_text() for run in ("whole", "run")]
    assert text[0] == text[1]


def test_a_domain_without_a_correct_response_is_an_error(recipe: Path) -> None:
    never = ("prompts.1.verifier={kind: regex, pattern: nothing}",)
    with pytest.raises(TeacherError, match="phase 'cold' keeps no response of 'two' in domain 'right'"):
        run_recipe(recipe, never, None, ())
    assert len(lines("run/rollouts/teacher_text.jsonl")) == 48, "to look at"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("phases.0.text=student", "phases.0.loss=reverse_kl"),
            "keep selects responses of teachers, and this",
        ),
        (
            ("prompts.0.verifier=null", "prompts.1.verifier=null"),
            "keep needs rewards, and no prompt source has",
        ),
        (
            ("prompts.1.verifier=null",),
            "responses to prompts without a verifier cannot be selected: 'right.jsonl'",
        ),
        (("phases.0.keep=wrong",), "phases[0].keep"),
        (("phases.0.prompts_per_round=1",), "`keep` may leave one response per prompt"),
    ],
)
def test_recipes_that_cannot_select_are_refused(
    recipe: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        preflight(recipe, overrides)
    assert message in str(caught.value)


def test_prompts_without_a_response_give_their_places_in_turn() -> None:
    def task(key: str, domain: str, origin: Origin = "teacher") -> Task:
        return Task(Prompt(key, domain, domain, (), {"t": 1.0}), 0, origin)

    names = ("a", "b", "c", "x", "b", "d", "c")
    tasks = [task(name, "other" if name == "x" else "math") for name in names]
    tasks.append(task("e", "math", "student"))
    samples = {("t", name): [0] if name in ("a", "d", "x") else [] for name in names}
    phase = Phase(name="p", updates=1, loss="nll", text="teacher", keep="right")  # type: ignore[arg-type]
    replaced = replace_unsolved(phase, tasks, samples)
    assert {position: new.prompt.key for position, new in replaced.items()} == {
        1: "a",
        2: "d",
        4: "a",
        6: "d",
    }


def test_shares_count_responses_and_prompts() -> None:
    def row(key: str, sample: int, *, kept: bool, domain: str = "math") -> GradedText:
        return GradedText("p", "t", domain, key, sample, "", None, truncated=not kept, kept=kept)

    rows = [row("a", 0, kept=True), row("a", 1, kept=False), row("b", 0, kept=False), row("b", 1, kept=False)]
    one, other = kept_shares([*rows, row("c", 0, kept=True, domain="code")])
    assert (one.domain, one.num_responses, one.num_kept, one.num_prompts, one.num_without) == (
        "math",
        4,
        1,
        2,
        1,
    )
    assert (one.kept_fraction, other.kept_fraction) == (0.25, 1.0)
    assert (one.num_truncated, other.num_truncated) == (3, 0)
