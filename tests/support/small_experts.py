"""The tiny experts in seconds: smaller, and hardly trained. Importing this puts `tools/` on the path."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # the tool is a script beside its package, not an installed module

from tiny_experts.agent.settings import AGENT  # noqa: E402
from tiny_experts.llama.settings import LlamaSettings  # noqa: E402
from tiny_experts.settings import BaseTraining, ExpertTraining, ModelSize, Settings  # noqa: E402

DOMAINS = ("total", "sort", "tool", "cells")
KEPT = "reverse"  # a skill that only the base learns
ROWS = {"eval": 40, "merge": 30, "check": 10, "train": 120}


def load_script() -> ModuleType:
    """`tools/make_tiny_experts.py` as a module."""
    spec = importlib.util.spec_from_file_location("make_tiny_experts", TOOLS / "make_tiny_experts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_settings(num_updates: int = 6) -> Settings:
    """Settings with which base and experts are made: each as it is after so many updates."""
    # The base is the best of the states that are looked at, so one look, at the end.
    domains = (*DOMAINS, KEPT)
    base = {"check_every": num_updates, "max_updates": num_updates}
    expert = {"check_every": 2, "cooldown_updates": 2, "max_updates": num_updates}
    return replace(
        Settings(),
        rows=ROWS,
        num_tokens=300,
        num_rows=304,
        expert_num_rows={"tool": 320},
        size=ModelSize(32, 48, num_layers=2, num_heads=2, num_key_value_heads=1, head_dim=16),
        small=ModelSize(16, 24, num_layers=2, num_heads=1, num_key_value_heads=1, head_dim=16),
        base=BaseTraining(dict.fromkeys(domains, 4), dict.fromkeys(domains, 1.0), **base),
        expert=dict.fromkeys(DOMAINS, ExpertTraining(4, 1.0, **expert)),
    )


def small_llama(num_updates: int) -> LlamaSettings:
    """The foreign expert likewise."""
    return LlamaSettings(
        num_tokens=396,
        hidden_size=24,
        intermediate_size=40,
        num_layers=1,
        num_heads=2,
        num_key_value_heads=1,
        training=ExpertTraining(4, 1.0, check_every=2, cooldown_updates=2, max_updates=num_updates),
    )


def small_agents(num_updates: int) -> Settings:
    """The experts of five kinds likewise; after 60 updates, those with tools call them, with wrong arguments."""
    expert = {"check_every": num_updates, "cooldown_updates": 2, "max_updates": num_updates, "lr": 1e-2}
    base = {"check_every": 20, "max_updates": 20}
    return replace(
        AGENT,
        rows={"eval": 12, "merge": 24, "check": 4, "train": 300},
        num_tokens=600,
        num_rows=608,
        size=ModelSize(32, 48, num_layers=2, num_heads=2, num_key_value_heads=1, head_dim=16),
        base=BaseTraining(dict.fromkeys(AGENT.domains, 4), dict.fromkeys(AGENT.domains, 1.0), **base),
        expert={domain: ExpertTraining(8, 1.0, **expert) for domain in AGENT.expert},
    )
