"""What each copy of the student computes of its own rollouts is what one process computes of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from enumeration import EOS, methods_parts, trainer_of

from mergeopd.batch.prepare import prepare
from mergeopd.engine.schedule import schedule_round
from mergeopd.engine.score import CollectedRound
from mergeopd.types import Rollout


def test_weights_of_three_copies_are_those_of_one_process(
    write_job: Callable[..., Path], tmp_path: Path
) -> None:
    parts = methods_parts(write_job, "student.micro_batch_tokens=40", loss="reverse_kl")
    prompts = [prompts[0] for _, prompts in sorted(parts.inputs.prompts.items())]
    rollouts = [
        Rollout(p, i, parts.inputs.student.render(p), (0, 1, 2) * (i + 1) + (EOS,), "student", "eos")
        for p in prompts
        for i in range(7)
    ]
    trainer, phase = trainer_of(parts), parts.plan.phases[0]
    whole = trainer.pipeline.work(rollouts, 0, 2)
    dealt = schedule_round(rollouts, 0, num_updates=2, max_tokens=40, members=((0,), (1,), (2,)))
    with trainer.scorer.score(CollectedRound(phase, 0, rollouts, [None] * len(rollouts), whole)) as scored:
        for one, several in zip(whole.updates, dealt.updates, strict=True):
            expected = trainer.updater.prepare(scored, one, 0)
            found = {}
            for copy in range(3):
                part = replace(scored, collected=replace(scored.collected, work=dealt))
                own = dealt.trained_by(copy, several.rollouts)
                assert sorted(i for pack in several.packs[copy] for i in pack.rollouts) == own
                mine = prepare(
                    rollouts, several.rollouts, own, phase, 0, part.targets.views, part.outcomes, part.old, {}
                )
                assert (mine.budgets, mine.overlap_share) == (expected.budgets, expected.overlap_share)
                assert not found.keys() & mine.rollouts.keys()
                found |= mine.rollouts
            assert found == dict(expected.rollouts)
