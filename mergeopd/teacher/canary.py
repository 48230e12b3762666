"""Check that a loaded teacher is the model its card describes, by log-probabilities on a recorded sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import torch
from torch import Tensor

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.errors import TeacherError
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.heads import Head, Projection
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.teacher.protocol import TeacherSequence
from mergeopd.types import Message, token_ids

# Between precisions (bfloat16 beside float32) log-probabilities move by a few hundredths of a nat; a model
# with a layer made anew moves them by whole ones.
_TOLERANCE_NATS = 0.1
# A share of the largest possible entropy, log V, that no trained model reaches over a whole batch.
_UNIFORM = 0.995
_DAY = datetime(2026, 1, 1)


@dataclass(frozen=True, slots=True)
class Canary:
    """A card's sample: a response with the log-probabilities that the described model gives its tokens."""

    teacher: str
    sequence: TeacherSequence
    logprobs: tuple[float, ...]
    vocab_size: int

    @classmethod
    def of(cls, teacher: TeacherPlan, dialect: Renderer) -> Canary | None:
        """The canary of a teacher's card, in the teacher's ids; None where the card has none."""
        if teacher.canary is None:
            return None
        prompt, response = sample_ids(dialect, teacher.canary.prompt, teacher.canary.response)
        sequence = TeacherSequence(token_ids(prompt), token_ids(response))
        return cls(teacher.name, sequence, teacher.canary.logprobs, dialect.vocab_size)

    def verify(self, hidden_ND: Tensor, head: Head) -> None:
        """Compare a loaded teacher's log-probabilities of the sample with the card's.

        A run may leave out ids that the student does not have; the card's numbers are over all ids of the
        teacher.

        Raises TeacherError when they differ by more than rounding.
        """
        head = replace(head, num_valid=self.vocab_size)
        found = logprobs(hidden_ND, head, self.sequence.response_ids.tolist())
        if len(found) != len(self.logprobs):
            raise TeacherError(
                f"teacher {self.teacher!r} cuts its card's sample into {len(found)} tokens, the "
                f"card has log-probabilities of {len(self.logprobs)}; write the card again with "
                "mergeopd new teacher"
            )
        gap = sum(abs(a - b) for a, b in zip(found, self.logprobs, strict=True)) / len(found)
        if not gap <= _TOLERANCE_NATS:
            raise TeacherError(
                f"teacher {self.teacher!r} is not the model its card describes: the log-probabilities of its "
                f"own sample are off by {gap:.2f} nats per token, rounding aside by at most "
                f"{_TOLERANCE_NATS}; check the weights, or write the card again with mergeopd new teacher"
            )


def refuse_uniform(teacher: str, mean_entropy: float, num_valid: int, temperature: float = 1.0) -> None:
    """Raise TeacherError for a teacher to which all tokens are alike.

    `mean_entropy` in nats, of logits divided by `temperature`: near the largest entropy, what a trained
    teacher lacks of it falls with the temperature's square.
    """
    largest = math.log(num_valid)
    lack = (largest - mean_entropy) * max(temperature, 1.0) ** 2
    if lack <= (1.0 - _UNIFORM) * largest:
        raise TeacherError(
            f"teacher {teacher!r} gives all {num_valid} tokens the same probability "
            f"(entropy {mean_entropy:.3f} of at most {largest:.3f} nats); its weights are not trained, "
            "or damaged"
        )


def sample_ids(dialect: Renderer, prompt: str, response: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of a sample, rendered as the model reads a user's message; a template that writes the date gets one
    and the same, whenever it is asked."""
    own = dialect.template
    template = ChatTemplate(own.source, own.special_tokens, name=own.name, now=lambda: _DAY)
    text = template.render((Message("user", prompt),))
    return tuple(dialect.tokenizer.encode(text)), tuple(dialect.tokenizer.encode(response))


def logprobs(hidden_ND: Tensor, head: Head, response_ids: Sequence[int]) -> list[float]:
    """log p of each response token, in nats, over the true vocabulary."""
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    projection = Projection("canary", head, hidden_ND, 1.0, dtype, Workspace())
    logits = projection.raw_logits(slice(0, len(hidden_ND)))
    projection.finish_logits(logits)
    labels = torch.tensor(response_ids, device=logits.device)[:, None]
    values: list[float] = logits.log_softmax(-1).gather(1, labels)[:, 0].tolist()
    return values
