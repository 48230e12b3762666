"""What a run changed: identical and planted exports, against inspections of each student alone; damaged runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from contributions import contribution
from results import result_of
from rich.console import Console
from typer.testing import CliRunner

import mergeopd
from mergeopd.cli import app
from mergeopd.errors import RecipeError, StorageError
from mergeopd.inspection.changes import (
    changed_responses,
    closed_share,
    domain_change,
    is_refusal,
    token_change,
)
from mergeopd.inspection.contribution_summary import summary_of
from mergeopd.inspection.finished_run import open_run
from mergeopd.inspection.run import inspect_recipe, inspect_run
from mergeopd.inspection.signal import Scored
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.contribution import (
    Contribution,
    StudentResponse,
    read_contribution,
    write_contribution,
)
from mergeopd.reporting.result import write_result
from mergeopd.storage.folders import atomic_folder
from mergeopd.storage.responses import EvaluatedResponse, write_responses
from mergeopd.storage.run_folder import RunFolder

QUIET = Console(quiet=True)
Finish = Callable[[str], Path]


@pytest.fixture
def job(write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    evaluated = [
        {"source": f"eval_{domain}.jsonl", "domain": domain, "verifier": "exact", "expert": "two"}
        for domain in ("left", "right")
    ]
    recipe = write_job(
        {"evaluation": {"prompts": evaluated}, "inspect": {"samples": 8, "top_k": 2}}, dtype="float64"
    )
    for domain in ("left", "right"):
        (tmp_path / f"eval_{domain}.jsonl").write_text(json.dumps({"prompt": "d", "answer": "c"}))
    return recipe


@pytest.fixture
def finish(job: Path) -> Finish:
    """`finish(model)` writes the folder of a run that exported this model; returns the folder."""

    def write(model: str) -> Path:
        inputs = preflight(job, with_servers=False)
        folder = RunFolder(Path(inputs.plan.output))
        folder.claim(inputs.plan, inputs.files, datetime(2026, 1, 2), ())
        with atomic_folder(folder.export) as target:
            for file in (job.parent / model).iterdir():
                shutil.copy(file, target)
        return folder.path

    return write


def inspect(folder: Path) -> Contribution:
    return inspect_run(folder, console=QUIET)


def test_an_export_of_the_base_changed_nothing(finish: Finish, tmp_path: Path) -> None:
    made = inspect(finish("base"))
    assert {(teacher, domain) for teacher, domain, _ in made.cells} == {
        ("one", "left"),
        ("two", "left"),
        ("two", "right"),
    }
    for _, _, change in made.cells:
        for each in (change.reverse_kl, change.overlap, change.teacher_logprob_gap):
            assert each.base == each.merged
            assert (each.change.value, each.change.low, each.change.high) == (0.0, 0.0, 0.0)
        assert change.reverse_kl.base.value > 0.1
        assert change.closed.value == 0.0
        assert change.pass_rate.change.value == 0.0
    assert sum(change.rest_share for _, _, change in made.cells) == pytest.approx(1.0)
    for domain in made.domains:
        assert domain.measured_on == "sample"
        assert domain.is_trained
        for each in (domain.pass_rate, domain.length, domain.truncated, domain.tool_calls, domain.repetition):
            assert each.change.value in (None, 0.0)
            assert each.sign == 0
    assert made.responses == ()
    assert made.forgotten == ()
    write_contribution(made, tmp_path / "contribution.json")
    assert read_contribution(tmp_path / "contribution.json") == made
    assert [row["domain"] for row in made.domain_rows()] == ["left", "right"]
    assert made.to_rows()[1]["reverse_kl_change"] == 0.0


def test_an_export_of_an_expert_has_reached_it(finish: Finish, job: Path) -> None:
    made = inspect(finish("two"))
    for domain in ("left", "right"):
        change = made.teachers[1].by_domain[domain]
        assert change.reverse_kl.base.value > 0.1
        assert change.reverse_kl.merged.value == pytest.approx(0.0, abs=1e-9)
        assert change.closed.value == pytest.approx(1.0)
        assert change.overlap.merged.value == 1.0
        assert change.teacher_logprob_gap.base.value < -0.1
        assert change.teacher_logprob_gap.merged.value == pytest.approx(0.0, abs=1e-9)
        assert change.pass_rate.merged.value == change.pass_rate_T.value
        assert change.rest_share == pytest.approx(0.0, abs=1e-9)
    assert made.teachers[0].total.rest_share == pytest.approx(1.0)
    assert {response.name for response in made.responses} == {"left", "right"}
    assert all(pair.base.text != pair.merged.text or pair.change for pair in made.responses)

    # An inspection of each student alone, with the recipe, measures the same.
    for model, attribute in (("base", "base"), ("two", "merged")):
        alone = inspect_recipe(job, [f"student.model={model}", "output=elsewhere"], console=QUIET)
        for teacher, own in zip(alone.teachers, made.teachers, strict=True):
            for domain, signal in teacher.by_domain.items():
                change = own.by_domain[domain]
                assert getattr(change.reverse_kl, attribute) == signal.reverse_kl
                assert getattr(change.overlap, attribute) == signal.overlap
                assert getattr(change.pass_rate, attribute) == signal.pass_rate_S
                assert getattr(change.teacher_logprob_gap, attribute) == signal.teacher_logprob_gap
                assert change.pass_rate_T == signal.pass_rate_T


def test_teachers_whose_weights_are_gone_are_told_and_the_rest_is_measured(finish: Finish, job: Path) -> None:
    folder = finish("two")
    shutil.rmtree(job.parent / "one")
    write_evaluation(folder)
    called = CliRunner().invoke(app, ["inspect", str(folder), "--json", "--prompts", "4"])
    assert called.exit_code == 0, called.output
    made = read_contribution(folder / "inspect" / "contribution.json")
    assert json.loads(called.stdout)["run"] == made.run == "run"
    assert (folder / "inspect" / "contribution.html").is_file()
    one, two = made.teachers
    assert one.total is None
    assert "cannot be read" in one.fault
    assert any(sentence.startswith("one cannot be read") for sentence in made.summary)
    assert two.by_domain["left"].closed.value == pytest.approx(1.0)

    # Accuracies are those of the result; what the evaluation has no responses of is sampled.
    left, right, chat = made.domains
    assert [(d.name, d.measured_on) for d in made.domains] == [
        ("left", "evaluation"),
        ("right", "sample"),
        ("chat", "evaluation"),
    ]
    assert (left.pass_rate.base.value, left.pass_rate.merged.value, left.num_prompts) == (1.0, 0.25, 4)
    assert (left.length.base.value, left.length.merged.value) == (3, 7)
    assert (chat.pass_rate.change.value, chat.length.change.value) == (-0.75, None)
    assert not chat.is_trained
    assert right.num_prompts == 2
    assert [pair.key for pair in made.responses if pair.name == "left"] == ["p1", "p2", "p3", "p0"]


def write_evaluation(run: Path) -> None:
    """Write a result of two suites, of which one has responses."""
    accuracies = {"base": 1.0, "merged": 0.25, "expert/two": 1.0}
    write_result(run / "result.json", result_of({"left": accuracies, "chat": accuracies}, num=4))
    for model, num, rewards in (("base", 3, (1, 1, 1, 1)), ("merged", 7, (1, 0, 0, 0))):
        rows = [row(f"p{i}", model, reward, num=num) for i, reward in enumerate(rewards)]
        own = [replace(one, domain="left", suite="left") for one in rows]
        write_responses(run / "evaluation" / f"{model}.parquet", own)


def test_options_of_recipes_are_refused_for_runs(finish: Finish) -> None:
    with pytest.raises(RecipeError, match=r"--teacher\n.*run is the folder of a run"):
        mergeopd.inspect(finish("base"), teachers=["one"])


def test_a_run_without_its_recipe_is_inspected_from_its_plan(finish: Finish, job: Path) -> None:
    folder = finish("two")
    before = open_run(folder)
    job.unlink()
    after = open_run(folder)
    assert before.inputs.plan.inspect.samples == 8
    assert after.inputs.plan.inspect.samples == 4  # a setting that a run does not keep
    assert after.inputs.prompts == before.inputs.prompts
    assert after.inputs.plan.teachers == before.inputs.plan.teachers
    (job.parent / "left.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b", "response": "c"}))
    assert "left.jsonl has other contents than when the run began" in open_run(folder).notes


def test_remote_teachers_of_a_run_without_its_recipe(finish: Finish, job: Path) -> None:
    """Servers' addresses are not in a run folder; an API is not asked anyway."""
    document = json.loads(job.read_text())
    document["teachers"]["far"] = {"card": "far.yaml"}
    document["prompts"][0]["teachers"]["far"] = 1.0
    warm = {"name": "warm", "updates": 1, "loss": "nll", "text": "teacher", "prompts": ["left"]}
    document["phases"].insert(0, {**warm, "prompts_per_round": 2, "teachers": {"far": 1.0}})
    document["phases"][1]["teachers"] = {"one": 1.0, "two": 1.0}
    job.write_text(json.dumps(document))
    api = {"url": "https://example.invalid/v1", "model": "big", "probe": False}
    (job.parent / "far.yaml").write_text(json.dumps({"card": 1, "name": "far", "api": api}))
    card = json.loads((job.parent / "one.yaml").read_text())
    card["served"] = {"engine": "vllm", "url": "http://127.0.0.1:9", "hidden_states": True}
    (job.parent / "one.yaml").write_text(json.dumps(card))
    folder = finish("two")
    run = open_run(folder)
    assert run.faults == {"far": "is behind an API, which an inspection does not ask"}
    assert run.inputs.plan.teachers["one"].served is not None
    assert not any("weights" in note for note in run.notes)
    job.unlink()
    run = open_run(folder)
    assert list(run.faults) == ["far"]
    assert run.inputs.plan.teachers["one"].served is None
    assert run.notes[0].startswith("one: read from their own weights")


def test_runs_that_cannot_be_inspected_are_refused_with_a_remedy(finish: Finish, job: Path) -> None:
    folder = finish("two")
    export = folder / "export"
    config = (export / "config.json").read_text()
    (export / "config.json").write_text("{}")
    with pytest.raises(StorageError, match=r"config.json.*`mergeopd run job.yaml` writes it again"):
        open_run(folder)
    export.rename(folder / "aside")
    with pytest.raises(StorageError, match=r"run has no exported student .*`mergeopd run job.yaml`"):
        open_run(folder)
    (folder / "aside").rename(export)
    (export / "config.json").write_text(config)
    with pytest.raises(StorageError, match="not a run folder"):
        open_run(export)
    with pytest.raises(StorageError, match="no such folder"):
        open_run(Path("nothing"))
    plan = (folder / "plan.yaml").read_text()
    (folder / "plan.yaml").write_text(plan.replace("seed: 3", "seed: 4"))
    with pytest.raises(StorageError, match=r"plan\.yaml is damaged"):
        open_run(folder)
    (folder / "plan.yaml").unlink()
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(StorageError, match=r"plan\.yaml is missing"):
        open_run(folder)
    (folder / "plan.yaml").write_text(plan)
    shutil.rmtree(job.parent / "base")
    with pytest.raises(RecipeError, match=r"student\.model"):
        open_run(folder)


def scored(prompt: int, values: Sequence[float]) -> Scored:
    return Scored(prompt, np.arange(len(values)), {"reverse_kl": np.array(values, np.float64)})


def test_paired_intervals_cover_at_the_stated_rate_and_are_narrower() -> None:
    """Prompts differ much more than the students do on one of them."""
    random = np.random.default_rng(0)
    hits, hits_closed, narrower = 0, 0, 0
    for _ in range(300):
        sides: tuple[list[Scored], list[Scored]] = [], []
        for prompt in range(16):
            level = random.normal(2.0, 0.5)
            for side, mean in zip(sides, (level, 0.25 * level + random.normal(0.0, 0.05)), strict=True):
                side.append(scored(prompt, mean + random.normal(0.0, 0.2, random.integers(20, 40))))
        change = token_change(*sides, "reverse_kl")
        closed = closed_share(*sides)
        hits += change.change.low <= -1.5 <= change.change.high
        hits_closed += closed.low <= 0.75 <= closed.high
        narrower += change.change.high - change.change.low < change.base.high - change.base.low
    assert 0.91 <= hits / 300 <= 0.98
    assert 0.91 <= hits_closed / 300 <= 0.98
    assert narrower == 300
    assert closed_share([scored(0, [0.0])], [scored(0, [1.0])]).value is None
    assert token_change([], [], "reverse_kl").change.value is None


def row(key: str, text: str, reward: float | None, finish: str = "eos", num: int = 3) -> EvaluatedResponse:
    return EvaluatedResponse("math", "file", key, 0, f"ask {key}", "c", text, reward, None, finish, num)  # type: ignore[arg-type]


def test_behaviour_is_counted_by_prompt(job: Path) -> None:
    tokenizer = Tokenizer.load(job.parent / "base")
    base = [row("p", "a b c d a b", 1.0), row("p", "a", 0.0), row("q", "b", 1.0), row("r", "b", 1.0)]
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    merged = [
        row("p", "a a a a a a", 0.0, "length", 9),
        row("q", "I\u2019m sorry, no", 1.0),
        row("s", call, 1),
    ]
    change = domain_change("math", base, merged, tokenizer, "sample", is_trained=True)
    assert change.num_prompts == 2  # p and q
    assert (change.pass_rate.base.value, change.pass_rate.merged.value) == (0.75, 0.5)
    assert (change.length.base.value, change.length.merged.value, change.length.change.value) == (3, 6, 3)
    assert (change.truncated.base.value, change.truncated.merged.value) == (0.0, 0.5)
    assert (change.refusals.base.value, change.refusals.merged.value) == (0.0, 0.5)
    assert (change.tool_calls.base.value, change.tool_calls.merged.value) == (0.0, 0.0)
    # Of the three 4-grams of a a a a a a, two occurred earlier; q's responses are too short for one.
    assert (change.repetition.base.value, change.repetition.merged.value) == (0.0, pytest.approx(2 / 3))
    with_call = domain_change(
        "math", merged, [*merged[:2], row("s", "b", 1)], tokenizer, "sample", is_trained=True
    )
    assert with_call.tool_calls.change.value == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I can't help with that.", True),
        ("<think>\nI cannot say yet\n</think>\n\nThe result is 4.", False),
        ("<think>it is easy</think> **Sorry, but** no", True),
        ("As an AI language model, ...", True),
        ("The word sorry, I think", False),
        ("", False),
    ],
)
def test_refusals_are_recognised_by_their_opening(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


def test_the_largest_losses_and_gains_are_shown_in_turn() -> None:
    base = [row("up", "x", 0.0), row("same", "y", 1.0), row("down", "z", 1.0), row("other", "v w", 1.0)]
    base += [row("half", "good", 1.0), row("half", "bad", 0.0), row("near", "v w x y", 1.0)]
    merged = [row("up", "a", 1.0), row("same", "y", 1.0), row("down", "b", 0.0), row("other", "t u", 1.0)]
    merged += [row("half", "bad", 0.0), row("half", "worse", 0.0), row("near", "v w x z", 1.0)]
    shown = changed_responses("math", base, merged, "sample", 9)
    assert [pair.key for pair in shown] == ["down", "up", "half", "other", "near"]
    half = shown[2]
    assert half.change == -0.5
    assert half.base == StudentResponse("good", 1.0, None, "eos", 3)
    assert half.merged.reward == 0.0
    assert [pair.key for pair in changed_responses("math", base, merged, "sample", 2)] == ["down", "up"]


def test_the_summary_says_what_was_forgotten_and_what_is_left() -> None:
    made = contribution()
    sentences = summary_of(made.teachers, made.domains)
    assert sentences == (
        "the reverse KL to its teachers went from 1 to 0.12 nats per token, 88% of it is gone "
        "(most: expert on math 88%, least: expert on math 88%)",
        "forgotten: fewer correct responses than the base in chat (90% → 60%)",
        "more correct responses than the base in math (25% → 75%)",
        "75% of what is left to learn is expert on math: reverse KL 0.19 nats per token, pass rate 75%, "
        "the teacher's 88%",
        "responses are longer in math (100 → 250 tokens)",
        "responses are more often refusals in chat (1% → 20%)",
        "lost cannot be read: no such folder",
    )
    kept = summary_of((), made.domains[:2])
    assert kept[1] == "nothing was forgotten beyond noise in math and code"
