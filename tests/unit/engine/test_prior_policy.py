"""Log-probabilities of the prior policy: what is kept, and its size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from enumeration import CPU, EOS, methods_parts, trainer_of

from mergeopd.engine.prior_policy import PriorPolicy
from mergeopd.engine.score import CollectedRound
from mergeopd.types import Rollout


def test_old_logprobs_are_sent_without_their_micro_batch(
    write_job: Callable[..., Path], tmp_path: Path
) -> None:
    """Between processes a tensor is pickled with all that it is a view of."""
    parts = methods_parts(write_job, "student.micro_batch_tokens=100000", loss="reverse_kl")
    prompt = next(prompts[0] for _, prompts in sorted(parts.inputs.prompts.items()))
    ids = parts.inputs.student.render(prompt)
    answer = (0, 1, 2, 3) * 4 + (EOS,)
    mu = (-1.0,) * len(answer)
    rollouts = [Rollout(prompt, i, ids, answer, "student", "eos", mu) for i in range(50)]
    trainer = trainer_of(parts)
    work = trainer.pipeline.work(rollouts, 0, 1)
    assert len(work.packs_of(0)) == 1
    phase = parts.plan.phases[0]
    with trainer.scorer.score(CollectedRound(phase, 0, rollouts, [None] * 50, work)) as scored:
        prior_policy = PriorPolicy(parts.student, CPU, trainer.stages)
        found = prior_policy.score(rollouts, phase, work, scored.targets)
    assert len(found) == 50
    for before in found.values():
        tensors = [before.logprob_S, *before.logprob_T.values()]
        assert [t.untyped_storage().nbytes() for t in tensors] == [len(answer) * 8] * len(tensors)
