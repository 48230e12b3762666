"""Continuations of a real engine, and the alignment of a real teacher, against the enumeration of all responses."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from enumeration import CPU, EOS, build_parts, response_logprobs
from rich.console import Console
from transformers import AutoModelForCausalLM

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, engine_context
from mergeopd.engine.rollouts import student_rollout
from mergeopd.environment.episodes import Response
from mergeopd.inspection.alignment import divide, ideal_gradient
from mergeopd.inspection.gradients import ProbedResponse, ProbedSource, distillation_objective, measure
from mergeopd.inspection.nodes import NEGLIGIBLE, Continuer, Node
from mergeopd.inspection.run import inspect_recipe
from mergeopd.loss import ForwardKL, ReverseKL, build_objective
from mergeopd.models.causal import response_hidden
from mergeopd.reporting.inspection import read_inspection, write_inspection
from mergeopd.rollout.local import LocalEngine
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.teacher.protocol import TargetSpec
from mergeopd.types import Sampling

LONGEST, NUM_CANDIDATES, NUM_CONTINUATIONS = 3, 2, 4
SAMPLING = Sampling(max_new_tokens=LONGEST)


def is_correct(response):
    return sum(response) % 3 == 0


def rewards(_, responses):
    return [float(is_correct(one.completion.response_ids.tolist())) for one in responses]


@pytest.fixture(scope="module")
def job(write_job_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    parts = build_parts(
        lambda *args, **options: write_job_in(folder, *args, **options), text="student", loss="reverse_kl"
    )
    context = engine_context(parts.inputs.student, parts.inputs, Machine(CPU, SingleProcess()))
    return parts, LocalEngine(parts.student, context, 64)


def probe(parts, engine):
    """Eighty sampled responses to each of two prompts, each a prompt of its own for the intervals."""
    prompts = parts.inputs.prompts["right"]
    asked = [(prompt, sample) for prompt in prompts for sample in range(80)]
    ids = [parts.inputs.student.render(prompt) for prompt, _ in asked]
    requests = [GenerationRequest(p.key, sample, own) for (p, sample), own in zip(asked, ids, strict=True)]
    completions = engine.submit(requests, SAMPLING).wait(lambda _: None)
    responses = [Response(p, own, c) for (p, _), own, c in zip(asked, ids, completions, strict=True)]
    with parts.student.unsharded() as (body, head):
        response_ids = [c.response_ids for c in completions]
        hidden = torch.split(response_hidden(body, ids, response_ids, CPU), list(map(len, response_ids)))
        source = ProbedSource(
            [
                ProbedResponse(
                    i, "right", is_correct(one.completion.response_ids.tolist()), frozenset(("two",)), one
                )
                for i, one in enumerate(responses)
            ],
            SAMPLING,
            build_objective({"reverse_kl": (ReverseKL(), 1.0)}),
            lambda members: torch.cat([hidden[i] for i in members]),
            head,
            NUM_CANDIDATES,
        )
    view, teacher = parts.views["two"], parts.teachers["two"]
    with teacher.open() as session:
        sequences = [view.read(student_rollout(one, 0), None) for one in responses]
        states = session.score(sequences, TargetSpec("hidden"), 64)
        source.add_teacher("two", states, teacher.head(None), [()] * len(responses))
    return source


class Tree:
    """Log-probabilities and successes after every prefix of the responses to one prompt."""

    def __init__(self, parts, prompt_ids):
        prefixes = [p for size in range(LONGEST) for p in itertools.product(range(EOS), repeat=size)]
        self.log_S, self.log_T = (
            self._logprobs(folder, prompt_ids, prefixes)
            for folder in (parts.plan.student.model, parts.plan.teachers["two"].model)
        )
        self.success = {}
        for prefix in reversed(prefixes):
            self.success[prefix] = np.array([self._after((*prefix, token)) for token in range(EOS + 1)])

    def _logprobs(self, folder, prompt_ids, prefixes):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        with torch.no_grad():
            rows = response_logprobs(model, prompt_ids.tolist(), [(*p, 0) for p in prefixes], 1.0)
        return {prefix: row[-1].numpy() for prefix, row in zip(prefixes, rows, strict=True)}

    def _after(self, response):
        if response[-1] == EOS or len(response) == LONGEST:
            return float(is_correct(response))
        return float((np.exp(self.log_S[response]) * self.success[response]).sum())

    def coarse(self, prefix, ids):
        """Probabilities, successes and descent of the candidates and of all other tokens, and which end at once."""
        probability, ratio = np.exp(self.log_S[prefix]), self.log_T[prefix] - self.log_S[prefix]
        descent = probability * (ratio - (probability * ratio).sum())
        kept = [int(i) for i in ids if probability[i] >= NEGLIGIBLE]
        others = [i for i in range(EOS + 1) if i not in kept]
        rest = probability[others].sum()
        mean = (probability * self.success[prefix])[others].sum() / rest
        ends = [i == EOS or len(prefix) == LONGEST - 1 for i in kept]
        return (
            np.array([*probability[kept], rest]),
            np.array([*self.success[prefix][kept], mean]),
            np.array([*descent[kept], descent[others].sum()]),
            np.array([*ends, False]),
        )


def test_estimates_match_the_enumeration(job):
    parts, engine = job
    source = probe(parts, engine)
    prompt_ids = {one.response.prompt.key: one.response.prompt_ids for one in source.responses}
    trees = {key: Tree(parts, ids) for key, ids in prompt_ids.items()}
    places = [
        (one.response, t)
        for one in source.responses
        for t in range(len(one.response.completion.response_ids))
    ]
    exact = [
        trees[response.prompt.key].coarse(tuple(response.completion.response_ids[:t].tolist()), ids)
        for (response, t), ids in zip(places, source.candidates.ids, strict=True)
    ]
    assert all(len(p) == NUM_CANDIDATES + 1 for p, *_ in exact)  # no token is negligible
    P, S, D, ends = (np.array(column) for column in zip(*exact, strict=True))
    np.testing.assert_allclose(source.candidates.probability, P, rtol=0, atol=1e-12)
    np.testing.assert_allclose(source.descent["two"], D, rtol=0, atol=1e-12)
    continuer = Continuer(engine, parts.inputs.student, source.head, SAMPLING, NUM_CONTINUATIONS, seed=7)
    begun = []

    def begin(num):
        begun.append(num)
        return lambda _: None

    gradients = measure([source], lambda _: continuer, rewards, num_nodes=200, seed=7, begin=begin)
    drawn = gradients.drawn
    counts = np.array([divide(P[i], ends[i], 3 * NUM_CONTINUATIONS) for i in drawn])
    assert gradients.num_continuations.tolist() == counts.sum(1).tolist()
    assert sum(begun) < counts.sum()  # where the forced token ends a response, nothing is generated
    assert (gradients.successes.mean[ends[drawn]] == S[drawn][ends[drawn]]).all()
    expected_variance = S[drawn] * (1 - S[drawn]) / counts
    is_random = expected_variance > 1e-12
    squares = ((gradients.successes.mean - S[drawn]) ** 2)[is_random] / expected_variance[is_random]
    assert abs(squares.mean() - 1.0) < 5 * math.sqrt(3 / is_random.sum())
    inner, ideal = (ideal_gradient(P, S) * D).sum(), (ideal_gradient(P, S) ** 2).sum()
    truth = inner / math.sqrt(ideal * (D**2).sum())
    teacher = gradients.of_teacher("two")
    assert teacher.score.low < truth < teacher.score.high
    assert abs(teacher.score.value - truth) < 0.15
    assert teacher.score.high - teacher.score.low < 0.8
    assert teacher.by_domain == {"right": teacher.score}
    assert teacher.num_rollouts == counts.sum()
    assert 0 < teacher.num_skipped < teacher.num_nodes == len(drawn)
    correct = np.array([one.is_correct for one in source.responses])[gradients.table.response_T]
    assert teacher.on_correct != teacher.on_incorrect
    assert correct[drawn].mean() == pytest.approx(0.5)
    assert [(b.start, b.stop) for b in teacher.positions] == [(0, 1), (1, 2), (2, 4)]
    assert [b.num_tokens for b in teacher.positions] == np.bincount(
        gradients.table.position_T[drawn]
    ).tolist()
    assert all(b.alignment_low <= b.alignment <= b.alignment_high for b in teacher.positions)
    assert gradients.ranks() == []  # nothing to compare with


class Recorded:
    """An engine that returns one completion."""

    def __init__(self, response_ids, finish):
        self.completion, self.limit = Completion(response_ids, (), finish), None

    def submit(self, requests, sampling):
        self.requests, self.limit = requests, sampling.max_new_tokens
        return self

    def wait(self, on_progress):
        return [self.completion] * len(self.requests)


A, B, C, D = range(4)


@pytest.mark.parametrize(
    ("token", "tail", "longest", "stop", "expected"),
    [
        (B, [A, D, EOS], 8, (), ([A, B, A, D, EOS], "eos")),
        (B, [A, D, EOS], 4, (), ([A, B, A, D], "length")),
        (B, [], 2, (), ([A, B], "length")),
        (EOS, [], 8, (), ([A, EOS], "eos")),
        (B, [C, D, EOS], 8, ("b c",), ([A, B, C], "stop")),
        (B, [], 8, ("a b",), ([A, B], "stop")),
    ],
)
def test_continuations_end_as_rollouts_do(job, token, tail, longest, stop, expected):
    parts, _ = job
    engine = Recorded(tail, "eos")
    sampling = replace(SAMPLING, max_new_tokens=longest, stop=stop)
    with parts.student.unsharded() as (_, head):
        continuer = Continuer(engine, parts.inputs.student, head, sampling, 2, seed=0)
    prompt = parts.inputs.prompts["right"][0]
    response = Response(prompt, parts.inputs.student.render(prompt), Completion([A, C], (), "length"))
    node = Node(
        response, 1, np.array([token, D]), np.array([0.5, 0.5, 0.0]), torch.zeros(32, dtype=torch.float64)
    )
    graded = []

    def grade(responses):
        graded.extend(responses)
        return [0.0] * len(responses)

    continuer.successes([node], grade, lambda _: lambda _: None)
    completion = graded[0].completion
    assert (completion.response_ids.tolist(), completion.finish) == expected
    if tail:
        assert engine.limit == longest - 2
        assert engine.requests[0].prompt_ids.tolist() == [*response.prompt_ids, A, token]
        assert len({(one.key, one.sample) for one in engine.requests}) == len(engine.requests)


def test_objective_of_a_phase(write_job_in, tmp_path):
    def of(loss, updates=10):
        parts = build_parts(
            lambda *args, **options: write_job_in(tmp_path, *args, **options),
            text="student",
            loss=loss,
            updates=updates,
        )
        own = distillation_objective(parts.plan.phases[0])
        return dict(zip(own.divergences, own.coefficients, strict=True)), own.temperature

    ramp = {"start": 0.0, "end": 1.0, "updates": 10}
    assert of({"reverse_kl": 0.5, "forward_kl": {"weight": ramp}, "temperature": 2.0}) == (
        {ReverseKL(): 0.5, ForwardKL(): 0.5},
        2.0,
    )
    assert of({"sampled_reverse_kl": 0.3}) == ({ReverseKL(): 0.3}, 1.0)


def test_an_inspection_with_gradients(write_job, tmp_path):
    """Teachers are compared on all sources that have a verifier; the others are named with the reason."""
    odd = {"kind": "regex", "pattern": "^(a|c)"}
    left = {"source": "left.jsonl", "domain": "left", "teachers": {"one": 1.0}}
    right = {"source": "right.jsonl", "domain": "right", "teachers": {"two": 1.0}, "verifier": odd}
    inspection = inspect_recipe(
        write_job({"prompts": [left, right]}),
        [
            "inspect.samples=8",
            "rollout.max_new_tokens=4",
            "inspect.gradients={nodes: 12, candidates: 3, continuations: 2}",
        ],
        gradients=True,
        console=Console(quiet=True),
    )
    one, two = (teacher.gradients for teacher in inspection.teachers)
    assert (one.num_nodes, one.score.value) == (0, None)
    assert list(one.by_domain) == list(two.by_domain) == ["right"]
    assert two.num_nodes == 12
    assert two.num_rollouts >= 12 * 2
    assert two.score == two.by_domain["right"]
    assert -1.0 <= two.score.value <= 1.0
    ranks = {rank.teacher: rank.alignment for rank in inspection.alignments}
    assert ranks == {"one": one.by_domain["right"], "two": two.score}
    assert [note for note in inspection.notes if "alignment" in note] == [
        "no alignment of gradients on left: it has no verifier"
    ]
    write_inspection(inspection, tmp_path / "inspect.json")
    assert read_inspection(tmp_path / "inspect.json") == inspection
