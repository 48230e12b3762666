"""What the clients of both engines rely on: versions, and log-probs that belong to the sampled distribution."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import reference_logits

PROMPT = [3, 50, 60, 70, 80, 4]


def sample(server: Any, num_tokens: int, temperature: float, top_p: float) -> tuple[list[int], np.ndarray]:
    """Return the ids of one response and the log-probs with which they were sampled."""
    shared = {"temperature": temperature, "top_p": top_p, "min_p": 0.0, "ignore_eos": True}
    if server.engine == "vllm":
        sampling = {**shared, "top_k": 0, "max_tokens": num_tokens, "logprobs": 0, "detokenize": False}
        body = {"model": "student", "token_ids": PROMPT, "sampling_params": sampling}
        choice = server.call("/inference/v1/generate", body)["choices"][0]
        return choice["token_ids"], np.array([one["logprob"] for one in choice["logprobs"]["content"]])
    sampling = {**shared, "top_k": 1024 if top_p < 1 else -1, "max_new_tokens": num_tokens}
    asked = {"return_logprob": True, "return_sampling_mask": top_p < 1}
    reply = server.call("/generate", {"input_ids": PROMPT, "sampling_params": sampling, **asked})
    facts = reply["meta_info"]
    if top_p < 1:
        return reply["output_ids"], np.array(facts["output_token_sampling_logprobs"])
    return reply["output_ids"], np.array([one[0] for one in facts["output_token_logprobs"]])


def expected_logprobs(model: Path, response: Sequence[int], temperature: float, top_p: float) -> np.ndarray:
    """Return the log-probs of a response's tokens after temperature, truncation to the top p, renormalization."""
    logits = reference_logits(model, [*PROMPT, *response])[len(PROMPT) - 1 : -1].double()
    expected = []
    for row, token in zip((logits / temperature).softmax(-1), response, strict=True):
        probs, order = row.sort(descending=True)
        kept = int((probs.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(probs)
        assert token in order[:kept], "a token outside the top p was sampled"
        expected.append(float(row[token].log() - probs[:kept].sum().log()))
    return np.array(expected)


def test_the_version_is_the_pinned_one(server: Any) -> None:
    spec = importlib.util.spec_from_file_location("build_engines", Path("tools/engines/build.py").absolute())
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    path = {"vllm": "/version", "sglang": "/server_info"}[server.engine]
    assert server.call(path)["version"] == build.VERSIONS[server.engine]
    assert server.call("/v1/models")["data"][0]["max_model_len"] == 1024


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.8)])
def test_logprobs_are_those_of_the_sampled_distribution(
    server: Any, temperature: float, top_p: float
) -> None:
    response, logprobs = sample(server, 64, temperature, top_p)
    assert len(response) == 64
    assert np.isfinite(logprobs).all()
    expected = expected_logprobs(server.model, response, temperature, top_p)
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    # The untruncated or untempered distribution would not pass.
    if temperature != 1:
        assert np.abs(logprobs - expected_logprobs(server.model, response, 1.0, 1.0)).max() > 0.1


def test_vllm_scores_ids_of_our_choice_per_position(start_server: Any, engine_model: Any) -> None:
    """Only the newer model runner does, which Triton's interpreter runs here."""
    server = start_server("vllm", engine_model(0), script="vllm_server.py")
    generator = torch.Generator().manual_seed(1)
    sequence = torch.randint(2, 340, (12,), generator=generator).tolist()
    ids = torch.randint(0, 352, (7, 4), generator=generator)
    sampling = {"max_tokens": 1, "prompt_logprob_token_ids": ids.tolist(), "prompt_logprob_start": 4}
    body = {"model": "student", "token_ids": sequence, "sampling_params": sampling}
    scores = server.call("/inference/v1/generate", body)["prompt_token_id_logprobs"]
    expected = reference_logits(server.model, sequence)[4:-1].log_softmax(-1).gather(1, ids)
    np.testing.assert_allclose(np.load(io.BytesIO(base64.b64decode(scores))), expected, atol=1e-4)
