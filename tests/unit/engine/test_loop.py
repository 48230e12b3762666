"""Whole runs over a five-token vocabulary: phases, off-policy responses, resume, written files."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_runs import Recorder, run_recorded
from safetensors.torch import load_file

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.evaluate import Evaluation
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.progress import Progress
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.comparison import Measured
from mergeopd.reporting.events import Note, RolloutSampled
from mergeopd.reporting.jsonl import update_record
from mergeopd.storage.run_folder import RunFolder
from mergeopd.student.torch import TorchStudent

CPU = torch.device("cpu")
PHASES = [
    {
        "name": "warm",
        "text": "teacher",
        "updates": 3,
        "loss": {"forward_kl": 1.0, "nll": 0.1},
        "prompts_per_round": 6,
    },
    {
        "name": "mix",
        "text": {"on_policy_fraction": {"start": 0.0, "end": 1.0, "updates": 4}, "otherwise": "dataset"},
        "updates": 4,
        "updates_per_round": 2,
        "prompts_per_round": 6,
        "loss": {"reverse_kl": 1.0},
        "balance": {"tokens": "equal"},
    },
    {"name": "merge", "updates": 3, "loss": "reverse_kl", "prompts_per_round": 5, "reduce": "sequence"},
]


class MetricsRecorder(Recorder):
    def records(self) -> list[dict[str, Any]]:
        """Metrics of the updates without timings."""
        return [{k: v for k, v in update_record(e).items() if k != "cost"} for e in self.updates]


def run(recipe: Path, *overrides: str, stop_after: int | None = None) -> tuple[MetricsRecorder, RunFolder]:
    recorder = MetricsRecorder(stop_after)
    return recorder, run_recorded(recipe, CPU, *overrides, recorder=recorder)


@pytest.fixture
def recipe(write_job: Callable[..., Path]) -> Path:
    return write_job(
        {
            "phases": PHASES,
            "checkpoint": {"every": 1, "keep": 2},
            "rollout": {"max_new_tokens": 6, "samples_per_prompt": 2},
            "optimizer": {"lr": 0.01, "warmup_updates": 2, "schedule": "cosine"},
        }
    )


@pytest.mark.parametrize("stop_after", [3, 4, 9])
def test_a_run_that_went_down_ends_as_if_it_had_not(recipe: Path, stop_after: int) -> None:
    whole, straight = run(recipe, "output=straight")
    before, _ = run(recipe, "output=broken", stop_after=stop_after)
    after, resumed = run(recipe, "output=broken")
    first = after.updates[0].update
    # A round is repeated as a whole: what it had done since the last checkpoint is done again.
    assert stop_after - 1 <= first <= stop_after
    assert before.records()[: first - 1] + after.records() == whole.records()
    expected = load_file(straight.export / "model.safetensors")
    found = load_file(resumed.export / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_training_is_freed_before_the_evaluation(
    write_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimizer state and followed weights would lie beside each model that is measured."""
    recipe = write_job(
        {
            "teachers": {"self": {"student": {"ema": 0.9}}, "two": "two.yaml"},
            "prompts": [
                {"source": "left.jsonl", "domain": "left", "teachers": {"self": 1.0, "two": 0.5}},
                {"source": "right.jsonl", "domain": "right", "teachers": "two"},
            ],
            "evaluation": {
                "prompts": [
                    {"source": "held_out.jsonl", "domain": "right", "verifier": "exact", "expert": "two"}
                ]
            },
        }
    )
    (recipe.parent / "held_out.jsonl").write_text('{"prompt": "c c", "answer": "c"}')
    inputs = preflight(recipe)
    recorder, folder = Recorder(), RunFolder(Path(inputs.plan.output))
    folder.claim(inputs.plan, inputs.files, inputs.now, ())
    parts = load_models(inputs, Machine(CPU, SingleProcess()))
    assert isinstance(parts.student, TorchStudent)
    [snapshot] = parts.snapshots.snapshots.values()
    held = [weakref.ref(t) for t in (*snapshot.tensors.values(), *parts.student._weights.masters.values())]
    held += [weakref.ref(parts.student._adamw)]
    alive: list[int] = []

    measure = Evaluation.run

    def measured(evaluation: Evaluation, merged: Path, responses: Path | None) -> Measured:
        alive.append(sum(ref() is not None for ref in held))
        return measure(evaluation, merged, responses)

    monkeypatch.setattr(Evaluation, "run", measured)
    build(parts, reporter=recorder, clock=Clock(), interrupt=Interrupt()).run(Progress(), None)
    assert len(held) > 20
    assert alive == [0]
    assert folder.result_file.is_file()


def test_phases_follow_each_other_and_report_their_updates(recipe: Path) -> None:
    recorder, folder = run(recipe)
    assert [u.update for u in recorder.updates] == list(range(1, 11))
    assert [u.phase for u in recorder.updates] == ["warm"] * 3 + ["mix"] * 4 + ["merge"] * 3
    assert [u.round for u in recorder.updates] == [0, 1, 2, 3, 3, 4, 4, 5, 6, 7]
    assert {u.on_policy_fraction for u in recorder.updates if u.phase == "warm"} == {0.0}
    assert {u.on_policy_fraction for u in recorder.updates if u.phase == "merge"} == {1.0}
    last = recorder.updates[-1]
    assert set(last.teachers) == {"one", "two"}
    assert set(last.domains) == {"left", "right"}
    assert sum(d.token_share for d in last.domains.values()) == pytest.approx(1.0)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-10", "step-9"]
    assert json.loads((folder.checkpoints / "step-10" / "state.json").read_text())["progress"] == {
        "update": 10,
        "round": 8,
        "drawn": 3 * 6 + 2 * 6 + 3 * 5,
    }


def test_a_round_reads_every_teacher_once(recipe: Path) -> None:
    """Untied teacher `two`: body in its turn, head at the update: the whole file, once a round."""
    two = ['teachers={"two": "two.yaml"}', "prompts.0.teachers=two"]
    phase = 'phases=[{"name": "p", "updates": 3, "loss": "reverse_kl", "prompts_per_round": 4}]'
    recorder, _ = run(recipe, *two, phase)
    size = (recipe.parent / "two" / "model.safetensors").stat().st_size
    assert [u.teacher_bytes_read for u in recorder.updates] == [size, 2 * size, 3 * size]


def test_likelihood_alone_loads_no_teacher(recipe: Path) -> None:
    recorder, _ = run(recipe, 'phases=[{"name": "p", "text": "dataset", "updates": 2, "loss": "nll"}]')
    assert all(u.teacher_bytes_read == 0 and not u.teachers for u in recorder.updates)
    losses = [u.loss for u in recorder.updates]
    assert losses[1] < losses[0]


def test_the_loss_falls_but_not_with_a_learning_rate_of_zero(recipe: Path) -> None:
    phase = 'phases=[{"name": "p", "updates": 40, "loss": "reverse_kl", "prompts_per_round": 16}]'
    learned, _ = run(recipe, phase, "output=learned", "checkpoint.every=40")
    losses = [u.loss for u in learned.updates]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    still, folder = run(recipe, phase.replace("40", "4"), "output=still", "optimizer.lr=0.0")
    assert still.updates[0].loss == learned.updates[0].loss
    base = load_file(recipe.parent / "base" / "model.safetensors")
    exported = load_file(folder.export / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in base.items())


def test_a_student_that_is_its_own_teacher_has_no_gradient(recipe: Path) -> None:
    (recipe.parent / "two.yaml").write_text('{"card": 1, "name": "self", "model": "base"}')
    overrides = ['teachers={"two": "two.yaml"}', "prompts.0.teachers=two", "optimizer.clip_grad=null"]
    recorder, _ = run(recipe, *overrides, "optimizer.lr=0.0")
    for update in recorder.updates[3:]:  # the first phase has a likelihood term
        assert abs(update.loss) <= 1e-6
        assert update.grad_norm <= 1e-6


def test_where_the_stop_tokens_differ_it_counts_for_the_student_alone(recipe: Path) -> None:
    """`two` ends its answers with token 3: the student's token 4 is no news to it, and no fault."""
    config = recipe.parent / "two" / "generation_config.json"
    two = ['teachers={"two": "two.yaml"}', "prompts.0.teachers=two", "optimizer.warmup_updates=0"]
    phase = 'phases=[{"name": "p", "text": "dataset", "updates": 1, "loss": "reverse_kl", "prompts_per_round": 1}]'
    config.write_text(json.dumps({"eos_token_id": 3}))
    masked, _ = run(recipe, *two, phase, "output=masked")
    config.write_text(json.dumps({"eos_token_id": 4}))
    counted, _ = run(recipe, *two, phase, "output=counted")
    # Same answer "c d <eos>" in both: three tokens, the same mean divergence, but one token less in the loss.
    assert masked.updates[0].num_tokens == counted.updates[0].num_tokens == 3
    assert masked.updates[0].loss < counted.updates[0].loss


POLICY_PHASES = [
    {
        "name": "sampled",
        "updates": 4,
        "updates_per_round": 2,
        "prompts_per_round": 4,
        "loss": {
            "sampled_reverse_kl": {"weight": {"start": 1.0, "end": 0.2, "updates": 3}},
            "outcome": {"weight": 0.5, "std": "none"},
        },
        "balance": {"tokens": "equal", "follow_gap": 1.0, "distill_on": "wrong"},
        "correction": {"kind": "mask", "low": 0.5, "high": 2.0},
    },
    {
        "name": "top",
        "updates": 4,
        "updates_per_round": 2,
        "prompts_per_round": 4,
        "loss": {
            "reverse_kl": 1.0,
            "outcome": 0.5,
            "support": {"top_k": 2, "of": "teacher", "rest": "tail"},
        },
        "correction": "truncate",
    },
]


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_policy_terms_and_reduced_teachers_go_on_bit_for_bit(
    write_job: Callable[..., Path], stop_after: int
) -> None:
    """Their look back, ramps and groups depend on position alone; a top-k teacher needs no head in updates."""
    recipe = write_job(
        {
            "phases": POLICY_PHASES,
            "checkpoint": {"every": 1, "keep": 2},
            "rollout": {"max_new_tokens": 6, "samples_per_prompt": 3, "temperature": 1.3, "top_p": 0.95},
            "optimizer": {"lr": 0.01},
        }
    )
    verifiers = [f'prompts.{i}.verifier={{"kind": "regex", "pattern": "a"}}' for i in (0, 1)]
    whole, straight = run(recipe, "output=straight", *verifiers)
    before, _ = run(recipe, "output=broken", *verifiers, stop_after=stop_after)
    after, resumed = run(recipe, "output=broken", *verifiers)
    first = after.updates[0].update
    assert before.records()[: first - 1] + after.records() == whole.records()
    expected = load_file(straight.export / "model.safetensors")
    found = load_file(resumed.export / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    told = [update.policy for update in whole.updates]
    assert all(policy is not None and policy.rollout_logprob_gap > 0.01 for policy in told)
    assert any(policy.corrected_fraction > 0 for policy in told if policy is not None)
    assert set(whole.updates[0].teachers["two"].divergence) == {"sampled_reverse_kl"}
    assert set(whole.updates[-1].teachers["two"].divergence) == {"reverse_kl"}


CODE = """
def score(answer, reference):
    if "a" in answer:
        raise KeyError("a")
    return float("b" in answer) if "c" in answer else float("nan")
"""


def test_failures_of_a_verifier_are_counted(
    write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_of_test_loop.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    name = "reward_of_test_loop:score"
    phase = {"name": "p", "updates": 2, "loss": {"reverse_kl": 1.0, "outcome": 0.5}, "prompts_per_round": 6}
    rollout = {"max_new_tokens": 6, "samples_per_prompt": 3}
    recipe = write_job({"phases": [phase], "rollout": rollout, "allow_code": [name]})
    verifiers = [f'prompts.{i}.verifier={{"kind": "user", "function": "{name}"}}' for i in (0, 1)]
    recorder, folder = run(recipe, "output=run", *verifiers)
    assert folder.export.exists()
    assert len(recorder.updates) == 2
    for update in recorder.updates:
        samples = [e for e in recorder.events if isinstance(e, RolloutSampled) and e.update == update.update]
        for sample in samples:
            text = "".join(sample.tokens)
            reward = None if "a" in text or "c" not in text else float("b" in text)
            assert sample.reward == reward
        assert sum(update.verifier_failures.values()) >= sum(sample.reward is None for sample in samples) > 0
    notes = [e.text for e in recorder.events if isinstance(e, Note) and "could not be graded" in e.text]
    assert len(notes) == 2
    assert all("raised KeyError: 'a'" in note or "returned nan" in note for note in notes)


def test_uncorrected_policy_terms_on_tempered_responses_are_noted(write_job: Callable[..., Path]) -> None:
    phase = {"name": "p", "updates": 1, "loss": "sampled_reverse_kl"}
    recipe = write_job({"phases": [phase], "rollout": {"max_new_tokens": 6, "temperature": 0.7}})
    [note] = [n for n in preflight(recipe).notes if "policy terms" in n]
    assert "phase 'p'" in note
    assert "temperature 0.7" in note
    assert not [n for n in preflight(recipe, ["rollout.temperature=1.0"]).notes if "policy terms" in n]
    assert not [n for n in preflight(recipe, ["phases.0.correction=truncate"]).notes if "phase 'p'" in n]
    [note] = [n for n in preflight(recipe, ["phases.0.correction=mask"]).notes if "phase 'p'" in n]
    assert "masks tokens by their ratio" in note


def test_teachers_that_no_phase_uses_are_noted(write_job: Callable[..., Path]) -> None:
    phase = {"name": "p", "updates": 1, "text": "dataset", "loss": "nll"}
    recipe = write_job({"phases": [phase]})
    assert [n for n in preflight(recipe).notes if "no phase uses a teacher" in n]
    assert not [n for n in preflight(recipe, ["phases.0.text=teacher"]).notes if "no phase asks" in n]
    assert not [n for n in preflight(recipe, ["phases.0.loss=forward_kl"]).notes if "no phase asks" in n]


def test_each_domains_share_of_the_loss_and_the_clipping_are_recorded(
    write_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_job(
        {
            "prompts": [
                {"source": "left.jsonl", "domain": "left", "teachers": "one"},
                {"source": "right.jsonl", "domain": "right", "teachers": "two"},
            ],
            "phases": [{"name": "merge", "updates": 2, "loss": "reverse_kl", "prompts_per_round": 4}],
            "optimizer": {"lr": 0.01, "clip_grad": 0.05},
        }
    )
    clip, seen = torch.nn.utils.clip_grads_with_norm_, []

    def watched(parameters: list[torch.Tensor], limit: float, norm: torch.Tensor) -> None:
        before = [p.grad.clone() for p in parameters]
        clip(parameters, limit, norm)
        seen.append(max(float((p.grad / b).nanmean()) for p, b in zip(parameters, before, strict=True)))

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", watched)
    recorder, _ = run(recipe)
    assert [u.clip_factor for u in recorder.updates] == pytest.approx(seen, rel=1e-4)
    assert all(0 < u.clip_factor < 1 for u in recorder.updates)
    for record in recorder.records():
        # Every domain has a teacher of its own, and all tokens weigh the same.
        loss = {
            domain: record["teachers"][name]["reverse_kl"] * record["teachers"][name]["num_tokens"]
            for domain, name in (("left", "one"), ("right", "two"))
        }
        found = {domain: row["loss_share"] for domain, row in record["domains"].items()}
        assert found == pytest.approx({d: value / sum(loss.values()) for d, value in loss.items()}, rel=1e-5)
    recorder, _ = run(recipe, "optimizer.clip_grad=null", "output=free")
    assert {u.clip_factor for u in recorder.updates} == {1.0}
