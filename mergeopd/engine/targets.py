"""The targets of a round, kept between the teachers' passes and the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from mergeopd.batch.packing import MicroBatchPlan
from mergeopd.batch.records import Alignments
from mergeopd.loss.heads import Hidden
from mergeopd.loss.targets import Sampled, Target, TopK
from mergeopd.teacher.hidden_cache import HiddenCache
from mergeopd.teacher.local import ResidentHeads
from mergeopd.teacher.protocol import SupportIds, TargetSpec, TeacherSequence
from mergeopd.teacher.token_view import TokenView
from mergeopd.types import Rollout


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """The targets of a round by teacher; `spec` is None where no teacher is needed.

    Hidden states are kept where the loss needs whole distributions. Otherwise a teacher's top k, or the
    sampled token's log-probability: a few numbers per token, and no head in memory during the updates.
    `alignments` are those of teachers with other tokenizers. `supports` are the student's likeliest ids at
    each trained token, by rollout, where a teacher is asked for them (`student_top_k`); of this copy's
    rollouts only.
    """

    cache: HiddenCache
    spec: TargetSpec | None
    views: Mapping[str, TokenView]
    heads: ResidentHeads
    alignments: Alignments = field(default_factory=dict)
    supports: Mapping[int, SupportIds] = field(default_factory=dict)

    def spec_of(self, teacher: str) -> TargetSpec:
        """Return the kind of target kept for a teacher. Raises ValueError where none is needed."""
        if self.spec is None:
            raise ValueError(f"the phase needs no teacher, so nothing is kept of {teacher!r}")
        spec = self.views[teacher].required(self.spec)
        return self.heads.teachers[teacher].capabilities.smallest(spec)

    def sequences(
        self, teacher: str, rollouts: Sequence[Rollout], indices: Sequence[int]
    ) -> dict[int, TeacherSequence]:
        """Return these rollouts in the teacher's tokens, by index; those without tokens are left out."""
        alignments = self.alignments.get(teacher, {})
        read = {i: self.views[teacher].read(rollouts[i], alignments.get(i)) for i in indices}
        has_support = self.spec_of(teacher).kind == "student_top_k"
        return {
            i: replace(sequence, support=self.supports[i]) if has_support else sequence
            for i, sequence in read.items()
            if sequence is not None
        }

    def of(self, pack: MicroBatchPlan) -> dict[str, Target]:
        """Return the pack's targets for the kernel, by teacher; heads of all other teachers are freed.

        A teacher with another tokenizer has a row per token of its own, and is absent without any.
        """
        if self.spec is None:
            return {}
        specs = {name: self.spec_of(name) for name in pack.teachers}
        heads = self.heads.of([name for name, spec in specs.items() if spec.kind == "hidden"])
        targets: dict[str, Target] = {}
        for name, spec in specs.items():
            rows = self._rows(name, pack)
            if rows is None:
                continue
            match spec.kind:
                case "hidden":
                    targets[name] = Hidden(rows, heads[name])
                case "top_k":
                    targets[name] = TopK.unpack(rows)
                case "student_top_k":
                    targets[name] = TopK.unpack(rows, of="student")
                case "sampled":
                    targets[name] = Sampled.unpack(rows)
        return targets

    def span_logprobs(self, pack: MicroBatchPlan) -> dict[str, Tensor]:
        """Return log-probabilities of their own tokens, for teachers whose bridge is a policy term."""
        logprobs = {}
        for name in pack.teachers:
            if self.spec is not None and name in self.alignments and self.spec_of(name).kind == "sampled":
                rows = self._rows(name, pack)
                if rows is not None:
                    logprobs[name] = Sampled.unpack(rows).logprob
        return logprobs

    def _rows(self, teacher: str, pack: MicroBatchPlan) -> Tensor | None:
        """Return the kept rows of a pack for a teacher; None if the teacher scored none of them."""
        own = self.alignments.get(teacher)
        read = pack.rollouts if own is None else [i for i in pack.rollouts if len(own[i].teacher_ids)]
        return self.cache.gather(teacher, read) if read else None
