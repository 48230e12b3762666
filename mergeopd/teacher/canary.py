"""Check that a loaded teacher is the model its card describes, by log-probabilities on a recorded sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mergeopd.data.canary import sample_ids
from mergeopd.data.renderer import Renderer
from mergeopd.errors import TeacherError
from mergeopd.loss.heads import Head
from mergeopd.loss.observe import observe
from mergeopd.messages import shown
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.teacher.protocol import TeacherSequence
from mergeopd.types import token_ids

# Log-probabilities differ by a few hundredths of a nat between bfloat16 and float32, and by whole nats for a
# model with a re-initialised layer.
_TOLERANCE_NATS = 0.1
# Fraction of the largest possible entropy, log V, that no trained model reaches over a whole batch.
_UNIFORM = 0.995


@dataclass(frozen=True, slots=True)
class Canary:
    """A card's sample: a response with the log-probabilities that the described model gives its tokens.

    With `copy`, they were measured when this quantised copy of the model was made.
    """

    teacher: str
    sequence: TeacherSequence
    logprobs: tuple[float, ...]
    vocab_size: int
    copy: Path | None = None

    @classmethod
    def of(cls, teacher: TeacherPlan, renderer: Renderer) -> Canary | None:
        """Build the canary of a teacher's card, in the teacher's ids; None without a card's sample."""
        if teacher.canary is None:
            return None
        prompt, response = sample_ids(renderer, teacher.canary.prompt, teacher.canary.response)
        sequence = TeacherSequence(token_ids(prompt), token_ids(response))
        return cls(teacher.name, sequence, teacher.canary.logprobs, renderer.vocab_size)

    def verify(self, hidden_ND: Tensor, head: Head) -> None:
        """Compare a loaded teacher's log-probabilities of the sample with the card's.

        A run may leave out ids that the student does not have; the card's numbers are over all ids of the
        teacher.

        Raises TeacherError when they differ by more than rounding.
        """
        head = replace(head, num_valid=self.vocab_size)
        self.compare(logprobs(hidden_ND, head, self.sequence.response_ids.tolist()))

    def compare(self, measured: Sequence[float]) -> None:
        """Compare measured log-probabilities of the sample with the card's. Raises TeacherError."""
        if len(measured) != len(self.logprobs):
            raise TeacherError(
                f"teacher {self.teacher!r} cuts its card's sample into {len(measured)} tokens, the "
                f"card has log-probabilities of {len(self.logprobs)}; write the card again with "
                "mergeopd new teacher"
            )
        gap = sum(abs(a - b) for a, b in zip(measured, self.logprobs, strict=True)) / len(measured)
        if not gap <= _TOLERANCE_NATS and self.copy is not None:
            raise TeacherError(
                f"teacher {self.teacher!r}: its quantised copy in {shown(self.copy)} is damaged: the "
                f"log-probabilities of a sample are off by {gap:.2f} nats per token from those when it was "
                "made; delete the folder, and it is made again"
            )
        if not gap <= _TOLERANCE_NATS:
            raise TeacherError(
                f"teacher {self.teacher!r} is not the model its card describes: the log-probabilities of its "
                f"own sample are off by {gap:.2f} nats per token, rounding explains at most "
                f"{_TOLERANCE_NATS}; check the weights, or write the card again with mergeopd new teacher"
            )


def refuse_uniform(teacher: str, mean_entropy: float, num_valid: int, temperature: float = 1.0) -> None:
    """Raise TeacherError for a teacher that gives all tokens the same probability.

    `mean_entropy` is in nats, of logits divided by `temperature`. Near the largest entropy, a trained
    teacher's distance from it is proportional to 1 / temperature^2.
    """
    largest = math.log(num_valid)
    lack = (largest - mean_entropy) * max(temperature, 1.0) ** 2
    if lack <= (1.0 - _UNIFORM) * largest:
        raise TeacherError(
            f"teacher {teacher!r} gives all {num_valid} tokens the same probability "
            f"(entropy {mean_entropy:.3f} of at most {largest:.3f} nats); its weights are not trained, "
            "or damaged"
        )


def logprobs(hidden_ND: Tensor, head: Head, response_ids: Sequence[int]) -> list[float]:
    """Return log p of each response token, in nats, over the true vocabulary."""
    values: list[float] = observe(
        hidden_ND, head, torch.tensor(response_ids, device=hidden_ND.device)
    ).logprob.tolist()
    return values
