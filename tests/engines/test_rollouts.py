"""Rollouts by real servers: log-probs of the sampled distribution before and after weight updates; whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import NUM_ROWS, NUM_TOKENS, reference_logits
from tiny_experts.tokens import END_ID

import mergeopd
from mergeopd.rollout.protocol import Completion, EngineContext, GenerationRequest
from mergeopd.rollout.served import ServedEngine
from mergeopd.rollout.servers import RunningServers
from mergeopd.serving.sglang import SglangApi
from mergeopd.serving.vllm import VllmApi
from mergeopd.types import Sampling

APIS = {"vllm": VllmApi(), "sglang": SglangApi()}
RECIPE = """
recipe: 1
name: served
seed: 0
threads: 1
student: {{model: {student}}}
teachers: {{expert: {card}}}
prompts: [{{source: {prompts}, domain: words}}]
rollout: {{engine: {engine}, url: "{url}", max_new_tokens: 24, ahead: {ahead}, parity: {{every: 1, num_responses: 4}}}}
phases:
  - {{name: merge, updates: 6, prompts_per_round: 8, updates_per_round: 2, loss: reverse_kl}}
optimizer: {{lr: 1.0e-3}}
output: {output}
"""


class Decoder:
    """Not asked: the servers find stop texts."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raise AssertionError


@dataclass
class Folders:
    """Publishes folders that exist."""

    folder: Path

    def publish(self, source: object, version: int) -> Path:
        return self.folder

    def discard(self) -> None:
        pass


@pytest.fixture
def engine(server: Any) -> Iterator[ServedEngine]:
    """An engine on the server; afterwards the server has its first weights again."""
    context = EngineContext(
        (END_ID,), Decoder(), torch.device("cpu"), 0, deal=lambda r, g: g(r), run_on_first=lambda work: work()
    )
    made = ServedEngine(
        APIS[server.engine],
        RunningServers([server.url]),
        context,
        Folders(server.model),
        padding=range(NUM_TOKENS, NUM_ROWS),
        concurrency=16,
        lost_s=60.0,
        timeout_s=60.0,
    )
    # Random weights give the rows of padding probabilities, unlike trained ones.
    made._opened().banned = made.padding
    yield made
    made.publisher.folder = server.model  # type: ignore[attr-defined]
    made.sync_weights(None, 99)  # type: ignore[arg-type]
    made.close()


def generate(
    engine: ServedEngine, requests: Sequence[GenerationRequest], sampling: Sampling
) -> list[Completion]:
    return engine.submit(requests, sampling).wait(lambda _: None)


def expected(model: Path, prompt: Sequence[int], response: Sequence[int], how: Sampling) -> np.ndarray:
    """Log-probs by transformers, of the distribution over tokens after temperature and truncation."""
    logits = reference_logits(model, [*prompt, *response])[len(prompt) - 1 : -1, :NUM_TOKENS].double()
    values = []
    for row, token in zip((logits / how.temperature).softmax(-1), response, strict=True):
        probs, order = row.sort(descending=True)
        kept = int((probs.cumsum(0) < how.top_p).sum()) + 1 if how.top_p < 1 else len(probs)
        assert token in order[:kept]
        values.append(float(row[token].log() - probs[:kept].sum().log()))
    return np.array(values)


@pytest.mark.parametrize("how", [Sampling(1.0, 1.0, 24), Sampling(0.7, 0.9, 24)])
def test_logprobs_are_those_of_the_weights_that_were_loaded_last(
    engine: ServedEngine, server: Any, engine_model: Callable[[int], Path], how: Sampling
) -> None:
    """The prompts share a long prefix, whose cached states would be those of the weights before."""
    prefix = np.random.default_rng(0).integers(2, NUM_TOKENS, 160)
    tails = [np.random.default_rng(i).integers(2, NUM_TOKENS, 4) for i in range(6)]
    requests = [GenerationRequest(str(i), 0, np.concatenate([prefix, t])) for i, t in enumerate(tails)]
    for version, model in enumerate((server.model, engine_model(1), server.model), start=1):
        engine.publisher.folder = model  # type: ignore[attr-defined]
        engine.sync_weights(None, version)  # type: ignore[arg-type]
        for request, response in zip(requests, generate(engine, requests, how), strict=True):
            assert response.policy_version == version
            ids = response.response_ids.tolist()
            logprobs = expected(model, request.prompt_ids.tolist(), ids, how)
            np.testing.assert_allclose(response.logprobs, logprobs, atol=1e-4)


def test_responses_end_at_end_tokens_stop_texts_or_the_limit(engine: ServedEngine, server: Any) -> None:
    engine.sync_weights(None, 1)  # type: ignore[arg-type]
    prompt = GenerationRequest("x", 0, np.arange(2, 12))
    many = [GenerationRequest("x", i, prompt.prompt_ids) for i in range(48)]
    responses = generate(engine, many, Sampling(1.0, 1.0, 48, stop=("e",)))
    finishes = {response.finish for response in responses}
    assert "stop" in finishes
    for response in responses:
        ids = response.response_ids.tolist()
        assert (response.finish == "eos") == (ids[-1] == END_ID)
        assert (response.finish == "length") == (len(ids) == 48 and response.finish not in ("eos", "stop"))
        assert END_ID not in ids[:-1]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_keeps_servers_and_student_equal(
    server: Any, engine_model: Callable[[int], Path], tmp_path: Path, ahead: int
) -> None:
    student, teacher = server.model, engine_model(1)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for folder in (student, teacher):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    rows = [{"prompt": f"def word_{i}(self) -> None:"} for i in range(40)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    card = tmp_path / "expert.yaml"
    card.write_text(f"card: 1\nname: expert\nmodel: {teacher}\ndomains: [words]\n", encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    output = tmp_path / "run"
    recipe.write_text(
        RECIPE.format(
            student=student, card=card, prompts=prompts, engine=server.engine, url=server.url, ahead=ahead,
            output=output,
        )
    )  # fmt: skip
    mergeopd.run(recipe)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    served = [line["serving"] for line in lines if line["serving"]]
    assert [one["lag"] for one in served] == [0.0, *([2.0 * ahead] * 2)]
    # In the first round, the random weights sample rows of padding, which are banned from then on.
    assert served[0]["engine_gap"] < 0.05
    for one in served[1:]:
        assert one["engine_gap"] < 1e-5
        assert one["engine_gap_max"] < 1e-3
        assert (one["num_stale"], one["num_lost"]) == (0, 0)
    assert not list((output / "weights").iterdir())
