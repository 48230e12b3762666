"""Signals of teachers: aggregation against plain means, and a whole inspection against transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from byte_jobs import write_byte_job
from rich.console import Console
from transformers import AutoModelForCausalLM

from mergeopd.inspection.budget import DomainSample, domain_budgets, unknown_gaps
from mergeopd.inspection.measure import OwnResponses
from mergeopd.inspection.run import inspect_recipe
from mergeopd.inspection.sample import shared_out
from mergeopd.inspection.signal import Graded, Measured, Scored, entropy_onset, signal_of, token_mean
from mergeopd.recipe.resolve import read
from mergeopd.reporting.inspection import Inspection, read_inspection, write_inspection
from mergeopd.teacher.protocol import TeacherCapabilities


def scored(prompt: int, **values: Sequence[float]) -> Scored:
    arrays = {name: np.array(each, np.float64) for name, each in values.items()}
    return Scored(prompt, np.arange(len(next(iter(arrays.values())))), arrays)


def inspect(
    recipe: Path, *overrides: str, teachers: Sequence[str] = (), prompts: int | None = None
) -> Inspection:
    return inspect_recipe(recipe, overrides, teachers=teachers, prompts=prompts, console=Console(quiet=True))


def test_means_are_over_the_tokens_where_a_figure_is_defined() -> None:
    responses = [scored(0, x=[1, math.nan, 3]), scored(0, x=[5]), scored(1, x=[math.nan]), scored(2, y=[7])]
    mean = token_mean(responses, "x")
    assert mean.value == pytest.approx(3.0)
    assert mean.low is None  # one prompt has no interval
    assert token_mean(responses, "z").value is None


def test_intervals_cover_the_mean_at_the_stated_rate() -> None:
    """Prompts differ in their means and lengths, and tokens of a prompt share its mean."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        levels, sizes = random.normal(1.0, 0.5, 12), random.integers(5, 60, 12)
        responses = [
            scored(i, x=level + random.normal(0, 0.2, size))
            for i, (level, size) in enumerate(zip(levels, sizes, strict=True))
        ]
        mean = token_mean(responses, "x")
        hits += mean.low <= 1.0 <= mean.high
    assert 0.91 <= hits / 400 <= 0.98


def test_signal_counts_rewards_frontier_positions_and_ends() -> None:
    rewards = {0: (1.0, 1.0), 1: (0.0, 1.0), 2: (0.0, 0.0), 3: (None, None)}
    graded_S = [Graded(p, r, 3, False) for p, both in rewards.items() for r in both]
    graded_T = [Graded(p, 1.0, 3, p == 1) for p in rewards]
    on_student = [scored(p, reverse_kl=[4.0, 1.0, 1.0], overlap=[0.5] * 3) for p in rewards]
    on_own = [scored(p, entropy_T=[0.2] * 6) for p in rewards]
    ends = [(0, True), (1, False), (2, True), (3, True)]
    measured = Measured(16, 100, on_student, on_own, graded_S, graded_T, ends)
    signal = signal_of(measured, range(4))
    assert signal.pass_rate_S.value == pytest.approx(0.5)  # of the three prompts with a reward
    assert signal.pass_gain.value == pytest.approx(0.5)
    assert signal.num_frontier == 1
    assert (signal.reverse_kl.value, signal.first_token_kl.value) == (2.0, 4.0)
    assert (signal.foreign_ends, signal.truncated_T) == (0.75, 0.25)
    assert signal.max_entropy == pytest.approx(math.log(100))
    assert [(b.start, b.stop, b.num_tokens, b.reverse_kl, b.own_entropy_T) for b in signal.positions] == [
        (0, 1, 4, 4.0, pytest.approx(0.2)),
        (1, 2, 4, 1.0, pytest.approx(0.2)),
        (2, 4, 4, 1.0, pytest.approx(0.2)),
        (4, 8, 0, None, pytest.approx(0.2)),
    ]
    part = signal_of(measured, [1])
    assert (part.num_prompts, part.num_responses, part.foreign_ends) == (1, 2, 0.0)


@pytest.mark.parametrize("onset", [3, 17])
def test_the_onset_of_noise_is_the_token_from_which_entropy_rises(onset: int) -> None:
    random = np.random.default_rng(onset)
    # Short responses are of another kind, with a high entropy: they say nothing about depth.
    short = [scored(p, entropy_T=random.normal(2.0, 0.1, 2)) for p in range(6)]
    long = [
        scored(
            6 + p, entropy_T=np.concatenate([random.normal(0.1, 0.05, onset), random.normal(1.5, 0.4, 20)])
        )
        for p in range(6)
    ]
    measured = entropy_onset([*short, *long])
    assert measured is not None
    assert measured.start == onset
    assert measured.before == pytest.approx(0.1, abs=0.05)
    assert measured.after == pytest.approx(1.5, abs=0.2)
    assert entropy_onset(long[:3]) is None  # too few prompts


def test_a_sample_is_shared_out_in_equal_parts() -> None:
    assert shared_out({"a": 100, "b": 2, "c": 100}, 21) == {"a": 10, "b": 2, "c": 9}
    assert shared_out({"a": 5, "b": 5}, 1) == {"a": 1, "b": 1}
    assert shared_out({"a": 2}, 64) == {"a": 2}


@pytest.mark.parametrize(
    ("balance", "reduce", "expected"),
    [
        ("off", "token", (0.75, 0.25)),
        ("equal", "token", (0.5, 0.5)),
        ("off", "sequence", (0.5, 0.5)),
        ({"left": 1.0, "right": 3.0}, "token", (0.25, 0.75)),
    ],
)
def test_budgets_follow_lengths_and_balance(
    write_job: Callable[..., Path], balance: object, reduce: str, expected: tuple[float, float]
) -> None:
    phase = {"name": "merge", "updates": 2, "loss": "reverse_kl", "prompts_per_round": 4}
    recipe = write_job({"phases": [{**phase, "reduce": reduce, "balance": {"tokens": balance}}]})
    plan = read(recipe, ()).plan
    samples = {"left": DomainSample(30.0, ()), "right": DomainSample(10.0, ())}
    left, right = domain_budgets(plan, samples)
    assert (left.share, right.share) == (0.5, 0.5)
    assert (left.token_share, right.token_share) == (0.75, 0.25)
    assert (left.balanced_share, right.balanced_share) == pytest.approx(expected)
    assert (left.num_prompts, right.num_prompts) == (4, 4)
    assert domain_budgets(plan, {"left": samples["left"]}) == ()
    assert unknown_gaps(plan, samples) == ()


def test_budgets_follow_gaps_or_say_which_are_unknown(write_job: Callable[..., Path]) -> None:
    phase = {"name": "merge", "updates": 2, "loss": "reverse_kl", "prompts_per_round": 4}
    balance = {"tokens": "equal", "follow_gap": 1.0}
    plan = read(write_job({"phases": [{**phase, "balance": balance}]}), ()).plan
    known = {"left": DomainSample(30.0, (), 0.2), "right": DomainSample(10.0, (), 0.1)}
    left, right = domain_budgets(plan, known)
    assert left.balanced_share > right.balanced_share
    assert unknown_gaps(plan, known) == ()
    samples = known | {"right": DomainSample(10.0, ())}
    left, right = domain_budgets(plan, samples)
    assert (left.balanced_share, right.balanced_share) == (0.5, 0.5)
    [note] = unknown_gaps(plan, samples)
    assert note.endswith("'merge' leave out `follow_gap`: no gap is known of 'right'")


@pytest.fixture
def job(write_job: Callable[..., Path]) -> Path:
    """Two teachers of `left`, one of `right`; the evaluation's verifier grades the training prompts, too."""
    return write_job(
        {
            "evaluation": {
                "prompts": [{"source": "eval.jsonl", "domain": "left", "verifier": "exact", "expert": "one"}]
            },
            "inspect": {"samples": 2, "top_k": 2},
        },
        dtype="float64",
    )


def write_eval(recipe: Path) -> None:
    rows = [{"prompt": "d", "answer": "c"}]
    (recipe.parent / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_an_inspection_agrees_with_transformers(job: Path) -> None:
    write_eval(job)
    inspection = inspect(job)
    assert [teacher.name for teacher in inspection.teachers] == ["one", "two"]
    one, two = inspection.teachers
    assert one.signal.num_prompts == 2
    assert set(two.by_domain) == {"left", "right"}
    assert one.signal.pass_rate_S.value is not None
    assert two.by_domain["right"].pass_rate_S.value is None  # no verifier
    [conflict] = inspection.conflicts
    assert (conflict.first, conflict.second) == ("one", "two")
    assert -1.0 <= conflict.cosine.value <= 1.0
    assert conflict.floor.value > 0.0
    assert [budget.domain for budget in inspection.domains] == ["left", "right"]

    # The shown responses are all to different prompts; their KLs follow from the folders alone.
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job.parent / name, dtype=torch.float64)
        for name in ("base", "two")
    )
    ids = {word: i for i, word in enumerate(("a", "b", "c", "d", "<eos>"))}
    for response in two.responses:
        prompt = [ids[word] for word in response.prompt.split()]
        answer = [ids[token.text.strip()] for token in response.tokens]
        with torch.no_grad():
            log_p, log_q = (
                model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, :5].log_softmax(-1)
                for model in (student, teacher)
            )
        kls = (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        assert [token.reverse_kl for token in response.tokens] == pytest.approx(kls, rel=1e-5)
        best = [ids[token.candidates_T[0].text.strip()] for token in response.tokens]
        assert best == log_q.argmax(-1).tolist()
    assert len({response.prompt for response in two.responses}) == 4


def test_an_inspection_is_repeatable_and_is_written_and_read(job: Path, tmp_path: Path) -> None:
    write_eval(job)
    first, second = inspect(job, teachers=["two"]), inspect(job, teachers=["two"])
    assert first.teachers == second.teachers
    assert [teacher.name for teacher in first.teachers] == ["two"]
    write_inspection(first, tmp_path / "inspect.json")
    assert read_inspection(tmp_path / "inspect.json") == first


def test_the_student_as_its_own_teacher_has_nothing_new(job: Path) -> None:
    write_eval(job)
    document = json.loads(job.read_text())
    document["teachers"]["one"] = {"student": {"ema": 0.9}}
    job.write_text(json.dumps(document))
    [one] = inspect(job, teachers=["one"]).teachers
    assert one.signal.overlap.value == 1.0
    assert one.signal.overlap_advantage.value == pytest.approx(0.0, abs=1e-12)
    assert one.signal.entropy_gap.value == pytest.approx(0.0, abs=1e-12)
    assert one.signal.teacher_logprob_gap.value == pytest.approx(0.0, abs=1e-9)
    assert one.verdict.kind == "nothing_new"


def test_end_tokens_that_the_teacher_does_not_use_are_in_no_figure(write_job: Callable[..., Path]) -> None:
    recipe = write_job({"inspect": {"samples": 4}}, end_tokens=["d"])
    [teacher] = inspect(recipe, teachers=["two"]).teachers
    signal = teacher.signal
    assert signal.foreign_ends == 1.0
    shown = [token for response in teacher.responses for token in response.tokens]
    assert {token.text.strip() for token in shown if token.reverse_kl is None} == {"d"}
    assert signal.truncated_S < 1.0
    assert teacher.verdict.kind == "template_mismatch"


def test_a_teacher_that_cannot_be_measured_does_not_stop_the_others(job: Path) -> None:
    write_eval(job)
    canary = {"prompt": "a", "response": "b c", "logprobs": [-40.0, -40.0]}
    (job.parent / "one.yaml").write_text(
        json.dumps({"card": 1, "name": "one", "model": "one", "canary": canary})
    )
    one, two = inspect(job).teachers
    assert one.verdict.kind == "wrong_teacher"
    assert "is not the model its card describes" in one.verdict.sentence
    assert one.signal is None
    assert two.signal is not None


def test_a_teacher_uses_the_end_tokens_that_it_writes() -> None:
    """Not one by chance, in one of forty responses; the last token of a response without an end is none."""
    written = [([5, 7], "eos")] * 30 + [([8], "eos")] * 9 + [([5, 9], "eos")] + [([6, 6], "length")] * 20
    graded: list[Any] = [
        SimpleNamespace(response=SimpleNamespace(completion=SimpleNamespace(response_ids=ids, finish=finish)))
        for ids, finish in written
    ]
    assert OwnResponses(graded, {}).end_ids() == {7, 8}
    assert OwnResponses(graded[40:], {}).end_ids() == frozenset()


def test_a_teacher_without_distributions_is_compared_at_sampled_tokens(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_eval(job)
    [whole] = inspect(job, teachers=["two"]).teachers
    only_sampled = TeacherCapabilities(frozenset(["sampled"]), can_generate=False)
    monkeypatch.setattr("mergeopd.engine.models.capabilities", lambda _: only_sampled)
    [part] = inspect(job, teachers=["two"]).teachers
    assert part.signal.logprob_gap.value == pytest.approx(whole.signal.logprob_gap.value)
    assert part.signal.entropy_T.value == pytest.approx(whole.signal.entropy_T.value)
    assert part.signal.reverse_kl.value is None
    assert part.signal.pass_rate_T.value is None
    assert part.verdict.kind == "unknown"
    assert len(part.signal.notes) == 2


def test_spans_of_one_token_are_tokens(tmp_path: Path) -> None:
    """A bridge to a teacher with the student's own tokens gives the differences that no bridge gives."""

    def advantages(bridge: str | None) -> dict[tuple[str, int], float | None]:
        card = {"card": "other.yaml", "dtype": "float64"} | ({} if bridge is None else {"bridge": bridge})
        phases = [{"name": "m", "updates": 1, "prompts_per_round": 3, "loss": {"sampled_reverse_kl": 1.0}}]
        recipe = {"teachers": {"other": card}, "phases": phases, "inspect": {"responses": 3}}
        path = write_byte_job(tmp_path / str(bridge), recipe, merges=[("a", "b")], turned=False)
        [teacher] = inspect(path).teachers
        return {
            (response.prompt, i): token.advantage
            for response in teacher.responses
            for i, token in enumerate(response.tokens)
        }

    plain, bridged = advantages(None), advantages("span")
    known = {place: value for place, value in bridged.items() if value is not None}
    assert 0 < len(known) < len(bridged)  # bytes that are no text have no span
    assert known == pytest.approx({place: plain[place] for place in known}, rel=1e-5)
