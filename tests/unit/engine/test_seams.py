"""A rollout engine and teachers defined in this file take part in a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from enumeration import CPU, on_support
from torch import Tensor, nn

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.progress import Progress
from mergeopd.errors import RecipeError
from mergeopd.loss.heads import Head
from mergeopd.loss.targets import TopK
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.events import Event, UpdateDone
from mergeopd.rollout.protocol import (
    Completion,
    EngineCapabilities,
    EngineContext,
    GenerationRequest,
    RolloutEngine,
    WeightSource,
)
from mergeopd.storage.run_folder import RunFolder
from mergeopd.teacher.protocol import TargetSpec, TeacherCapabilities, TeacherSequence
from mergeopd.types import Sampling

V, EOS, UPDATES = 5, 4, 3
LOSS = {"reverse_kl": 1.0, "support": {"top_k": 2, "of": "teacher", "rest": "tail"}}
# The engine's responses by prompt; two end, one of them with the first token.
RESPONSES = {(0, 1): (2, EOS), (2,): (3, 3, 0, 1, 2, 0), (3, 3, 0): (EOS,), (1,): (0, 2, 2, 1, 3, 3)}
WEIGHTS = {
    (0, 1): {"one": 1.0, "two": 0.5},
    (2,): {"one": 1.0, "two": 0.5},
    (3, 3, 0): {"two": 0.7},
    (1,): {"two": 0.7},
}
TEMPLATES = {"one": (0, 1, 2, 3, 0, 1, 2), "two": ()}


class Scripted:
    """Looks its responses up, and keeps a copy of every version of the weights."""

    def __init__(self, returns_logprobs: bool) -> None:
        self.returns_logprobs = returns_logprobs
        self.versions: list[int] = []
        self.models: list[tuple[nn.Module, Head]] = []
        self.submitted: list[tuple[int, Sampling]] = []
        self.is_closed = False

    def submit(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> Found:
        self.submitted.append((len(requests), sampling))
        return Found([self._completion(request) for request in requests])

    def _completion(self, request: GenerationRequest) -> Completion:
        response = RESPONSES[tuple(request.prompt_ids)]
        logprobs = (-1.0,) * len(response) if self.returns_logprobs else ()
        return Completion(response, logprobs, "eos" if response[-1] == EOS else "length", self.versions[-1])

    def sync_weights(self, source: WeightSource, version: int) -> None:
        self.versions.append(version)
        with source.unsharded() as model:
            self.models.append(copy.deepcopy(model))

    def close(self) -> None:
        self.is_closed = True


class Found:
    """Responses that are there already."""

    def __init__(self, completions: list[Completion]) -> None:
        self._completions = completions

    def wait(self, on_progress: Callable[[int], None]) -> list[Completion]:
        on_progress(len(self._completions))
        return self._completions

    def cancel(self) -> None:
        raise AssertionError("nobody cancels")


class Table:
    """A teacher whose next-token distribution depends on the last token alone, and which gives its top k."""

    capabilities = TeacherCapabilities(frozenset(("top_k",)), can_generate=False)
    fingerprint = None
    bytes_read = 0
    head_key = None

    def __init__(self, name: str, seed: int) -> None:
        logits = torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.name = name
        self.log_p = torch.log_softmax(2 * logits, -1)
        self.num_opened = 0
        self.specs: set[TargetSpec] = set()

    @contextmanager
    def open(self) -> Iterator[Table]:
        self.num_opened += 1
        yield self

    def prefetch(self) -> None:
        pass

    def head(self, vocab: range | None) -> Head:
        raise AssertionError("it has none")

    def generator(self) -> RolloutEngine:
        raise AssertionError("it cannot generate")

    def score(
        self, sequences: Sequence[TeacherSequence], spec: TargetSpec, max_tokens: int
    ) -> Iterator[tuple[int, Tensor]]:
        self.specs.add(spec)
        for index in reversed(range(len(sequences))):  # any order
            prompt, response = list(sequences[index].prompt_ids), list(sequences[index].response_ids)
            assert tuple(prompt[: len(TEMPLATES[self.name])]) == TEMPLATES[self.name]
            rows = self.rows(prompt, response)
            assert spec.k is not None
            best = rows.topk(spec.k)
            tail = rows.scatter(1, best.indices, -torch.inf).logsumexp(1)
            sampled = rows.gather(1, torch.tensor(response)[:, None])[:, 0]
            entropy = -(rows.exp() * rows).sum(1)
            yield index, TopK(best.indices, best.values, sampled, entropy, tail).packed()

    def rows(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """Log-probabilities of every position, `[len(response), V]`."""
        return self.log_p[[prompt[-1], *response[:-1]]]


class Recorder:
    def __init__(self) -> None:
        self.updates: list[UpdateDone] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, UpdateDone):
            self.updates.append(event)


def run(
    write_job: Callable[..., Path], engine: Scripted, loss: Mapping[str, object] = LOSS
) -> tuple[list[UpdateDone], dict[str, Table]]:
    phase = {"name": "merge", "updates": UPDATES, "prompts_per_round": 4, "loss": loss}
    recipe = write_job({"phases": [phase], "optimizer": {"lr": 0.05}}, dtype="float64")
    teachers = {name: Table(name, seed) for seed, name in enumerate(("one", "two"))}
    inputs = preflight(
        recipe,
        engine=EngineCapabilities(
            returns_logprobs=engine.returns_logprobs, is_reproducible=True, needs_replica=True
        ),
        teachers={name: teacher.capabilities for name, teacher in teachers.items()},
    )
    RunFolder(Path(inputs.plan.output)).claim(inputs.plan, inputs.files, inputs.now, ())

    def make(source: WeightSource, context: EngineContext, settings: object) -> RolloutEngine:
        assert set(context.eos_ids) == {EOS}
        return engine

    recorder = Recorder()
    models = load_models(inputs, Machine(CPU, SingleProcess()), teachers)
    trainer = build(models, reporter=recorder, clock=Clock(), interrupt=Interrupt(), engines={"local": make})
    trainer.run(Progress(), None)
    return recorder.updates, teachers


def expected_loss(body: nn.Module, head: Head, teachers: Mapping[str, Table]) -> float:
    """The mean over all tokens of the weighted divergences, by a plain softmax and the teachers' tables."""
    total, num_tokens = 0.0, 0
    for prompt, response in RESPONSES.items():
        hidden = body(input_ids=torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        logits = hidden[len(prompt) - 1 : -1] @ head.weight[:V].T
        log_s = torch.log_softmax(logits.detach(), -1)
        num_tokens += len(response)
        for name, weight in WEIGHTS[prompt].items():
            total += weight * float(on_support(LOSS, log_s, teachers[name].rows(prompt, response)).sum())
    return total / num_tokens


@pytest.mark.parametrize("returns_logprobs", [True, False])
def test_a_scripted_engine_and_table_teachers_run(
    write_job: Callable[..., Path], returns_logprobs: bool
) -> None:
    engine = Scripted(returns_logprobs)
    updates, teachers = run(write_job, engine)
    assert engine.versions == list(range(UPDATES + 1))
    assert engine.submitted == [(4, Sampling(1.0, 1.0, 6, ()))] * UPDATES
    assert [teacher.num_opened for teacher in teachers.values()] == [UPDATES, UPDATES]
    assert {spec for teacher in teachers.values() for spec in teacher.specs} == {TargetSpec("top_k", 1.0, 2)}
    expected = [expected_loss(*model, teachers) for model in engine.models]
    assert [update.loss for update in updates] == pytest.approx(expected[:UPDATES], rel=1e-10)
    assert expected[UPDATES] < expected[0] - 0.01  # and it learns


def test_missing_capabilities_are_refused_before_reading_weights(write_job: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        run(write_job, Scripted(returns_logprobs=False), {"reverse_kl": 1.0, "sampled_reverse_kl": 1.0})
    places = [(problem.path, problem.message.split(",")[0]) for problem in caught.value.problems]
    assert places == [
        ("phases[0].loss", "the loss needs hidden states of teacher 'one'"),
        ("phases[0].loss", "the loss needs hidden states of teacher 'two'"),
        (
            "phases[0].loss.sampled_reverse_kl",
            "the rollout engine returns no log-probabilities of its responses",
        ),
    ]
