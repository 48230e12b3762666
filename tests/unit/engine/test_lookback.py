"""The policy before a round: what is kept of it, and what it takes to hand it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from enumeration import EOS, methods_parts

from mergeopd.engine.lookback import look_back
from mergeopd.engine.observing import Observed, kept
from mergeopd.engine.scoring import score
from mergeopd.report.events import Reporters
from mergeopd.teacher.cache import HiddenCache
from mergeopd.types import Rollout


def test_an_answer_travels_without_its_micro_batch(write_job: Callable[..., Path], tmp_path: Path) -> None:
    """Between processes a tensor is pickled with all that it is a view of."""
    parts = methods_parts(write_job, "student.micro_batch_tokens=100000", loss="reverse_kl")
    prompt = next(prompts[0] for _, prompts in sorted(parts.inputs.prompts.items()))
    ids = parts.inputs.student.render(prompt)
    answer = (0, 1, 2, 3) * 4 + (EOS,)
    mu = (-1.0,) * len(answer)
    rollouts = [Rollout(prompt, i, ids, answer, "student", "eos", mu) for i in range(50)]
    phase, quiet = parts.plan.phases[0], Reporters()
    work = parts.work(rollouts, 0, 1)
    assert len(work.packs_of(0)) == 1
    with HiddenCache(1 << 30, tmp_path, torch.device("cpu")) as cache:
        observed = Observed(cache, kept(phase.loss))
        score(parts, rollouts, work, observed, quiet)
        found = look_back(parts, rollouts, phase, work, observed, quiet)
    assert len(found) == 50
    for before in found.values():
        tensors = [before.logprob_S, *before.logprob_T.values()]
        assert [t.untyped_storage().nbytes() for t in tensors] == [len(answer) * 8] * len(tensors)
