"""Align the recipe's own texts with the tokens of a teacher that has another tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mergeopd.intervals import wilson
from mergeopd.reporting.inspection import Finding, FindingLevel
from mergeopd.reporting.result import Estimate
from mergeopd.teacher.cross_tokenizer import CrossTokenizer
from mergeopd.types import Prompt, Rollout, token_ids

_NUM_TEXTS, _MAX_CHARACTERS = 256, 4_000
# Shares of aligned tokens below which a bridge loses some, or most, of the teacher's signal.
_FEW_ALIGNED, _HALF_ALIGNED = 0.95, 0.5


@dataclass(frozen=True)
class Coverage:
    """Texts of the recipe in the student's tokens, aligned with the teacher's; shares are per prompt."""

    shares: tuple[float, ...]
    num_student: int
    num_teacher: int
    num_aligned: int
    num_one_to_one: int
    unaligned: Counter[str]

    @property
    def estimate(self) -> Estimate:
        if not self.shares:
            return Estimate(None)
        interval = wilson(self.shares)
        return Estimate(float(np.mean(self.shares)), interval.low, interval.high)

    @property
    def ratio(self) -> float:
        """Tokens of the teacher per token of the student."""
        return self.num_teacher / self.num_aligned if self.num_aligned else 1.0


def align_prompts(cross_tokenizer: CrossTokenizer, prompts: Sequence[Prompt]) -> Coverage:
    """Align what a recipe has of responses: references and responses of the rows, and the users' messages."""
    step = max(1, len(prompts) // _NUM_TEXTS)
    shares, unaligned = [], Counter[str]()
    num_student = num_teacher = num_aligned = one_to_one = 0
    for prompt in prompts[::step][:_NUM_TEXTS]:
        texts = [text[:_MAX_CHARACTERS] for text in _texts(prompt) if text.strip()]
        rollouts = [
            Rollout(prompt, 0, token_ids(()), token_ids(ids), "dataset", "eos")
            for ids in cross_tokenizer.student.encode(texts)
        ]
        num = sum(len(rollout.response_ids) for rollout in rollouts)
        num_of_prompt = 0
        for aligned in cross_tokenizer.align(rollouts):
            num_of_prompt += aligned.num_student
            num_teacher += aligned.num_teacher
            one_to_one += aligned.num_one_to_one
            unaligned.update({reason.value: count for reason, count in aligned.unaligned.items()})
        num_student, num_aligned = num_student + num, num_aligned + num_of_prompt
        shares += [num_of_prompt / num] if num else []
    return Coverage(tuple(shares), num_student, num_teacher, num_aligned, one_to_one, unaligned)


def _texts(prompt: Prompt) -> Iterator[str]:
    yield from (message.content for message in prompt.messages if message.role == "user")
    if isinstance(prompt.response, str):
        yield prompt.response
    elif prompt.reference is not None:
        yield prompt.reference


def alignment(coverage: Coverage) -> Iterator[Finding]:
    if not coverage.num_student:
        yield Finding("alignment", "note", "the recipe's prompts have no text to align")
        return
    share = coverage.num_aligned / coverage.num_student
    text = (
        f"{share:.1%} of the student's tokens of {len(coverage.shares)} prompts and references align with "
        f"the teacher's, {coverage.num_one_to_one / coverage.num_student:.1%} one to one; "
        f"{coverage.ratio:.2f} of its tokens for one of the student's"
    )
    if coverage.unaligned:
        text += "; left out: " + ", ".join(f"{num:,} {why}" for why, num in coverage.unaligned.most_common(3))
    level: FindingLevel = "ok" if share >= _FEW_ALIGNED else "note" if share >= _HALF_ALIGNED else "problem"
    remedy = "`mergeopd tokenizers` shows what differs; a teacher of the student's family has every token"
    yield Finding("alignment", level, text, "" if level == "ok" else remedy)
