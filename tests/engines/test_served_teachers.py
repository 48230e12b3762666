"""A teacher on a real server gives the losses and gradients of the same weights here, to 1e-4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_models
import numpy as np
import pytest
import torch
from enumeration import CPU, engine_round

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, Models, load_models
from mergeopd.preflight.inputs import preflight
from mergeopd.types import Rollout, token_flags

# A pooling server returns hidden states and generates nothing; a generating one returns log-probabilities.
POOLER = {"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": False}
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config", json.dumps(POOLER))
HIDDEN_STATES = ("--enable-return-hidden-states",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher, without padding rows: log-probabilities of servers are over all rows."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_models, "NUM_ROWS", engine_models.NUM_TOKENS)
        for seed, name in enumerate(("student", "teacher")):
            engine_models.write_engine_model(folder / name, seed + 20)
    rows = [{"prompt": text} for text in ("def total(numbers):", "Sort 3 1 2", "import json")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def parts_of(folder: Path, loss: Any, served: dict[str, Any] | None) -> Models:
    card = {"card": 1, "name": "teacher", "model": "teacher"} | ({"served": served} if served else {})
    (folder / "teacher.yaml").write_text(json.dumps(card))
    document = {
        "recipe": 1,
        "name": "served",
        "student": {"model": "student"},
        "teachers": {"expert": "teacher.yaml"},
        "prompts": [{"source": "prompts.jsonl", "domain": "code", "teachers": ["expert"]}],
        "rollout": {"max_new_tokens": 40},
        "phases": [{"name": "merge", "updates": 1, "prompts_per_round": 3, "loss": loss}],
        "optimizer": {"lr": 0.01},
        "output": "run",
    }
    (folder / "recipe.yaml").write_text(json.dumps(document))
    inputs = preflight(folder / "recipe.yaml", with_servers=served is not None)
    return load_models(inputs, Machine(CPU, SingleProcess()))


def rollouts_of(parts: Models) -> list[Rollout]:
    """Responses of 2 to 40 random tokens, some with a part that is not trained."""
    random = np.random.default_rng(1)
    rollouts = []
    (prompts,) = parts.inputs.prompts.values()
    for prompt in prompts:
        ids = parts.inputs.student.render(prompt)
        for sample, length in enumerate((2, 17, 40)):
            response = random.integers(2, engine_models.NUM_TOKENS, length)
            flags = None if sample < 2 else token_flags([i < 9 or i > 20 for i in range(length)])
            logprobs = np.full(length, -1.0, np.float32)
            rollouts.append(Rollout(prompt, sample, ids, response, "student", "eos", logprobs, trained=flags))
    return rollouts


def compare(folder: Path, loss: Any, served: dict[str, Any]) -> None:
    local = parts_of(folder, loss, None)
    rollouts = rollouts_of(local)
    ((expected, expected_stats),) = engine_round(local, rollouts)
    ((gradients, stats),) = engine_round(parts_of(folder, loss, served), rollouts)
    assert stats.loss == pytest.approx(expected_stats.loss, rel=1e-4, abs=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-4 * largest, rtol=0), name


ON_STUDENT = {"top_k": 16, "of": "student"}
ON_TEACHER = {"top_k": 16, "of": "teacher"}


@pytest.mark.parametrize(
    "loss",
    [
        {"reverse_kl": 1.0, "support": {**ON_STUDENT, "rest": "tail"}},
        {"reverse_kl": 1.0, "support": {**ON_STUDENT, "rest": "generalised"}},
        {"forward_kl": 1.0, "support": ON_TEACHER},
        "sampled_reverse_kl",
    ],
)
def test_log_probabilities_of_vllm(start_server: Callable[..., Any], folder: Path, loss: Any) -> None:
    server = start_server("vllm", folder / "teacher", script="vllm_server.py")
    compare(folder, loss, {"url": server.url, "engine": "vllm"})


@pytest.mark.parametrize("loss", ["reverse_kl", {"forward_kl": 1.0, "temperature": 1.5}])
def test_hidden_states_of_vllm(start_server: Callable[..., Any], folder: Path, loss: Any) -> None:
    server = start_server("vllm", folder / "teacher", POOLING)
    compare(folder, loss, {"url": server.url, "engine": "vllm", "hidden_states": True})


@pytest.mark.parametrize("loss", ["reverse_kl", {"forward_kl": 1.0, "temperature": 1.5}])
def test_hidden_states_of_sglang(start_server: Callable[..., Any], folder: Path, loss: Any) -> None:
    """Twice: what its cache holds from other requests is not returned, and not needed."""
    server = start_server("sglang", folder / "teacher", HIDDEN_STATES)
    compare(folder, loss, {"url": server.url, "engine": "sglang", "hidden_states": True})
    compare(folder, loss, {"url": server.url, "engine": "sglang", "hidden_states": True})


@pytest.mark.parametrize("loss", [{"forward_kl": 1.0, "support": ON_TEACHER}, "sampled_reverse_kl"])
def test_log_probabilities_of_sglang(start_server: Callable[..., Any], folder: Path, loss: Any) -> None:
    server = start_server("sglang", folder / "teacher", HIDDEN_STATES)
    compare(folder, loss, {"url": server.url, "engine": "sglang"})
