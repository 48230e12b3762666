"""How a teacher reads the student's responses, and how its targets meet the student's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mergeopd.align.answers import Alignment
from mergeopd.batch import records
from mergeopd.batch.collate import pack_groups
from mergeopd.batch.micro_batch import BridgedTarget
from mergeopd.batch.records import OldLogProbs, PreparedRollout
from mergeopd.data.renderer import Renderer, masked_in_teacher_term
from mergeopd.loss.cross_tokenizer import Bridge
from mergeopd.loss.heads import Hidden
from mergeopd.loss.policy import bounded
from mergeopd.loss.targets import Target
from mergeopd.recipe.loss_terms import Loss
from mergeopd.rollout.protocol import Completion
from mergeopd.teacher.cross_tokenizer import CrossTokenizer
from mergeopd.teacher.protocol import TargetSpec, TeacherSequence
from mergeopd.types import Finish, Prompt, Rollout, TokenIds, token_ids


class TokenView(records.TokenView, Protocol):
    """How one teacher reads the student's responses, and how its targets meet the student's tokens."""

    @property
    def bridge_kind(self) -> str | None:
        """The recipe's name of the bridge to another tokenizer; None for the student's own."""

    def align(self, rollouts: Mapping[int, Rollout]) -> dict[int, Alignment]:
        """Which tokens of both sides cover the same bytes, by rollout; empty for the same tokens."""

    def read(self, rollout: Rollout, alignment: Alignment | None) -> TeacherSequence | None:
        """The response as the teacher reads it; None where it reads nothing of it."""

    def required(self, spec: TargetSpec) -> TargetSpec:
        """What must be kept of this teacher where the loss needs `spec`."""

    def student_ids(self, completion: Completion, prompt: Prompt) -> tuple[TokenIds, Finish]:
        """What the teacher generated in the student's ids, and how it ends."""


@dataclass(frozen=True)
class SameTokens:
    """A teacher with the student's tokenizer: it reads the response's ids as they are."""

    renderer: Renderer
    student: Renderer

    @property
    def bridge_kind(self) -> str | None:
        """None: there is none."""
        return None

    def align(self, rollouts: Mapping[int, Rollout]) -> dict[int, Alignment]:
        """Nothing: the tokens are the same."""
        return {}

    def read(self, rollout: Rollout, alignment: Alignment | None) -> TeacherSequence:
        """The response behind the teacher's own rendering of the prompt."""
        return TeacherSequence(self.renderer.render(rollout.prompt), rollout.response_ids, rollout.trained)

    def required(self, spec: TargetSpec) -> TargetSpec:
        """What the loss needs of every teacher."""
        return spec

    def loss_weight(self, loss: Loss, updates_done: int) -> float:
        """1: the objective has the weights of its terms."""
        return 1.0

    def masked(self, rollout: Rollout) -> tuple[int, ...]:
        """Trained tokens, by position, that this teacher's term skips: end tokens that are not its own."""
        own = {"": self.renderer}
        return masked_in_teacher_term(rollout.trained_ids, self.student, own).get("", ())

    def advantage(self, old: OldLogProbs) -> Tensor | None:
        """None: divergences and policy terms read this teacher's log-probabilities themselves."""
        return None

    def target(
        self, target: Target, members: Sequence[PreparedRollout], like: Tensor
    ) -> Target | BridgedTarget | None:
        """The target as it is: its rows are those of the student."""
        return target

    def student_ids(self, completion: Completion, prompt: Prompt) -> tuple[TokenIds, Finish]:
        """What the teacher generated, with the student's end token in place of its own, and how it ends."""
        ids = completion.response_ids
        if completion.finish != "eos" or ids[-1] in self.student.eos_ids:
            return ids, completion.finish
        return token_ids([*ids[:-1].tolist(), self.student.end_id]), completion.finish


@dataclass(frozen=True)
class AlignedTokens:
    """A teacher with another tokenizer: it reads the text, and tokens that cover the same bytes meet.

    `bridge` compares the distributions of a group; None where the bridge is a policy term (`span`).
    """

    crossing: CrossTokenizer
    student: Renderer
    bridge: Bridge | None

    @property
    def bridge_kind(self) -> str | None:
        """The recipe's name of the bridge."""
        return self.crossing.bridge.kind

    def align(self, rollouts: Mapping[int, Rollout]) -> dict[int, Alignment]:
        """What the teacher reads of these responses."""
        return dict(zip(rollouts, self.crossing.align(list(rollouts.values())), strict=True))

    def read(self, rollout: Rollout, alignment: Alignment | None) -> TeacherSequence | None:
        """The aligned text in the teacher's ids; None where none of its tokens are aligned."""
        if alignment is None or not len(alignment.teacher_ids):
            return None
        prompt_ids = self.crossing.dialect.render(rollout.prompt)
        return TeacherSequence(prompt_ids, token_ids(alignment.teacher_ids))

    def required(self, spec: TargetSpec) -> TargetSpec:
        """Hidden states for a bridge between distributions, sampled tokens for a policy term."""
        return TargetSpec("sampled" if self.bridge is None else "hidden")

    def loss_weight(self, loss: Loss, updates_done: int) -> float:
        """The summed weight of the terms that the bridge stands for."""
        return loss.teachers_weight(updates_done)

    def masked(self, rollout: Rollout) -> tuple[int, ...]:
        """None: end tokens are aligned with each other."""
        return ()

    def advantage(self, old: OldLogProbs) -> Tensor | None:
        """Each group's log-ratio at each of its tokens, bounded; None where the bridge is no policy term."""
        span = self.crossing.bridge.span
        if span is None or self.crossing.teacher not in old.spans:
            return None
        return bounded(old.spans[self.crossing.teacher], span.bound)

    def target(
        self, target: Target, members: Sequence[PreparedRollout], like: Tensor
    ) -> Target | BridgedTarget | None:
        """The groups of a micro-batch with their weights: a group weighs as much as its student tokens."""
        if self.bridge is None or not isinstance(target, Hidden):
            return None
        own = [m.alignments[self.crossing.teacher] for m in members]
        groups = pack_groups(own, [m.rollout.num_trained for m in members], like.device)
        weights = like.new_tensor([m.token_weight * m.teacher_weight[self.crossing.teacher] for m in members])
        num_groups = [len(a.student_starts) for a in own]
        sizes = torch.tensor(num_groups, device=like.device)
        return BridgedTarget(
            teacher=self.crossing.teacher,
            target=target,
            labels=torch.from_numpy(np.concatenate([a.teacher_ids for a in own])).to(like.device),
            groups=groups,
            measure=self.bridge,
            weight_G=weights.repeat_interleave(sizes, output_size=sum(num_groups)) * groups.num_S.to(like),
        )

    def student_ids(self, completion: Completion, prompt: Prompt) -> tuple[TokenIds, Finish]:
        """The generated text in the student's ids, and how it ends.

        It may take more tokens of the student's. Where it is not given back whole, or would outgrow the
        student's context, it is cut.
        """
        room = self.student.max_positions - len(self.student.render(prompt))
        ids, whole = self.crossing.in_student_ids(completion.response_ids, ended=completion.finish == "eos")
        return token_ids(ids[:room]), completion.finish if whole and len(ids) <= room else "length"
