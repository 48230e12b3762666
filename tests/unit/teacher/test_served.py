"""Served teachers give the gradients of local ones; what a server does wrong is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import CPU, EOS, V, engine_round, trainer_of
from recorded_runs import Recorder, run_recorded
from scoring_server import ScoringServer, scoring_server

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, Models, load_models
from mergeopd.engine.score import CollectedRound
from mergeopd.errors import ServingError, TeacherError
from mergeopd.preflight.inputs import preflight
from mergeopd.recipe.served import Served
from mergeopd.reporting.jsonl import update_record
from mergeopd.teacher.protocol import TargetSpec, TeacherCapabilities, TeacherSequence
from mergeopd.teacher.served import ServedModel, ServedTeacher
from mergeopd.types import Rollout, token_flags

Write = Callable[..., Path]
STUDENT = {"top_k": 2, "of": "student"}
TEACHER = {"top_k": 2, "of": "teacher"}
MODEL = ServedModel(32, V, V, "float64")


def parts_of(write_job: Write, loss: Any, served: dict[str, dict[str, Any]], *overrides: str) -> Models:
    """A job whose teachers of these names are served."""
    text = "student" if loss == "sampled_reverse_kl" else "dataset"
    phase = {"name": "merge", "updates": 2, "prompts_per_round": 4, "text": text, "loss": loss}
    recipe = write_job({"phases": [phase]}, dtype="float64")
    for name, section in served.items():
        card = recipe.parent / f"{name}.yaml"
        card.write_text(json.dumps(json.loads(card.read_text()) | {"served": section}))
        if not section["hidden_states"]:
            (recipe.parent / name / "model.safetensors").unlink()
    return load_models(preflight(recipe, overrides), Machine(CPU, SingleProcess()))


def rollouts_of(parts: Models) -> list[Rollout]:
    """Two responses to every prompt; one has a reply of a tool in it."""
    rollouts = []
    for name in sorted(parts.inputs.prompts):
        for prompt in parts.inputs.prompts[name]:
            ids = parts.inputs.student.render(prompt)
            rollouts.append(Rollout(prompt, 0, ids, (2, 1, EOS), "student", "eos", (-1.0,) * 3))  # type: ignore[arg-type]
            flags = token_flags([True, False, False, True, True])
            response = (1, EOS, 0, 3, EOS)
            turns = Rollout(prompt, 1, ids, response, "student", "eos", (-1.0,) * 5, trained=flags)  # type: ignore[arg-type]
            rollouts.append(turns)
    return rollouts


@pytest.mark.parametrize(
    ("engine", "hidden_states", "loss", "names"),
    [
        ("vllm", True, {"reverse_kl": 1.0, "jsd": {"weight": 0.5, "beta": 0.3}}, ["one", "two"]),
        ("sglang", True, {"forward_kl": 1.0, "temperature": 1.3}, ["one", "two"]),
        ("sglang", True, {"forward_kl": 1.0, "support": TEACHER, "temperature": 1.3}, ["one", "two"]),
        ("vllm", False, {"reverse_kl": 1.0, "support": {**STUDENT, "rest": "tail"}}, ["two"]),
        ("vllm", False, {"reverse_kl": 1.0, "support": {**STUDENT, "rest": "generalised"}}, ["two"]),
        ("vllm", False, {"forward_kl": 1.0, "support": {**TEACHER, "rest": "tail"}}, ["two"]),
        ("sglang", False, {"forward_kl": 1.0, "support": {**TEACHER, "rest": "generalised"}}, ["two"]),
        ("vllm", False, "sampled_reverse_kl", ["two"]),
        ("sglang", False, "sampled_reverse_kl", ["two"]),
    ],
)
def test_gradients_are_those_of_local_teachers(
    write_job: Write, engine: str, hidden_states: bool, loss: Any, names: list[str]
) -> None:
    local = parts_of(write_job, loss, {})
    rollouts = rollouts_of(local)
    ((expected, _),) = engine_round(local, rollouts)
    folder = Path(local.plan.student.model).parent
    with ExitStack() as servers:
        running = {
            n: servers.enter_context(scoring_server(folder / n, engine, hidden_states=hidden_states))
            for n in names
        }
        section = {"engine": engine, "hidden_states": hidden_states}
        served = parts_of(write_job, loss, {n: {**section, "url": s.url} for n, s in running.items()})
        ((gradients, stats),) = engine_round(served, rollouts)
    assert all(server.requests for server in running.values())
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-5 * largest, rtol=0), name
    stats.refuse_uniform_teachers(V)
    for name, numbers in stats.teachers(served.views).items():
        assert (numbers.entropy_T is None) == (name in names and not hidden_states)


def teacher_of(server: ScoringServer, **changes: Any) -> ServedTeacher:
    served = Served(url=[server.url], engine=server.engine, concurrency=2, timeout_s=5.0)  # type: ignore[arg-type]
    own = TeacherCapabilities(frozenset(), can_generate=False)
    settings: dict[str, Any] = {"model": MODEL, "store": None, "canary": None} | changes
    return ServedTeacher("two", served, capabilities=own, run_on_first=lambda work: work(), **settings)


SEQUENCE = TeacherSequence((1, 2), (3, 0, EOS))  # type: ignore[arg-type]


@pytest.fixture
def folder(write_job: Write) -> Path:
    return write_job().parent / "two"


def test_ids_that_the_student_does_not_have_belong_to_the_tail(write_job: Write) -> None:
    """Teacher one has 8 rows, 5 of them the student's."""
    with scoring_server(write_job().parent / "one", "vllm") as server:
        rows = server._logprobs([1, 2, 3, 0, EOS])[1:4]
        with teacher_of(server, model=replace(MODEL, vocab_rows=8)).open() as session:
            ((_, packed),) = session.score([SEQUENCE], TargetSpec("top_k", k=3), 100)
        # Without spare ids, as where many rows are not the student's.
        few = replace(MODEL, vocab_rows=2, num_valid=2)
        with (
            teacher_of(server, model=few).open() as session,
            pytest.raises(TeacherError, match="fewer than 2 of its most probable tokens"),
        ):
            list(session.score([SEQUENCE], TargetSpec("top_k", k=2), 100))
    best = np.sort(rows[:, :V], 1)[:, ::-1][:, :3]
    assert np.allclose(np.sort(packed[:, 3:6].numpy(), 1)[:, ::-1], best, atol=1e-6)
    assert np.allclose(packed[:, 8].exp().numpy(), 1 - np.exp(best).sum(1), atol=1e-6)


def test_a_tail_that_rounding_hides_is_bounded(folder: Path) -> None:
    support = np.tile(np.arange(V, dtype=np.int32), (3, 1))
    with scoring_server(folder, "vllm") as server, teacher_of(server).open() as session:
        sequence = replace(SEQUENCE, support=support)
        ((_, packed),) = session.score([sequence], TargetSpec("student_top_k", k=V), 100)
    assert torch.allclose(packed[:, -1].exp(), torch.full((3,), 1e-6, dtype=torch.float32), rtol=1e-3)


def test_requests_run_before_their_rows_are_taken(folder: Path) -> None:
    """All of them; of hidden states a few times the concurrency, because they are large."""
    sequences = [SEQUENCE] * 30
    for hidden_states, expected in ((False, 30), (True, 4)):
        with scoring_server(folder, "vllm", hidden_states=hidden_states) as server:
            teacher = teacher_of(server)
            teacher = replace(
                teacher, served=teacher.served.model_copy(update={"hidden_states": hidden_states})
            )
            with teacher.open() as session:
                rows = session.score(sequences, TargetSpec("hidden" if hidden_states else "sampled"), 100)
                wait(session._pending)
                assert len(server.requests) == expected
                assert sorted(index for index, _ in rows) == list(range(30))
                assert len(server.requests) == 30


def half(path: str, reply: Any) -> Any:
    return reply[: len(reply) // 2] if isinstance(reply, bytes) else json.dumps(reply).encode()[:20]


@pytest.mark.parametrize(
    ("hidden_states", "spoil", "text"),
    [
        (False, half, "the reply is not JSON"),
        (True, half, "bytes of hidden states for 4 tokens of width 32"),
        (True, lambda path, reply: reply[:-4] + b"\x00\x00\xc0\x7f", "a hidden state is NaN or infinite"),
        (
            False,
            lambda path, reply: {**reply, "prompt_logprobs": reply["prompt_logprobs"][1:]},
            "of 5 tokens",
        ),
        (False, lambda path, reply: {**reply, "prompt_logprobs": None}, "of 0 of 5 tokens"),
        (
            False,
            lambda path, reply: reply if path == "/health" else 503,
            "failed 5 times, at last: status 503",
        ),
        (False, lambda path, reply: 400, "status 400: refused"),
    ],
)
def test_unusable_replies_end_the_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hidden_states: bool, spoil: Any, text: str
) -> None:
    monkeypatch.setattr("mergeopd.serving.transport._BACKOFF_S", 0.0)
    with scoring_server(folder, "vllm", hidden_states=hidden_states, spoil=spoil) as server:
        teacher = teacher_of(server)
        served = teacher.served.model_copy(update={"hidden_states": hidden_states})
        with replace(teacher, served=served).open() as session, pytest.raises(ServingError, match=text):
            list(session.score([SEQUENCE], TargetSpec("hidden" if hidden_states else "sampled"), 100))


def test_one_bad_reply_is_asked_for_again(folder: Path) -> None:
    with scoring_server(folder, "vllm") as server:
        bad = iter([half])
        server.spoil = lambda path, reply: next(bad, lambda _, reply: reply)(path, reply)
        with teacher_of(server).open() as session:
            rows = dict(session.score([SEQUENCE] * 3, TargetSpec("sampled"), 100))
        expected = server._logprobs([1, 2, 3, 0, EOS])[[1, 2, 3], [3, 0, EOS]]
    assert len(server.requests) == 4
    assert all(np.allclose(rows[i][:, 0].numpy(), expected, atol=1e-6) for i in range(3))


def test_a_round_opens_served_teachers_before_local_ones_score(write_job: Write) -> None:
    """While teacher one scores here, the requests of teacher two run."""
    with scoring_server(write_job().parent / "two", "vllm", hidden_states=True) as server:
        section = {"url": server.url, "engine": "vllm", "hidden_states": True}
        parts = parts_of(write_job, "reverse_kl", {"two": section})
        trainer = trainer_of(parts)
        order: list[str] = []
        for name, teacher in parts.teachers.items():
            opened = teacher.open

            def noted(name: str = name, opened: Any = opened) -> Any:
                order.append(name)
                return opened()

            object.__setattr__(teacher, "open", noted)
        work = trainer.pipeline.work(rollouts_of(parts), 0, 1)
        rollouts = rollouts_of(parts)
        with trainer.scorer.score(CollectedRound(parts.plan.phases[0], 0, rollouts, [None] * 8, work)):
            assert order == ["two", "one"]


def test_a_run_with_a_served_teacher_is_the_local_one(write_job: Write, tmp_path: Path) -> None:
    """Beside a local teacher; what is not known is absent from the metrics."""
    loss = {"reverse_kl": 1.0, "support": STUDENT, "sampled_reverse_kl": 0.3}
    phase = {"name": "merge", "updates": 3, "prompts_per_round": 4, "loss": loss}
    recipe = write_job({"phases": [phase], "rollout": {"samples_per_prompt": 2, "max_new_tokens": 6}})

    def lines(output: str) -> list[dict[str, Any]]:
        recorder = Recorder()
        run_recorded(recipe, CPU, f"output={output}", recorder=recorder)
        records = [update_record(event) for event in recorder.updates]
        return json.loads(json.dumps(records, allow_nan=False))

    local = lines("local")
    with scoring_server(recipe.parent / "two", "vllm") as server:
        card = recipe.parent / "two.yaml"
        served = {"url": server.url, "engine": "vllm"}
        card.write_text(json.dumps(json.loads(card.read_text()) | {"served": served}))
        (recipe.parent / "two" / "model.safetensors").unlink()
        remote = lines("remote")
    for one, other in zip(local, remote, strict=True):
        own, others = one["teachers"]["two"], other["teachers"]["two"]
        unknown = {"entropy_T", "entropy_gap", "overlap", "overlap_advantage"}
        unknown |= {"shared_mass_S", "shared_mass_T"}
        assert unknown < own.keys()
        assert others == pytest.approx({k: v for k, v in own.items() if k not in unknown}, abs=2e-4)
        assert other["teachers"]["one"] == pytest.approx(one["teachers"]["one"], abs=2e-4)
