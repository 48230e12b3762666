"""All that decides what the tiny experts are, beside the seed and this package's own source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and training lengths; the defaults make the quick start's experts."""

    # Splits are drawn in this order from one stream, so the evaluation stays when the others grow.
    rows: Mapping[str, int] = field(default_factory=lambda: {"eval": 256, "merge": 2000, "train": 6000})

    num_tokens: int = 448
    # The embedding has more rows than there are tokens, as in released models, ...
    num_rows: int = 464
    # ... and experts trained elsewhere are padded differently (Qwen: 151936 or 152064 rows).
    expert_num_rows: Mapping[str, int] = field(default_factory=lambda: {"tool": 512})

    # An expert may have been tuned behind a system prompt that the student does not have.
    expert_system: Mapping[str, str] = field(default_factory=lambda: {"largest": "answer with one number"})

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    head_dim: int = 32
    num_heads: int = 4
    num_key_value_heads: int = 2

    # Weak in every domain, but no longer ignorant: the student starts from it.
    base_updates: int = 140
    base_batch: Mapping[str, int] = field(default_factory=lambda: {"largest": 24, "sort": 24, "tool": 48})
    base_lr: float = 2e-3
    # Long enough for 97 % or more on the domain, as seen over several seeds.
    expert_updates: Mapping[str, int] = field(
        default_factory=lambda: {"largest": 200, "sort": 150, "tool": 130}
    )
    expert_batch: int = 64
    expert_lr: float = 3e-3
    warmup_updates: int = 10

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self)
