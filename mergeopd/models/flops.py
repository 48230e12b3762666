"""Floating-point operations of a model's passes, from its config and the shapes of its weights.

A matrix with P parameters takes 2 P operations per token forward and 4 P backward, so training takes 6 P per
token (Kaplan et al. 2020, 2001.08361). Attention adds 4 x layers x width of the heads per token and position
that it reads, forward, and twice as much backward (PaLM, 2204.02311, appendix B, there without the causal
half). Of a mixture of experts, a token counts those that compute it. These are the operations that the method
needs: padding, recomputed activations, norms, softmaxes and the optimizer are left out, and sliding windows
count as full attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.experts import is_of_expert
from mergeopd.models.facts import ModelFacts, positive_int, read_config
from mergeopd.models.layout import is_weight
from mergeopd.models.stored import stored_weights

TRAINING = 3
"""Forward and backward together, in units of a forward pass."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Operations of a forward pass: the body's per token, attention's per token and position that it reads,
    the head's per row of logits.
    """

    per_token: int
    per_position: int
    per_logits: int

    @classmethod
    def read(cls, folder: Path) -> ModelFlops:
        """Read config.json and the headers of the weights; no weights.

        Raises:
            ModelError: config or weights are missing, damaged, or of an unknown architecture.
        """
        facts, config = ModelFacts.read(folder, "readable"), read_config(folder)
        outside = (facts.embedding_name, facts.head_name)
        stored = stored_weights(facts, Checkpoint.open(folder))
        weights = {name: stored[name] for name in stored if is_weight(name) and name not in outside}
        of_experts = {name for name in weights if is_of_expert(facts.model_type, name)}
        all_tokens = sum(
            prod(t.shape) for n, t in weights.items() if len(t.shape) > 1 and n not in of_experts
        )
        some = sum(prod(weights[name].shape) for name in of_experts)
        if facts.experts is not None:
            some = some * facts.experts.per_token // facts.experts.count
        num_heads = positive_int(folder / "config.json", config, "num_attention_heads")
        head_dim = config.get("head_dim") or facts.hidden_size // num_heads
        return cls(
            per_token=2 * (all_tokens + some),
            per_position=4 * facts.num_layers * num_heads * head_dim,
            per_logits=2 * facts.vocab_rows * facts.hidden_size,
        )

    def forward(self, num_tokens: int, num_logits: int) -> int:
        """Return the operations of a causal pass over one sequence, with logits at some of its tokens.

        Generating a sequence with a cache of keys and values takes as many.
        """
        positions = num_tokens * (num_tokens + 1) // 2
        return self.per_token * num_tokens + self.per_position * positions + self.per_logits * num_logits


@dataclass(frozen=True, slots=True)
class TrainingFlops:
    """Operations of a run, by stage, from the lengths of its responses."""

    student: ModelFlops
    teachers: Mapping[str, ModelFlops]

    def of_generation(self, num_prompt: int, num_response: int, teacher: str | None) -> Counter[str]:
        """Return the operations of generating a response: `rollout` by the student, `text` by a teacher.

        Those of a model behind an API are not known, and count as none.
        """
        model = self.student if teacher is None else self.teachers.get(teacher)
        if model is None:
            return Counter()
        stage = "rollout" if teacher is None else "text"
        return Counter({stage: model.forward(num_prompt + num_response, num_response)})

    def of_training(
        self, num_tokens: int, num_trained: int, teachers: Collection[str], *, prior_policy: bool
    ) -> Counter[str]:
        """Return the operations of training on a sequence of prompt and response, `num_trained` in the loss.

        `teachers` includes their logits of the trained tokens, `update` the prior policy's pass, if any.
        Teachers with another prompt or tokenizer count as if the sequence had as many tokens; served ones,
        whose passes are not on this machine, do not count.
        """
        passes = TRAINING + (1 if prior_policy else 0)
        return Counter(
            update=passes * self.student.forward(num_tokens, num_trained),
            teachers=sum(
                self.teachers[name].forward(num_tokens, num_trained)
                for name in teachers
                if name in self.teachers
            ),
        )
