"""Whole runs over a five-token vocabulary: phases, texts, resume, what is written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergeopd.engine.build import build
from mergeopd.engine.checkpoint import restore
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.loop import Merge
from mergeopd.engine.preflight import preflight
from mergeopd.engine.run_folder import RunFolder
from mergeopd.ranks import Alone
from mergeopd.report.events import Event, UpdateDone
from mergeopd.report.jsonl import update_record

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


class Stop(BaseException):
    """The machine goes down."""


class Recorder:
    """Keeps the events; goes down after `stop_after` updates."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Event] = []
        self._stop_after = stop_after

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, UpdateDone) and event.update == self._stop_after:
            raise Stop

    @property
    def updates(self) -> list[UpdateDone]:
        return [e for e in self.events if isinstance(e, UpdateDone)]

    def records(self) -> list[dict[str, Any]]:
        """The metrics, timings aside."""
        return [{k: v for k, v in update_record(e).items() if k != "cost"} for e in self.updates]


def run(recipe: Path, *overrides: str, stop_after: int | None = None) -> tuple[Recorder, RunFolder]:
    inputs = preflight(recipe, overrides)
    recorder, folder = Recorder(stop_after), RunFolder(Path(inputs.plan.output))
    folder.claim(inputs.plan, inputs.files, inputs.now, ())
    parts = build(inputs, CPU, Alone())
    record = restore(folder.checkpoints, parts, folder.plan_hashes(), recorder)
    clock = Clock()
    clock.continue_from(record.seconds)
    with contextlib.suppress(Stop):
        Merge(parts, folder, recorder, clock, Interrupt()).run(record.progress, None)
    return recorder, folder


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


def test_phases_follow_each_other_and_say_what_they_did(recipe: Path) -> None:
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


def test_the_loss_falls_and_a_rate_of_zero_changes_nothing(recipe: Path) -> None:
    phase = 'phases=[{"name": "p", "updates": 40, "loss": "reverse_kl", "prompts_per_round": 16}]'
    learned, _ = run(recipe, phase, "output=learned", "checkpoint.every=40")
    losses = [u.loss for u in learned.updates]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    still, folder = run(recipe, phase.replace("40", "4"), "output=still", "optimizer.lr=0.0")
    assert still.updates[0].loss == learned.updates[0].loss
    base = load_file(recipe.parent / "base" / "model.safetensors")
    exported = load_file(folder.export / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in base.items())


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(recipe: Path) -> None:
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
        "balance": {"tokens": "equal", "follow_gap": 1.0, "teach": "wrong"},
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
        "correction": "sequence_mask",
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
    assert all(policy is not None and policy.behaviour_gap > 0.01 for policy in told)
    assert any(policy.corrected_fraction > 0 for policy in told if policy is not None)
    assert set(whole.updates[0].teachers["two"].divergence) == {"sampled_reverse_kl"}
    assert set(whole.updates[-1].teachers["two"].divergence) == {"reverse_kl"}


def test_uncorrected_policy_terms_on_tempered_answers_are_noted(write_job: Callable[..., Path]) -> None:
    phase = {"name": "p", "updates": 1, "loss": "sampled_reverse_kl"}
    recipe = write_job({"phases": [phase], "rollout": {"max_new_tokens": 6, "temperature": 0.7}})
    [note] = [n for n in preflight(recipe).notes if "policy terms" in n]
    assert "phase 'p'" in note
    assert "temperature 0.7" in note
    assert not [n for n in preflight(recipe, ["rollout.temperature=1.0"]).notes if "policy terms" in n]
    assert not [n for n in preflight(recipe, ["phases.0.correction=mask"]).notes if "policy terms" in n]


def test_teachers_that_no_phase_asks_are_noted(write_job: Callable[..., Path]) -> None:
    phase = {"name": "p", "updates": 1, "text": "dataset", "loss": "nll"}
    recipe = write_job({"phases": [phase]})
    assert [n for n in preflight(recipe).notes if "no phase asks a teacher" in n]
    assert not [n for n in preflight(recipe, ["phases.0.text=teacher"]).notes if "no phase asks" in n]
    assert not [n for n in preflight(recipe, ["phases.0.loss=forward_kl"]).notes if "no phase asks" in n]
