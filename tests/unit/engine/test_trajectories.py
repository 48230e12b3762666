"""The mask audit: logged trajectories through the whole path, against Hugging Face models and autograd.

Which positions are in the loss stands here as literals, independent of the code that finds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from enumeration import CPU, EOS, Reference, V, assert_equal, divergences, logprobs, trainer_of
from pydantic import TypeAdapter
from torch import Tensor

from mergeopd.batch.collate import PreparedUpdate
from mergeopd.batch.objective import phase_objective
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, Models, load_models
from mergeopd.engine.progress import Task
from mergeopd.engine.rollouts import dataset_rollout
from mergeopd.engine.samples import SampleTaker
from mergeopd.engine.score import CollectedRound
from mergeopd.engine.update import UpdateStats
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Event, RolloutSampled, UpdateDone
from mergeopd.reporting.jsonl import sample_record
from mergeopd.storage.run_folder import RunFolder
from mergeopd.teacher.token_view import SameTokens
from mergeopd.types import Rollout

TEACHERS = {"left": {"one": 1.0, "two": 0.5}, "right": {"two": 0.7}}
LOSS = {"reverse_kl": 1.0, "forward_kl": 0.5, "nll": 0.3}
# `d` asks for an answer; `c` after the end of a turn is the template's, like ChatML's line break.
TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %} d {{ m.content }} <eos> c"
    "{% else %} {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} d{% endif %}"
)
LOGGED = [
    {"role": "assistant", "content": "a c"},
    {"role": "tool", "content": "b a"},
    {"role": "assistant", "content": "d"},
]
#             a  c eos| c  b  a  d| d eos
LOGGED_IDS = (0, 2, 4, 2, 1, 0, 3, 3, 4)
OWN = (0, 1, 2, 7, 8)


def build_parts(
    write_job: Callable[..., Path], left: Sequence[object] = (LOGGED, "c d"), *overrides: str, **phase: object
) -> Models:
    """The house's job on dataset text; the answers of `left` are given, those of `right` are `c d`."""
    changes = {
        "name": "merge",
        "updates": 2,
        "prompts_per_round": 4,
        "text": "dataset",
        "loss": LOSS,
        **phase,
    }
    recipe = write_job({"phases": [changes]}, dtype="float64")
    config = recipe.parent / "base" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TURNS}))
    rows = [{"prompt": p, "answer": "c", "response": r} for p, r in zip(("a b", "c"), left, strict=True)]
    (recipe.parent / "left.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_models(preflight(recipe, overrides), Machine(CPU, SingleProcess()))


def dataset_rollouts(parts: Models) -> list[Rollout]:
    prompts = [p for name in sorted(parts.inputs.prompts) for p in parts.inputs.prompts[name]]
    return [dataset_rollout(Task(p, 0, "dataset"), parts.inputs.student) for p in prompts]


def update(
    parts: Models, rollouts: Sequence[Rollout]
) -> tuple[dict[str, Tensor], UpdateStats, PreparedUpdate, SampleTaker]:
    """One update's raw gradient, statistics, weights and samples."""
    phase, trainer, everything = parts.plan.phases[0], trainer_of(parts), range(len(rollouts))
    objective = phase_objective(phase, 0, has_policy=False)
    work = trainer.pipeline.work(rollouts, 0, 1)
    with trainer.scorer.score(CollectedRound(phase, 0, rollouts, [None] * len(rollouts), work)) as scored:
        prepared = trainer.updater.prepare(scored, work.updates[0], 0)
        samples = SampleTaker(everything, objective)
        packs = work.updates[0].packs[0]
        stats = trainer.updater.accumulate_gradients(
            objective, prepared, packs, scored.targets, samples, trainer.stages
        )
    gradient = {name: g.clone() for name, g in parts.student.gradients().items()}
    parts.student.optimizer_step(0.0)
    return gradient, stats, prepared, samples


class Trajectories(Reference):
    """The reference on some positions of an answer."""

    def __init__(self, parts: Models) -> None:
        super().__init__(parts)
        self.parts = parts

    def losses_at(
        self, rollout: Rollout, own: Sequence[int], unseen: dict[str, Sequence[int]] | None = None
    ) -> Tensor:
        """Losses at the positions `own` of the answer; `unseen` has those that a teacher skips."""
        answer, rows = rollout.response_ids, list(own)
        log_s = logprobs(self.student, rollout.prompt_ids, answer, 1.0)[rows]
        total = -LOSS["nll"] * log_s.gather(1, torch.tensor(answer)[rows, None])[:, 0]
        for name, weight in TEACHERS[rollout.prompt.domain].items():
            with torch.no_grad():
                prompt = self.parts.inputs.teachers[name].render(rollout.prompt)
                log_t = logprobs(self.teachers[name], prompt, answer, 1.0)[rows]
            seen = torch.tensor([row not in (unseen or {}).get(name, ()) for row in rows]).double()
            total = total + weight * seen * divergences(LOSS, log_s, log_t)
        return total


def own_positions(rollout: Rollout) -> Sequence[int]:
    return OWN if isinstance(rollout.prompt.response, tuple) else range(3)


def test_the_ids_and_flags_of_a_trajectory(write_job: Callable[..., Path]) -> None:
    first, text, *_ = dataset_rollouts(build_parts(write_job))
    assert (first.prompt_ids.tolist(), first.response_ids.tolist()) == ([0, 1, 3], list(LOGGED_IDS))
    assert first.trained is not None
    assert tuple(i for i, own in enumerate(first.trained) if own) == OWN
    assert (first.num_trained, first.trained_ids.tolist(), first.num_tokens) == (5, [0, 2, 4, 3, 4], 12)
    assert (text.response_ids.tolist(), text.trained, text.num_trained) == ([2, 3, 4], None, 3)


@pytest.mark.parametrize("reduce", ["token", "sequence"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 17, 100_000])
def test_the_gradient_is_that_of_the_assistants_tokens_alone(
    write_job: Callable[..., Path], reduce: str, micro_batch_tokens: int
) -> None:
    override = f"student.micro_batch_tokens={micro_batch_tokens}"
    parts = build_parts(write_job, (LOGGED, "c d"), override, reduce=reduce)
    rollouts, reference = dataset_rollouts(parts), Trajectories(parts)
    gradient, stats, _, _ = update(parts, rollouts)
    losses = [reference.losses_at(r, own_positions(r)) for r in rollouts]
    loss = torch.cat(losses).mean() if reduce == "token" else torch.stack([x.mean() for x in losses]).mean()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_equal(gradient, reference.gradient(loss))


def test_another_tool_text_of_the_same_length_is_read_but_not_learned(write_job: Callable[..., Path]) -> None:
    """Turns before it do not change, turns after it do, and its own tokens have no loss either way."""
    parts = build_parts(write_job)
    other = (*LOGGED_IDS[:4], 3, 2, *LOGGED_IDS[6:])
    first = dataset_rollouts(parts)[0]
    changed = replace(first, response_ids=other)
    reference = Trajectories(parts)
    trainer, both = trainer_of(parts), [first, changed]
    work = trainer.pipeline.work(both, 0, 1)
    with trainer.scorer.score(CollectedRound(parts.plan.phases[0], 0, both, [None] * 2, work)) as scored:
        before, after = (scored.targets.cache.gather("two", [i]) for i in (0, 1))
    assert before.shape == after.shape == (len(OWN), 32)
    assert torch.equal(before[:3], after[:3])
    assert not torch.isclose(before[3:], after[3:]).all(1).any()
    for rollout in (first, changed):
        gradient = update(parts, [rollout])[0]
        assert_equal(gradient, reference.gradient(reference.losses_at(rollout, OWN).mean()))


def test_labels_that_are_not_the_assistants_never_enter(write_job: Callable[..., Path]) -> None:
    """Where nothing is learned after them, other tokens there leave the gradient the same to the last bit."""
    parts = build_parts(write_job)
    first = dataset_rollouts(parts)[0]
    flags = (True, True, True, False, False)
    gradients = []
    for tail in ((2, 1), (0, 3)):
        rollout = replace(first, response_ids=(0, 2, EOS, *tail), trained=flags)
        gradients.append(update(parts, [rollout])[0])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    short = update(parts, [replace(first, response_ids=(0, 2, EOS), trained=None)])[0]
    assert_equal(gradients[0], short)


@pytest.mark.parametrize("end", [2, 8])
def test_removing_an_end_token_changes_the_loss(write_job: Callable[..., Path], end: int) -> None:
    parts = build_parts(write_job)
    first = dataset_rollouts(parts)[0]
    assert first.trained is not None
    ids = (*LOGGED_IDS[:end], *LOGGED_IDS[end + 1 :])
    without = replace(first, response_ids=ids, trained=(*first.trained[:end], *first.trained[end + 1 :]))
    unlearned = replace(first, trained=tuple(own and i != end for i, own in enumerate(first.trained)))
    losses = [update(parts, [rollout])[1].loss for rollout in (first, without, unlearned)]
    assert abs(losses[0] - losses[1]) > 1e-4
    assert abs(losses[0] - losses[2]) > 1e-4


def test_responses_without_a_trained_token_have_no_loss(write_job: Callable[..., Path]) -> None:
    parts = build_parts(write_job)
    rollouts = dataset_rollouts(parts)
    silent = replace(rollouts[0], trained=(False,) * len(LOGGED_IDS))
    with_silent = update(parts, [*rollouts, silent])[0]
    assert_equal(with_silent, update(parts, rollouts)[0])


def test_flags_fit_their_tokens(write_job: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="1 flags for 9 response tokens"):
        replace(dataset_rollouts(build_parts(write_job))[0], trained=(True,))


def test_a_teacher_that_ends_otherwise_skips_every_turns_end(write_job: Callable[..., Path]) -> None:
    parts = build_parts(write_job)
    two = replace(parts.inputs.teachers["two"], eos_ids=(3,))
    teachers = {**parts.inputs.teachers, "two": two}
    views = {**parts.views, "two": SameTokens(two, parts.inputs.student)}
    parts = replace(parts, inputs=replace(parts.inputs, teachers=teachers), views=views)
    rollout = dataset_rollouts(parts)[0]
    reference = Trajectories(parts)
    gradient, _, prepared, samples = update(parts, [rollout])
    assert prepared.rollouts[0].eos_masked == {"two": (2, 4)}
    loss = reference.losses_at(rollout, OWN, {"two": (2, 8)}).mean()
    assert_equal(gradient, reference.gradient(loss))
    [sample] = samples.events(1, "merge", [rollout], [None], parts.inputs.student.tokenizer)
    assert {name: trace.masked for name, trace in sample.teachers.items()} == {"one": (), "two": (2, 8)}


class Recorder:
    """Keeps samples and updates."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def test_a_run_reports_whole_trajectories_and_counts_trained_tokens(write_job: Callable[..., Path]) -> None:
    parts = build_parts(write_job)
    folder, recorder = RunFolder(Path(parts.plan.output)), Recorder()
    folder.claim(parts.plan, parts.inputs.files, parts.inputs.now, ())
    progress = parts.checkpoints().restore(folder.plan_hashes(), recorder).progress
    build(parts, reporter=recorder, clock=Clock(), interrupt=Interrupt()).run(progress, None)
    done = [event for event in recorder.events if isinstance(event, UpdateDone)]
    # Four prompts a round, one with a trajectory of 5 own tokens and three with texts of 3.
    assert [(event.num_tokens, event.domains["left"].mean_length) for event in done] == [(14, 4.0)] * 2
    assert [event.teachers["two"].num_tokens for event in done] == [14, 14]
    assert [event.teachers["one"].num_tokens for event in done] == [8, 8]
    samples = [e for e in recorder.events if isinstance(e, RolloutSampled) and e.trained is not None]
    assert len(samples) == 2
    for sample in samples:
        assert "".join(sample.tokens) == "a c <eos> c b a d d <eos>"
        rows = [sample.logprob_S, *(t.divergence for t in sample.teachers.values())]
        assert all(tuple(i for i, value in enumerate(row) if value is not None) == OWN for row in rows)
        assert TypeAdapter(RolloutSampled).validate_json(json.dumps(sample_record(sample))) == sample
    student = Reference(parts).student
    with torch.no_grad():
        logits = student(torch.tensor([[0, 1, 3, *LOGGED_IDS]])).logits[0, 2:-1, :V]
    expected = logits.log_softmax(-1)[range(9), LOGGED_IDS][list(OWN)].tolist()
    assert [samples[0].logprob_S[i] for i in OWN] == pytest.approx(expected, rel=1e-5)
