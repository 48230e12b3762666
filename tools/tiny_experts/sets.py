"""Sets of tiny experts: that of the quick start, and those on which tools/merge_bench.py compares recipes.

Each set has four domains with an expert and one skill that only the base learns. The kinds of tasks recur
(one lookup per token, a chain of states, JSON); the tasks of `held_out` are in no other set.
"""

from __future__ import annotations

from collections.abc import Mapping

from tiny_experts.settings import BaseTraining, ExpertTraining, ModelSize, Settings

# Rows per update, so that an update of every domain has about equally many tokens.
_BATCH = {"sort": 64, "reverse": 64, "shift": 64, "interleave": 64, "dedupe": 64, "tool": 48, "form": 48}
_BATCH |= {"order": 48, "upper": 64}
_BATCH |= {
    "total": 96,
    "walk": 64,
    "cells": 24,
    "add": 48,
    "count": 48,
    "insert": 48,
    "swap": 40,
    "stack": 32,
}
SIZE = ModelSize(hidden_size=96, intermediate_size=192, num_layers=3, num_heads=3, num_key_value_heads=3)
SMALL = ModelSize(hidden_size=64, intermediate_size=128, num_layers=3, num_heads=2, num_key_value_heads=2)


def _settings(domains: tuple[str, ...], kept: str, num_tokens: int = 360) -> Settings:
    return Settings(
        rows={"eval": 200, "merge": 2000, "check": 64, "train": 6000},
        num_tokens=num_tokens,  # at most as many as the texts give
        num_rows=num_tokens + 16,
        expert_num_rows={},
        expert_system={},
        size=SIZE,
        small=SMALL,
        base=BaseTraining(
            batch={domain: _BATCH[domain] // 2 for domain in (*domains, kept)},
            enough={**dict.fromkeys(domains, 0.15), kept: 0.95},
            paused_share=0.25,
            lr=3e-3,
            check_every=5,
            max_updates=600,
        ),
        expert={
            domain: ExpertTraining(_BATCH[domain], enough=0.93, lr=3e-3, max_updates=800)
            for domain in domains
        },
    )


SETS: Mapping[str, Settings] = {
    "quickstart": Settings(),
    "agents": _settings(("sort", "tool", "total", "count"), "reverse"),
    "chains": _settings(("shift", "cells", "add", "form"), "sort"),
    "states": _settings(("interleave", "walk", "insert", "reverse"), "sort", num_tokens=312),
    "held_out": _settings(("dedupe", "swap", "stack", "order"), "upper"),
}
