"""All that decides what the tiny experts are, beside the seed and this package's own source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Training:
    """How one model is trained. `batch` gives the rows per update of each domain."""

    until: float
    batch: Mapping[str, int]
    lr: float = 2e-3
    warmup_updates: int = 10
    check_every: int = 10
    cooldown_updates: int = 50
    max_updates: int = 400


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and trainings; the defaults make the quick start's experts."""

    # Splits are drawn in this order from one stream, so the evaluation stays when the others grow.
    rows: Mapping[str, int] = field(
        default_factory=lambda: {"eval": 256, "merge": 2000, "check": 128, "train": 6000}
    )

    num_tokens: int = 448
    # The embedding has more rows than there are tokens, as in released models, ...
    num_rows: int = 464
    # ... and experts trained elsewhere are padded differently (Qwen: 151936 or 152064 rows).
    expert_num_rows: Mapping[str, int] = field(default_factory=lambda: {"tool": 512})

    # An expert may have been tuned behind a system prompt that the student does not have.
    expert_system: Mapping[str, str] = field(default_factory=lambda: {"largest": "give one number"})

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    head_dim: int = 32
    num_heads: int = 4
    num_key_value_heads: int = 2

    # Learning comes in leaps whose moment depends on the seed, so training goes on until the accuracy on
    # held-back rows is reached, then the learning rate falls to zero over the cool-down.
    # The base stops early and at once, as a cool-down lifts it by 30 points: weak in every domain, but no
    # longer ignorant, as the student starts from it.
    base: Training = field(
        default_factory=lambda: Training(
            until=0.3,
            batch={"largest": 64, "sort": 32, "tool": 48},
            check_every=5,
            cooldown_updates=0,
        )
    )
    expert: Mapping[str, Training] = field(
        default_factory=lambda: {
            "largest": Training(until=0.94, batch={"largest": 96}),
            "sort": Training(until=0.9, batch={"sort": 64}),
            "tool": Training(until=0.97, batch={"tool": 48}),
        }
    )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self)
