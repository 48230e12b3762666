"""All that determines the experts of five kinds, besides the seed and this package's source."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tiny_experts.cache import cache_key
from tiny_experts.sets import SIZE
from tiny_experts.settings import BaseTraining, ExpertTraining, Settings

AGENT_FOLDER = "experts_agent"

# Rows per update, so that an update of every domain has about equally many tokens.
_BATCH = {"math": 64, "code": 40, "search": 48, "tools": 48, "chat": 64}

AGENT = Settings(
    rows={"eval": 200, "merge": 1200, "check": 64, "train": 3500},
    num_tokens=640,
    num_rows=656,
    expert_num_rows={},
    expert_system={},
    size=SIZE,
    small=None,
    base=BaseTraining(
        batch={domain: rows // 2 for domain, rows in _BATCH.items()},
        enough=dict.fromkeys(_BATCH, 0.15),
        paused_share=0.5,
        lr=3e-3,
        check_every=5,
        max_updates=600,
    ),
    expert={
        # Until the learning rate falls, accuracy in `math` wavers around 0.8.
        domain: ExpertTraining(rows, enough=0.8, lr=3e-3, cooldown_updates=80, max_updates=600)
        for domain, rows in _BATCH.items()
    },
)


def agent_key(settings: Settings, seed: int) -> str:
    """Return the SHA-256 of the settings, the seed, and the source of this package and its parent."""
    digest = hashlib.sha256(cache_key(settings, seed).encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.name.encode() + b"\0" + module.read_bytes())
    return digest.hexdigest()
