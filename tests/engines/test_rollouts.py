"""Rollouts by real servers: log-probs of the sampled distribution before and after weight updates; whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import NUM_TOKENS
from engine_rollouts import assert_logprobs_right, generate, make_engine, write_recipe
from tiny_experts.tokens import END_ID

import mergeopd
from mergeopd.rollout.protocol import GenerationRequest
from mergeopd.rollout.served import ServedEngine
from mergeopd.types import Sampling


@pytest.fixture
def engine(server: Any, restored: None) -> Iterator[ServedEngine]:
    made = make_engine(server, server.url)
    yield made
    made.close()


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
            assert_logprobs_right(model, request.prompt_ids.tolist(), response, how)


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
    server: Any, restored: None, engine_model: Callable[[int], Path], tmp_path: Path, ahead: int
) -> None:
    mergeopd.run(write_recipe(tmp_path, server, engine_model(1), ahead=ahead))
    output = tmp_path / "run"
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
