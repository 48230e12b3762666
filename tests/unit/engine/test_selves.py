"""Self-teachers: exact gradients, snapshots and resume."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from enumeration import engine_round, teacher_rollouts_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build, build_evaluation
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, Models, load_models
from mergeopd.engine.progress import Task
from mergeopd.engine.stages import Stages
from mergeopd.errors import RecipeError
from mergeopd.preflight.inputs import advice, preflight
from mergeopd.recipe.models import SnapshotRule
from mergeopd.reporting.events import Event, UpdateDone
from mergeopd.reporting.jsonl import update_record
from mergeopd.rollout.local import generate
from mergeopd.storage.run_folder import RunFolder
from mergeopd.teacher.protocol import TargetSpec, TeacherSequence
from mergeopd.types import Rollout

CPU = torch.device("cpu")
V, EOS = 5, 4
ANSWERS = [(EOS,), *product(range(V - 1), range(V))]
ALL_MESSAGES = "{% for m in messages %}{{ m.content }} {% endfor %}"
WORDS = {"a": 0, "b": 1, "c": 2, "d": 3}


@pytest.fixture
def write_selves(write_job: Callable[..., Path]) -> Callable[..., Path]:
    """A job whose student is its own only teacher, as `teacher` says; rows have a field `note`."""

    def write(
        teacher: Mapping[str, Any],
        recipe: Mapping[str, Any] = {},
        *,
        more: Mapping[str, Any] = {},
        **student: Any,
    ) -> Path:
        teachers = {"self": teacher, **more}
        prompts = [
            {"source": f"{name}.jsonl", "domain": name, "teachers": dict.fromkeys(teachers, 1.0)}
            for name in ("left", "right")
        ]
        path = write_job({"teachers": teachers, "prompts": prompts, **recipe}, **student)
        config = path.parent / "base" / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": ALL_MESSAGES}))
        for name in ("left", "right"):
            file = path.parent / f"{name}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text("\n".join(json.dumps({**row, "note": "d a"}) for row in rows))
        return path

    return write


def gradient(parts: Models, rollouts: Sequence[Rollout]) -> tuple[dict[str, Tensor], float]:
    """The raw gradient and the loss of one update on all rollouts, through the engine."""
    [(found, stats)] = engine_round(parts, rollouts)
    return found, stats.loss


def all_answers(parts: Models) -> list[Rollout]:
    render = parts.inputs.student.render
    return [
        Rollout(p, i, render(p), answer, "student", "eos" if answer[-1] == EOS else "length")
        for name in sorted(parts.inputs.prompts)
        for p in parts.inputs.prompts[name]
        for i, answer in enumerate(ANSWERS)
    ]


def ids(text: str) -> tuple[int, ...]:
    return tuple(WORDS[word] for word in text.split())


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize(
    ("teacher", "seen"),
    [
        ({"prompt": "b {{ prompt }} a {{ reference }} {{ note }}"}, "b {} a c d a"),  # OPSD
        ({"system": "d c b a d"}, "d c b a d {}"),  # OPCD
        ({"system": "d d", "prompt": "{{ note }} {{ prompt }}", "weight": 0.7}, "d d d a {}"),
    ],
)
def test_the_gradient_is_autograds_on_a_model_that_reads_the_other_prompt(
    write_selves: Callable[..., Path], teacher: dict[str, Any], seen: str, loss: str
) -> None:
    phase = {"name": "p", "updates": 1, "prompts_per_round": 4, "loss": loss}
    recipe = write_selves({"student": "start", **teacher}, {"phases": [phase]}, dtype="float64")
    parts = load_models(preflight(recipe), Machine(CPU, SingleProcess()))
    rollouts = all_answers(parts)
    found, _ = gradient(parts, rollouts)

    student, frozen = (
        AutoModelForCausalLM.from_pretrained(parts.plan.student.model, dtype=torch.float64).eval()
        for _ in range(2)
    )
    total = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts:
        own, answer = ids(rollout.prompt.messages[0].content), rollout.response_ids.tolist()
        other = ids(seen.format(rollout.prompt.messages[0].content))
        assert tuple(rollout.prompt_ids.tolist()) == own
        log_s = student(torch.tensor([[*own, *answer]])).logits[0, len(own) - 1 : -1, :V].log_softmax(-1)
        with torch.no_grad():
            logits = frozen(torch.tensor([[*other, *answer]])).logits
            log_t = logits[0, len(other) - 1 : -1, :V].log_softmax(-1)
        p, d = (log_s, log_s - log_t) if loss == "reverse_kl" else (log_t, log_t - log_s)
        total = total + teacher.get("weight", 1.0) * (p.exp() * d).sum()
    names, parameters = zip(*student.named_parameters(), strict=True)
    expected = torch.autograd.grad(total / sum(len(r.response_ids) for r in rollouts), parameters)
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-3
    for name, g in zip(names, expected, strict=True):
        assert float((found[name] - g).abs().max()) <= 1e-12 * scale, name


@pytest.mark.parametrize("teacher", [{}, {"prompt": "{{ prompt }}"}])
def test_at_the_start_without_more_to_see_loss_and_gradient_are_zero(
    write_selves: Callable[..., Path], teacher: dict[str, Any]
) -> None:
    """The likelihood term, without which the recipe is refused, is for the other answers."""
    text = {"on_policy_fraction": 0.5, "otherwise": "dataset"}
    phase = {"name": "p", "updates": 1, "text": text, "loss": {"reverse_kl": 1.0, "nll": 0.5}}
    recipe = write_selves({"student": "start", **teacher}, {"phases": [phase]}, dtype="float64")
    parts = load_models(preflight(recipe), Machine(CPU, SingleProcess()))
    found, loss = gradient(parts, all_answers(parts))
    assert abs(loss) <= 1e-14
    assert max(float(g.abs().max()) for g in found.values()) <= 1e-14


def test_weights_of_the_start_do_not_move_with_the_student(write_selves: Callable[..., Path]) -> None:
    """What the teacher says after an update is, bit for bit, what it said before."""
    recipe = write_selves({"student": "start", "system": "d c"}, dtype="float64")
    parts = load_models(preflight(recipe), Machine(CPU, SingleProcess()))
    rollouts = all_answers(parts)

    def says() -> Tensor:
        render = parts.inputs.teachers["self"].render
        sequences = [TeacherSequence(render(r.prompt), r.response_ids) for r in rollouts]
        with parts.teachers["self"].open() as session:
            states = dict(session.score(sequences, TargetSpec("hidden"), 1000))
        head = parts.teachers["self"].head(None)
        return torch.cat([states[i] for i in range(len(rollouts))]) @ head.weight.T

    before = says()
    old = {name: w.clone() for name, w in parts.student.weights()}
    engine_round(parts, rollouts, sgd_lr=0.1)
    assert any(not torch.equal(old[name], w) for name, w in parts.student.weights())
    assert torch.equal(says(), before)


class Stop(BaseException):
    """The machine goes down."""


class Recorder:
    """Keeps the updates and the student's weights after each; goes down after `stop_after` updates."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.updates: list[UpdateDone] = []
        self.weights: list[dict[str, Tensor]] = []
        self.parts: Models | None = None
        self._stop_after = stop_after

    def emit(self, event: Event) -> None:
        if isinstance(event, UpdateDone):
            assert self.parts is not None
            self.updates.append(event)
            self.weights.append({n: w.clone() for n, w in self.parts.student.weights()})
            if event.update == self._stop_after:
                raise Stop

    def records(self) -> list[dict[str, Any]]:
        """The metrics, timings aside."""
        return [{k: v for k, v in update_record(u).items() if k != "cost"} for u in self.updates]


def run(recipe: Path, *overrides: str, stop_after: int | None = None) -> tuple[Recorder, Models, RunFolder]:
    inputs = preflight(recipe, overrides)
    folder, recorder = RunFolder(Path(inputs.plan.output)), Recorder(stop_after)
    folder.claim(inputs.plan, inputs.files, inputs.now, ())
    parts = recorder.parts = load_models(inputs, Machine(CPU, SingleProcess()))
    record = parts.checkpoints().restore(folder.plan_hashes(), recorder)
    with contextlib.suppress(Stop):
        build(parts, reporter=recorder, clock=Clock(), interrupt=Interrupt()).run(record.progress, None)
    return recorder, parts, folder


ROUNDS_OF_TWO = {
    "name": "p",
    "updates": 6,
    "updates_per_round": 2,
    "prompts_per_round": 4,
    "loss": "reverse_kl",
}


@pytest.mark.parametrize("student", [{}, {"dtype": "bfloat16"}])
def test_copies_are_the_students_weights_at_the_start_of_the_round_that_reached_the_multiple(
    write_selves: Callable[..., Path], student: dict[str, str]
) -> None:
    recipe = write_selves(
        {"student": {"every": 3}, "system": "d c"},
        {"phases": [ROUNDS_OF_TWO], "checkpoint": {"every": 2, "keep": 9}, "optimizer": {"lr": 0.01}},
        **student,
    )
    recorder, parts, folder = run(recipe)
    held = [load_file(folder.checkpoints / f"step-{n}" / "past-1-of-1.safetensors") for n in (2, 4, 6)]
    base = load_file(recipe.parent / "base" / "model.safetensors")
    dtype = next(parts.student.weights())[1].dtype
    # Rounds end after updates 2, 4 and 6: 3 is reached in the second, 6 in the third.
    for tensors, source in zip(held, (base, recorder.weights[3], recorder.weights[5]), strict=True):
        assert tensors.keys() == {f"every-3/{name}" for name in dict(parts.student.weights())}
        assert all(torch.equal(t, source[n.removeprefix("every-3/")].to(dtype)) for n, t in tensors.items())


def test_an_average_over_three_rounds_has_its_closed_form(write_selves: Callable[..., Path]) -> None:
    recipe = write_selves(
        {"student": {"ema": 0.8}, "system": "d c"},
        {"phases": [ROUNDS_OF_TWO], "optimizer": {"lr": 0.01}},
        dtype="float64",
    )
    recorder, parts, _ = run(recipe)
    base = load_file(recipe.parent / "base" / "model.safetensors")
    rounds = [recorder.weights[i] for i in (1, 3, 5)]
    [snapshot] = parts.snapshots.snapshots.values()
    moved = 0.0
    for name, found in snapshot.tensors.items():
        terms = [0.2 * 0.8 ** (2 - k) * w[name] for k, w in enumerate(rounds)]
        assert torch.allclose(found, 0.8**3 * base[name].double() + sum(terms), rtol=0, atol=1e-14), name
        moved = max(moved, float((found - base[name]).abs().max()))
    assert moved > 1e-3


def test_without_more_to_see_only_a_student_that_moves_has_something_to_learn(
    write_selves: Callable[..., Path],
) -> None:
    """The dataset's text moves it; the average pulls back from the second update on."""
    phase = {**ROUNDS_OF_TWO, "text": "dataset", "loss": {"reverse_kl": 1.0, "nll": 0.5}}
    recipe = write_selves(
        {"student": {"ema": 0.8}}, {"phases": [phase], "optimizer": {"lr": 0.01}}, dtype="float64"
    )
    recorder, _, _ = run(recipe)
    pulls = [u.teachers["self"].divergence["reverse_kl"] for u in recorder.updates]
    assert abs(pulls[0]) <= 1e-14
    assert min(pulls[1:]) > 1e-6


# Hidden states are kept for the one, log-probs for the other.
STOPS = [
    *(("forward_kl", update) for update in (1, 4, 6)),
    *(("sampled_reverse_kl", update) for update in (2, 5, 7)),
]


@pytest.mark.parametrize(("loss", "stop_after"), STOPS)
def test_a_run_that_went_down_ends_as_if_it_had_not(
    write_selves: Callable[..., Path], loss: str, stop_after: int
) -> None:
    own = "{{ prompt }} {{ reference }}"
    more = {"ema": {"student": {"ema": 0.9}}, "past": {"student": "start"}}
    recipe = write_selves(
        {"student": {"every": 3}, "prompt": own},
        {
            "phases": [
                {**ROUNDS_OF_TWO, "updates": 4},
                {"name": "q", "updates": 4, "prompts_per_round": 3, "loss": loss},
            ],
            "checkpoint": {"every": 1, "keep": 2},
            "optimizer": {"lr": 0.01},
        },
        more=more,
    )
    whole, _, straight = run(recipe, "output=straight")
    before, _, _ = run(recipe, "output=broken", stop_after=stop_after)
    after, _, resumed = run(recipe, "output=broken")
    first = after.updates[0].update
    assert stop_after - 1 <= first <= stop_after
    assert before.records()[: first - 1] + after.records() == whole.records()
    for file in ("export/model.safetensors", "checkpoints/step-8/past-1-of-1.safetensors"):
        expected, found = load_file(straight.path / file), load_file(resumed.path / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_privileged_texts_are_not_taken_for_others(write_selves: Callable[..., Path]) -> None:
    """`start` may write; what it wrote with one script is written anew with another."""
    phase = {"name": "p", "updates": 1, "text": "teacher", "loss": "nll"}
    recipe = write_selves({"student": "start"}, {"rollout": {"max_new_tokens": 6}, "phases": [phase]})

    def written(*overrides: str) -> list[list[int]]:
        parts = load_models(preflight(recipe, overrides), Machine(CPU, SingleProcess()))
        tasks = [Task(p, 0, "teacher") for ps in parts.inputs.prompts.values() for p in ps]
        cache = teacher_rollouts_of(parts)
        cache.prepare(tasks, parts.plan.rollout)
        return [r.response_ids.tolist() for task in tasks for r in cache.of(task, parts.plan.rollout)]

    plain = written()
    shown = written('teachers.self.prompt="{{ prompt }} {{ reference }} c c c"')
    assert shown != plain
    assert written() == plain
    assert written("teachers.self.system=b b b") not in (plain, shown)


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("{{ note }}", {(0, 2), (3,)}),  # told the answer, it would be an expert of nothing
        ("{{ prompt }} {{ reference }}", {(0, 2), (3,)}),
        ("b {{ prompt }}", {(1, 0, 2), (1, 3)}),
    ],
)
def test_an_expert_is_not_shown_more_of_a_row_than_the_student(
    write_selves: Callable[..., Path], prompt: str, seen: set[tuple[int, ...]]
) -> None:
    evaluation = {"prompts": [{"source": "held.jsonl", "domain": "left", "verifier": "exact"}]}
    recipe = write_selves({"student": {"every": 1}, "prompt": prompt}, {"evaluation": evaluation})
    held = recipe.parent / "held.jsonl"
    held.write_text("\n".join(json.dumps({"prompt": p, "answer": "c"}) for p in ("a c", "d")))
    inputs = preflight(recipe)
    note_text = "expert 'self' is evaluated with the student's prompt, because its own shows "
    assert any(note.startswith(note_text) for note in inputs.notes) == ("b" not in prompt)
    notes = _Notes()
    asked: list[tuple[int, ...]] = []
    assert inputs.plan.evaluation is not None
    with pytest.MonkeyPatch.context() as patch:

        def watched(writer: Any, requests: Any, *rest: Any, **options: Any) -> Any:
            asked.extend(tuple(request.prompt_ids.tolist()) for request in requests)
            return generate(writer, requests, *rest, **options)

        patch.setattr("mergeopd.rollout.local.generate", watched)
        stages = Stages(notes, Clock(), SingleProcess(), None)
        measuring = build_evaluation(inputs, inputs.plan.evaluation, Machine(CPU, SingleProcess()), stages)
        measured = measuring.run(recipe.parent / "base", None)
    # Base, expert and student, two prompts each.
    assert len(asked) == 6
    assert set(asked[2:4]) == seen
    assert set(asked[:2]) == set(asked[4:]) == {(0, 2), (3,)}
    assert [model.key for model in measured.models] == ["base", "expert/self", "merged"]
    assert "no static merge: the experts are the student itself" in notes.texts


class _Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, event: Any) -> None:
        self.texts.append(getattr(event, "text", ""))


def test_evaluation_uses_a_teachers_own_prompt_and_the_students_precision(
    write_selves: Callable[..., Path],
) -> None:
    long = "{{ prompt }}{% for _ in range(120) %} a{% endfor %}"
    recipe = write_selves({"student": "start", "prompt": long}, dtype="bfloat16")
    assert preflight(recipe, ["rollout.max_new_tokens=4"]).plan.teachers["self"].dtype == "bfloat16"
    with pytest.raises(
        RecipeError, match=r"too long for teacher 'self': first left\.jsonl:1 takes 122 tokens|left"
    ):
        preflight(recipe, ["rollout.max_new_tokens=8"])


def test_one_needs_no_card_so_none_lacks_a_canary(write_selves: Callable[..., Path]) -> None:
    inputs = preflight(write_selves({"student": {"ema": 0.5}, "system": "d c"}))
    assert advice(inputs.plan) is None
    assert inputs.plan.teachers["self"].snapshot_rule == SnapshotRule(ema=0.5)


def test_a_live_teacher_is_used_in_later_updates_of_a_round(write_selves: Callable[..., Path]) -> None:
    """With one update a round it would always agree with the student, and is refused."""
    phase = {**ROUNDS_OF_TWO, "text": "dataset", "loss": {"reverse_kl": 1.0, "nll": 0.5}}
    recipe = write_selves({"student": {"every": 1}}, {"phases": [phase]})
    with pytest.raises(RecipeError, match="nothing to learn"):
        preflight(recipe, ["phases.0.updates_per_round=1"])
    preflight(recipe)
