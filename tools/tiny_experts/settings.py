"""Everything that determines the tiny experts, besides the seed and this package's source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a Qwen3 model."""

    hidden_size: int = 96
    intermediate_size: int = 192
    num_layers: int = 3
    head_dim: int = 32
    num_heads: int = 4
    num_key_value_heads: int = 2


@dataclass(frozen=True, slots=True)
class BaseTraining:
    """Training of a base: rows of each domain per update, and the accuracy at which a domain pauses.

    A paused domain gets `paused_share` of its rows, so that it is not forgotten. Domains without an expert
    are skills that the base must have (`enough` near 1); no other domain may exceed `ceiling`, so that the
    experts have something to add.
    """

    batch: Mapping[str, int]
    enough: Mapping[str, float]
    ceiling: float = 0.45
    paused_share: float = 0.0
    lr: float = 2e-3
    warmup_updates: int = 10
    check_every: int = 3
    max_updates: int = 240

    def paused(self, rows: int) -> int:
        """Return the rows per update of a paused domain that otherwise has `rows`."""
        return round(self.paused_share * rows)


@dataclass(frozen=True, slots=True)
class ExpertTraining:
    """Training of an expert: rows per update, and the accuracy at which its learning rate begins to fall."""

    batch: int
    enough: float
    lr: float = 2e-3
    warmup_updates: int = 10
    check_every: int = 10
    cooldown_updates: int = 50
    max_updates: int = 400


def _base() -> BaseTraining:
    domains = ("total", "sort", "tool", "cells")
    return BaseTraining(
        batch={"total": 48, "sort": 32, "tool": 24, "cells": 12, "reverse": 32},
        enough={**dict.fromkeys(domains, 0.15), "reverse": 0.95},
        paused_share=0.25,
        lr=3e-3,
        check_every=5,
        max_updates=600,
    )


def _experts() -> Mapping[str, ExpertTraining]:
    return {
        "total": ExpertTraining(batch=64, enough=0.93, lr=3e-3),
        "sort": ExpertTraining(batch=64, enough=0.93, lr=3e-3),
        "tool": ExpertTraining(batch=48, enough=0.97, lr=3e-3),
        "cells": ExpertTraining(batch=24, enough=0.93, lr=3e-3),
    }


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and trainings of one set of experts.

    Learning comes in leaps whose moment depends on the seed and on a machine's rounding, so trainings end by
    accuracy on held-back rows.
    """

    # Splits are drawn in this order from one stream, so the evaluation stays when the others grow.
    rows: Mapping[str, int] = field(
        default_factory=lambda: {"eval": 256, "merge": 2000, "check": 128, "train": 6000}
    )
    num_tokens: int = 360
    # The embedding has more rows than there are tokens, as in released models, ...
    num_rows: int = 376
    # ... and experts trained elsewhere are padded differently (Qwen: 151936 or 152064 rows).
    expert_num_rows: Mapping[str, int] = field(default_factory=lambda: {"tool": 416})
    # An expert may have been tuned with a system prompt that the student does not have.
    expert_system: Mapping[str, str] = field(default_factory=lambda: {"total": "give every sum"})
    size: ModelSize = ModelSize()
    base: BaseTraining = field(default_factory=_base)
    expert: Mapping[str, ExpertTraining] = field(default_factory=_experts)
    # A smaller base, for students that are smaller than their experts.
    small: ModelSize | None = field(
        default_factory=lambda: ModelSize(
            hidden_size=64, intermediate_size=128, num_heads=2, num_key_value_heads=1
        )
    )

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain of the base, those without an expert included."""
        return tuple(self.base.batch)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for the manifest."""
        return asdict(self)
