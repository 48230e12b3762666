"""Compare a rollout engine with the student during a run, and refuse engines that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from mergeopd.engine.rollouts import StudentRollouts
from mergeopd.engine.stages import Stages
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.rollout import AnyServerRollout, Parity, RolloutSettings
from mergeopd.rollout.protocol import GenerationRequest
from mergeopd.rollout.served import ServedEngine
from mergeopd.student.parity import LogprobGap, logprob_gap, refuse_gap
from mergeopd.student.protocol import Student
from mergeopd.types import Prompt, Rollout, Sampling

# Parity is compared on the beginnings of responses: gaps do not need long ones to show.
_COMPARED_TOKENS = 256


@dataclass
class ParityGuard:
    """Compares the servers' log-probabilities with the student's, as often as the recipe says."""

    plan: Plan
    model: Student
    rollouts: StudentRollouts
    stages: Stages
    # Versions of the weights in the first and the last comparison, and servers that were lost before it.
    _compared: tuple[int, int] | None = field(default=None, init=False)
    _num_lost: int = field(default=0, init=False)
    _gap: LogprobGap | None = field(default=None, init=False)

    def take(self) -> LogprobGap | None:
        """Return what was measured since the last call; None if nothing was."""
        gap, self._gap = self._gap, None
        return gap

    def check(self, prompts: Sequence[Prompt], settings: RolloutSettings, version: int) -> None:
        """Compare on responses to `prompts`, if that is due for weights of this version. Collective.

        The responses are sampled for that, with the weights that engine and student both have. Raises
        ServingError on the first process when they differ.
        """
        parity = settings.parity if isinstance(settings, AnyServerRollout) else None
        if parity is None or not self._is_due(parity, version):
            return
        first, _ = self._compared or (version, None)
        self._compared, self._num_lost = (first, version), self._lost_so_far()
        self._engine.compare_servers()
        gap = self._gap = self._measure(prompts[: parity.num_responses], settings)
        if not gap.mean <= parity.max_mean_gap:  # NaN is no agreement
            # One process reports what all know.
            self.stages.ranks.run_on_first(partial(refuse_gap, gap, parity.max_mean_gap))

    def _is_due(self, parity: Parity, version: int) -> bool:
        """Whether to compare the newest weights: the first, the first changed ones, every so many updates.

        And after a server was lost, as it may have been started in another way. Collective.
        """
        if self._compared is None or self._lost_so_far() > self._num_lost:
            return True
        first, last = self._compared
        return first == last < version or version // parity.every > last // parity.every

    @property
    def _engine(self) -> ServedEngine:
        assert isinstance(self.rollouts.engine, ServedEngine)
        return self.rollouts.engine

    def _lost_so_far(self) -> int:
        return self.stages.ranks.run_on_first(lambda: self._engine.counts().num_lost)

    def _measure(self, prompts: Sequence[Prompt], settings: RolloutSettings) -> LogprobGap:
        render = self.rollouts.student.render
        requests = [GenerationRequest(f"{prompt.key}#parity", 0, render(prompt)) for prompt in prompts]
        length = min(settings.max_new_tokens, _COMPARED_TOKENS)
        how = Sampling(settings.temperature, 1.0, length, settings.stop)
        on_progress = self.stages.begin("rollout", "comparing log-probabilities", len(requests), "responses")
        completions = self._engine.submit(requests, how).wait(on_progress)
        rollouts = [
            Rollout(prompt, 0, r.prompt_ids, c.response_ids, "student", c.finish, c.logprobs)
            for prompt, r, c in zip(prompts, requests, completions, strict=True)
        ]
        return logprob_gap(
            self.model,
            rollouts,
            settings.temperature,
            self.plan.student.micro_batch_tokens,
            self._engine.context.device,
            self.stages.ranks,
        )
