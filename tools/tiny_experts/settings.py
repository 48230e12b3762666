"""All that decides what the tiny experts are, beside the seed and this package's own source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BaseTraining:
    """How the base is trained: each domain's rows per update, and the accuracy that is enough of it."""

    batch: Mapping[str, int]
    enough: Mapping[str, float]
    ceiling: float = 0.45
    lr: float = 2e-3
    warmup_updates: int = 10
    check_every: int = 3
    max_updates: int = 240


@dataclass(frozen=True, slots=True)
class ExpertTraining:
    """How an expert is trained: rows per update, and the accuracy at which it begins to cool down."""

    batch: int
    enough: float
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

    # Learning comes in leaps whose moment depends on the seed (and on a machine's rounding), so trainings end
    # by accuracy on held-back rows. The base, from which the student starts, is weak in every domain, but
    # past the guessing with which each begins: 0.25 for the largest of four, nothing for the others.
    base: BaseTraining = field(
        default_factory=lambda: BaseTraining(
            batch={"largest": 64, "sort": 32, "tool": 48},
            enough={"largest": 0.35, "sort": 0.2, "tool": 0.2},
        )
    )
    expert: Mapping[str, ExpertTraining] = field(
        default_factory=lambda: {
            "largest": ExpertTraining(batch=96, enough=0.94),
            "sort": ExpertTraining(batch=64, enough=0.9),
            "tool": ExpertTraining(batch=48, enough=0.97),
        }
    )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self)
