"""Runs over servers: as the local engine's where nothing is ahead, every prompt once where rounds are."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import FakeServer, TorchModel
from recorded_runs import Crash, Recorder

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.pipeline import SynchronousPipeline
from mergeopd.engine.progress import Progress, draw_tasks, phase_at
from mergeopd.engine.score import CollectedRound
from mergeopd.errors import ServingError, Stopped
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import AccuracyMeasured, Event, UpdateDone
from mergeopd.rollout import served
from mergeopd.serving import transport
from mergeopd.storage.run_folder import RunFolder

CPU = torch.device("cpu")
PHASE = {"name": "merge", "updates": 5, "loss": "reverse_kl", "prompts_per_round": 4}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_DOWN_S", 0.02), ("_BACKOFF_S", 0.001), ("_CONNECT_S", 1.0), ("_CLOSE_S", 0.2)):
        monkeypatch.setattr(transport, name, value)
    monkeypatch.setattr(served, "_POLL_S", 0.01)
    monkeypatch.setattr("mergeopd.engine.pipeline._POLL_S", 0.01)
    monkeypatch.setattr("mergeopd.engine.engines._LOST_S", 1.0)


class Streams:
    """The local engine's random stream of the n-th request of a prompt, as requests have no key."""

    def __init__(self) -> None:
        self.keys: dict[tuple[int, ...], str] = {}
        self.seen: Counter[tuple[int, ...]] = Counter()

    def __call__(self, ids: Sequence[int]) -> tuple[int, str, int]:
        number = self.seen[tuple(ids)]
        self.seen[tuple(ids)] += 1
        return 3, self.keys.get(tuple(ids), str(list(ids))), number


class Ledger(Recorder):
    """Keeps what every update was trained on: prompts, their samples, versions."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(stop_after)
        self.rounds: list[CollectedRound] = []

    def of(self, pipeline: SynchronousPipeline) -> None:
        collect = pipeline.next

        def next(progress: Progress) -> CollectedRound:
            self.rounds.append(collect(progress))
            return self.rounds[-1]

        pipeline.next = next  # type: ignore[method-assign]

    @property
    def trained(self) -> list[list[tuple[str, str, int]]]:
        """Prompts with origin and stream of every update."""
        return [
            sorted((r.prompt.key, r.origin, r.sample) for r in (one.rollouts[i] for i in update.rollouts))
            for one in self.rounds
            for update in one.work.updates
        ]


class Job:
    """A recipe over fake servers with its own model, and runs of it."""

    def __init__(self, recipe: Path, servers: Sequence[FakeServer]) -> None:
        self.recipe, self.servers = recipe, servers
        self.interrupt = Interrupt()

    def run(self, ledger: Ledger, *overrides: str) -> RunFolder:
        """Run or resume, until the end or the recorder's crash."""
        inputs = preflight(self.recipe, overrides)
        folder = RunFolder(Path(inputs.plan.output))
        folder.claim(inputs.plan, inputs.files, inputs.now, ())
        models = load_models(inputs, Machine(CPU, SingleProcess()))
        record = models.checkpoints().restore(folder.plan_hashes(), ledger)
        for server in self.servers:
            stream = getattr(server.model, "stream", None)
            if isinstance(stream, Streams):
                prompts = [p for source in inputs.prompts.values() for p in source]
                stream.keys = {tuple(inputs.student.render(p).tolist()): p.key for p in prompts}
        trainer = build(models, reporter=ledger, clock=Clock(), interrupt=self.interrupt)
        ledger.of(trainer.pipeline)
        with ExitStack() as opened:
            opened.callback(trainer.pipeline.close)
            with suppress(Crash):
                trainer.run(record.progress, None)
        return folder

    def planned(self, *overrides: str) -> list[list[tuple[str, str]]]:
        """Prompts and origin of every round, from the plan alone."""
        inputs = preflight(self.recipe, overrides)
        models = load_models(inputs, Machine(CPU, SingleProcess()))
        pipeline = build(models, reporter=Recorder(), clock=Clock(), interrupt=Interrupt()).pipeline
        rounds, progress = [], Progress()
        while (at := phase_at(inputs.plan, progress.update)) is not None:
            phase, done = at
            tasks = draw_tasks(pipeline.text.draw, inputs.plan, phase, progress, done)
            rounds.append(sorted((task.prompt.key, task.origin) for task in tasks))
            progress = Progress(
                progress.update + phase.updates_per_round,
                progress.round + 1,
                progress.drawn + phase.prompts_per_round,
            )
        pipeline.close()
        return rounds


@pytest.fixture
def make_job(tmp_path: Path, write_job_in: Callable[..., Path]) -> Iterator[Callable[..., Job]]:
    servers: list[FakeServer] = []
    numbers = itertools.count()

    def make(
        recipe: Mapping[str, Any] = {}, rollout: Mapping[str, Any] = {}, num: int = 1, **server: Any
    ) -> Job:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        path = write_job_in(folder, {"phases": [PHASE], **recipe})
        own = [
            FakeServer(TorchModel(folder / "base", Streams()), root=str(folder / "base"), **server)
            for _ in range(num)
        ]
        servers.extend(own)
        document = json.loads(path.read_text())
        document["rollout"] = {
            "engine": "vllm",
            "url": [one.url for one in own],
            "max_new_tokens": 4,
            "concurrency": 4,
            "timeout_s": 20.0,
            **rollout,
        }
        path.write_text(json.dumps(document))
        return Job(path, own)

    yield make
    for one in servers:
        one.close()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_run_over_servers_is_the_local_run_bit_for_bit(make_job: Callable[..., Job], kind: str) -> None:
    """With the same random numbers and one sequence at a time."""
    own = {"engine": kind, "samples_per_prompt": 2, "concurrency": 1}
    job = make_job({"optimizer": {"lr": 0.05}}, own, engine=kind)
    one, other = Ledger(), Ledger()
    folder = job.run(one, "rollout.parity=null", "evaluation=null")
    document = json.loads(job.recipe.read_text())
    document["rollout"] = {"max_new_tokens": 4, "samples_per_prompt": 2, "batch_size": 1}
    job.recipe.write_text(json.dumps({**document, "output": "local"}))
    local = job.run(other)
    assert [u.loss for u in one.updates] == [u.loss for u in other.updates]
    assert len({u.loss for u in one.updates}) == 5
    for a, b in zip(one.rounds, other.rounds, strict=True):
        for ours, theirs in zip(a.rollouts, b.rollouts, strict=True):
            assert ours.response_ids.tolist() == theirs.response_ids.tolist()
            assert ours.logprobs_behaviour.tolist() == theirs.logprobs_behaviour.tolist()
            assert ours.policy_version == theirs.policy_version
    assert (folder.export / "model.safetensors").read_bytes() == (
        local.export / "model.safetensors"
    ).read_bytes()
    assert not list(folder.weights.glob("version-*"))


def lags(ledger: Ledger) -> list[tuple[float, int]]:
    return [(u.serving.lag, int(u.serving.lag_max)) for u in ledger.updates if u.serving is not None]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ahead": 1}, [0, 1, 1, 1, 1]),
        ({"ahead": 2}, [0, 1, 2, 2, 2]),
        ({"ahead": 2, "max_staleness": 1}, [0, 1, 1, 1, 1]),
        ({"ahead": 1, "max_staleness": 0}, [0, 0, 0, 0, 0]),
        ({"sync": {"every": 3}}, [0, 1, 2, 0, 1]),
        ({"sync": {"every": 3}, "max_staleness": 1}, [0, 1, 0, 1, 0]),
        ({"ahead": 1, "sync": {"every": 2}}, [0, 1, 2, 1, 2]),
    ],
)
def test_every_prompt_is_trained_once_and_lags_as_planned(
    make_job: Callable[..., Job], settings: dict[str, Any], expected: list[int]
) -> None:
    job = make_job(rollout=settings)
    ledger = Ledger()
    job.run(ledger)
    trained = [sorted((key, origin) for key, origin, _ in update) for update in ledger.trained]
    assert trained == job.planned()
    streams = [one for update in ledger.trained for one in update]
    assert len(set(streams)) == len(streams) == 20
    # Rounds in flight may get newer weights; none gets older ones.
    assert all(lag <= bound for (_, lag), bound in zip(lags(ledger), expected, strict=True))
    if settings.get("ahead") != 2:
        assert [lag for _, lag in lags(ledger)] == expected
    gaps = [u.serving.engine_gap for u in ledger.updates if u.serving.engine_gap is not None]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4
    assert not any(server.is_paused for server in job.servers)


def test_phases_texts_and_samples_change_between_rounds_in_flight(make_job: Callable[..., Job]) -> None:
    phases = [
        {**PHASE, "name": "cold", "text": "teacher", "updates": 2},
        {**PHASE, "name": "mix", "text": {"on_policy_fraction": 0.5, "otherwise": "dataset"}, "updates": 2},
        {**PHASE, "name": "two", "updates": 4, "updates_per_round": 2, "rollout": {"samples_per_prompt": 3}},
        {**PHASE, "name": "one", "updates": 2, "prompts": ["left"], "rollout": {"max_new_tokens": 2}},
    ]
    job = make_job({"phases": phases}, {"ahead": 2})
    ledger = Ledger()
    job.run(ledger)
    planned = job.planned()
    for one, plan in zip(ledger.rounds, planned, strict=True):
        num = 3 if one.phase.name == "two" else 1
        expected = Counter(plan)
        assert Counter((r.prompt.key, r.origin) for r in one.rollouts) == Counter(
            {key: n * (num if key[1] == "student" else 1) for key, n in expected.items()}
        )
        assert {len(r.response_ids) <= 2 for r in one.rollouts} == {True} or one.phase.name != "one"
    assert len(ledger.updates) == 10


def test_no_round_of_a_phase_is_generated_before_its_prompts_are_selected(
    make_job: Callable[..., Job],
) -> None:
    """They depend on the weights at its start; within the phase, rounds are ahead again."""
    hard = {**PHASE, "name": "hard", "updates": 3, "select": {"near_teacher": {"nats": 50.0}}}
    job = make_job({"phases": [{**PHASE, "updates": 3}, hard]}, {"ahead": 1})
    ledger = Ledger()
    folder = job.run(ledger)
    assert [lag for lag, _ in lags(ledger)] == [0, 1, 1, 0, 1, 1]
    selected = [one.selected for one in ledger.rounds]
    assert selected == [{}] * 3 + [{"left": 1.0, "right": 1.0}] * 3
    rows = (folder.path / "rollouts" / "selection.jsonl").read_text().splitlines()
    assert all(0.0 < json.loads(row)["gap"] < 50.0 for row in rows)
    samples = [sample for update in ledger.trained for _, _, sample in update]
    assert min(samples[12:]) >= 2 << 20


def test_a_killed_run_resumes_without_a_prompt_lost_or_doubled(make_job: Callable[..., Job]) -> None:
    job = make_job({"checkpoint": {"every": 1}}, {"ahead": 2})
    done: dict[int, list[tuple[str, str]]] = {}
    for stop_after in (2, 3, None):
        ledger = Ledger(stop_after)
        job.run(ledger)
        for event, update in zip(ledger.updates, ledger.trained, strict=False):
            done[event.update] = sorted((key, origin) for key, origin, _ in update)
    assert [done[update] for update in range(1, 6)] == job.planned()


def test_measurements_during_the_run_use_the_newest_weights(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [{"source": "held_out.jsonl", "domain": "left", "verifier": "exact"}]
    evaluation = {"prompts": prompts, "interim": {"every": 2, "prompts": 2}, "max_new_tokens": 3}
    job = make_job({"evaluation": evaluation}, {"ahead": 1})
    rows = [{"prompt": text, "answer": "c"} for text in ("a", "d")]
    (job.recipe.parent / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    versions: list[tuple[int, str]] = []

    class Watching(Ledger):
        def emit(self, event: Event) -> None:
            super().emit(event)
            if isinstance(event, AccuracyMeasured):
                versions.append((event.update, job.servers[0].weight_version))

    job.run(Watching())
    assert versions == [(update, str(update)) for update in (0, 2, 4, 5)]


@pytest.mark.parametrize(
    ("ahead", "path"), [(0, "/collective_rpc"), (1, "/inference/v1/generate"), (2, "/collective_rpc")]
)
def test_a_request_to_stop_leaves_a_hanging_server_and_resumes(
    make_job: Callable[..., Job], ahead: int, path: str
) -> None:
    job = make_job({"checkpoint": {"every": 1}}, {"ahead": ahead})
    ledger = Ledger()
    emit = ledger.emit

    def hang_after_two(event: Event) -> None:
        emit(event)
        if isinstance(event, UpdateDone) and event.update == 2:
            job.servers[0].fail(*["hang"] * 50, path=path)
            threading.Timer(0.1, lambda: setattr(job.interrupt, "requested", "SIGINT")).start()

    ledger.emit = hang_after_two  # type: ignore[method-assign]
    start = time.monotonic()
    with pytest.raises(Stopped, match=r"stopped by SIGINT after [2345] of 5 updates, all saved"):
        job.run(ledger)
    assert time.monotonic() - start < 10  # the time-out is 20 seconds
    job.servers[0].faults.clear()
    job.servers[0].restart(job.servers[0].model)
    job.interrupt = Interrupt()
    rest = Ledger()
    job.run(rest)
    assert [u.update for u in ledger.updates + rest.updates] == [1, 2, 3, 4, 5]
    done = [sorted((k, o) for k, o, _ in update) for update in ledger.trained[: len(ledger.updates)]]
    assert done + [sorted((k, o) for k, o, _ in update) for update in rest.trained] == job.planned()


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_lost_server_ends_the_run_clearly_and_it_resumes(make_job: Callable[..., Job], ahead: int) -> None:
    job = make_job({"checkpoint": {"every": 1}}, {"ahead": ahead})
    job.servers[0].fail(*["ok"] * 25, "die")
    with pytest.raises(ServingError, match=r"not available for 1 seconds; start the server again"):
        job.run(Ledger())
    job.servers[0].restart()
    ledger = Ledger()
    job.run(ledger)
    assert ledger.updates[-1].update == 5


def test_weights_that_do_not_arrive_are_noticed_after_the_first_update(make_job: Callable[..., Job]) -> None:
    """The version is right, the weights are those of before."""
    job = make_job({"optimizer": {"lr": 0.05}})
    job.servers[0].fail("ok", *["no_effect"] * 9, path="/collective_rpc")
    with pytest.raises(
        ServingError, match=r"log-probabilities .* differ from the student's by .*older weights"
    ):
        job.run(Ledger())


def test_another_model_behind_the_address_is_noticed_at_the_start(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = make_job()
    job.servers[0].model = TorchModel(tmp_path / "0" / "base")
    head = job.servers[0].model.head
    job.servers[0].model.load = lambda folder: None  # type: ignore[method-assign]
    with torch.no_grad():
        head.weight.mul_(-1.0)
    with pytest.raises(ServingError, match="another model at the address"):
        job.run(Ledger())
