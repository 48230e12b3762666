"""The gap between an engine's log-probabilities and the student's, against plain softmaxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.models import Machine, load_models
from mergeopd.errors import ServingError
from mergeopd.preflight.inputs import preflight
from mergeopd.student.parity import LogprobGap, logprob_gap, refuse_gap
from mergeopd.types import Finish, Message, Prompt, Rollout, token_flags, token_ids, token_logprobs

CPU = torch.device("cpu")
SEQUENCES: tuple[tuple[list[int], list[int], Finish], ...] = (
    ([0, 1], [2, 4], "eos"),
    ([3], [1, 1, 0, 2, 3], "length"),
    ([2, 2, 0], [4], "eos"),
    ([1], [3, 0, 3], "length"),
)
TEMPERATURE, V = 0.7, 5


def plain(folder: Path, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1, :V]
    rows = torch.log_softmax(logits / TEMPERATURE, -1)
    return rows.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


def test_the_gap_is_that_of_plain_softmaxes(write_job: Callable[..., Path]) -> None:
    inputs = preflight(write_job(dtype="float64"))
    student = load_models(inputs, Machine(CPU, SingleProcess())).student
    rng = np.random.default_rng(0)
    differences, rollouts = [], []
    for i, (prompt, response, finish) in enumerate(SEQUENCES):
        own = plain(Path(inputs.plan.student.model), prompt, response)
        engine = own + rng.normal(scale=0.1, size=len(own))
        trained = np.arange(len(own)) != 2  # the third token of a response is an environment's
        differences.append((own - engine)[trained])
        rollouts.append(
            Rollout(
                Prompt(f"p:{i}", "s", ("left", "right")[i % 2], (Message("user", "a"),), {"one": 1.0}),
                *(0, token_ids(prompt), token_ids(response), "student", finish, token_logprobs(engine)),
                trained=None if trained.all() else token_flags(trained),
            )
        )
    gap = logprob_gap(student, rollouts, TEMPERATURE, 8, CPU, SingleProcess())
    d = np.concatenate(differences)
    expected = (np.abs(d).mean(), np.abs(d).max(), (np.exp(d) - 1 - d).mean())
    assert (gap.mean, gap.max, gap.kl) == pytest.approx(expected, abs=1e-9)


def test_a_gap_above_the_bound_names_its_causes() -> None:
    with pytest.raises(
        ServingError, match=r"by 0\.21 nats .*at most 3.*max_mean_gap` is 0\.05.*prefix cache"
    ):
        refuse_gap(LogprobGap(0.21, 3.0, 0.1), 0.05)
