"""Is a teacher who its card says? Its view of a sample of its own, compared before it teaches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

import torch
from torch import Tensor

from mergeopd.data.templates import ChatTemplate
from mergeopd.engine.dialect import Dialect
from mergeopd.errors import TeacherError
from mergeopd.loss.heads import Head, Projection
from mergeopd.loss.workspace import Workspace
from mergeopd.recipe.plan import Plan
from mergeopd.types import Message

# Between precisions (bfloat16 beside float32) log-probabilities move by a few hundredths of a nat; a model
# with a layer made anew moves them by whole ones.
_TOLERANCE_NATS = 0.1
# A share of the largest possible entropy, log V, that no trained model reaches over a whole batch.
_UNIFORM = 0.995
_DAY = datetime(2026, 1, 1)


@dataclass(frozen=True, slots=True)
class _Sample:
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    vocab_size: int


class Canaries:
    """The samples of all cards that have one; each is verified once per process.

    Only teachers that have a dialect here are: of several processes, one verifies.
    """

    def __init__(self, plan: Plan, dialects: Mapping[str, Dialect]) -> None:
        self._due: dict[str, _Sample] = {}
        self._hidden: dict[str, Tensor] = {}
        for name, teacher in plan.teachers.items():
            if teacher.canary is not None and name in dialects:
                prompt, response = teacher.canary.prompt, teacher.canary.response
                ids = sample_ids(dialects[name], prompt, response)
                self._due[name] = _Sample(*ids, teacher.canary.logprobs, dialects[name].vocab_size)

    def due(self, teacher: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Prompt and response to score in the teacher's turn; None when there is nothing to verify."""
        sample = self._due.get(teacher)
        return None if sample is None else (sample.prompt_ids, sample.response_ids)

    def keep(self, teacher: str, hidden: Tensor) -> None:
        """Hidden states of the sample, until the head is there."""
        self._hidden[teacher] = hidden

    def verify(self, teacher: str, head: Head) -> None:
        """Compare the teacher's log-probabilities of its sample with the card's, when they are due.

        Raises TeacherError when they differ by more than rounding.
        """
        hidden = self._hidden.pop(teacher, None)
        if hidden is None:
            return
        sample = self._due.pop(teacher)
        if len(sample.response_ids) != len(sample.logprobs):
            raise TeacherError(
                f"teacher {teacher!r} cuts its card's sample into {len(sample.response_ids)} tokens, the "
                f"card has log-probabilities of {len(sample.logprobs)}; write the card again with "
                "mergeopd new teacher"
            )
        # A run may leave out ids that the student does not have; the card's numbers are over all.
        found = logprobs(hidden, replace(head, num_valid=sample.vocab_size), sample.response_ids)
        gap = sum(abs(a - b) for a, b in zip(found, sample.logprobs, strict=True)) / len(found)
        if not gap <= _TOLERANCE_NATS:
            raise TeacherError(
                f"teacher {teacher!r} is not the model its card describes: the log-probabilities of its own "
                f"sample are off by {gap:.2f} nats per token, rounding aside by at most {_TOLERANCE_NATS}; "
                "check the weights, or write the card again with mergeopd new teacher"
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


def sample_ids(dialect: Dialect, prompt: str, response: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of a sample, rendered as the model reads a user's message; a template that writes the date gets one
    and the same, whenever it is asked."""
    own = dialect.template
    template = ChatTemplate(own.source, own.special_tokens, name=own.name, now=lambda: _DAY)
    text = template.render((Message("user", prompt),))
    return tuple(dialect.tokenizer.encode(text)), tuple(dialect.tokenizer.encode(response))


def logprobs(hidden_ND: Tensor, head: Head, response_ids: tuple[int, ...]) -> list[float]:
    """log p of each response token, in nats, over the true vocabulary."""
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    projection = Projection("canary", head, hidden_ND, 1.0, dtype, Workspace())
    logits = projection.raw_logits(slice(0, len(hidden_ND)))
    projection.finish_logits(logits)
    labels = torch.tensor(response_ids, device=logits.device)[:, None]
    values: list[float] = logits.log_softmax(-1).gather(1, labels)[:, 0].tolist()
    return values
