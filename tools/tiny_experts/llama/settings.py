"""All that decides what the foreign expert is, beside its siblings' settings. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiny_experts.cache import cache_key
from tiny_experts.settings import ExpertTraining, Settings

FOLDER = "sort_llama"
DOMAIN = "sort"


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """Sizes and training; no size is that of the siblings."""

    # 6 special tokens, 256 bytes, 95 characters, 29 merges inside words; the last 30 merges join two letters
    # and the space between them into one token, which no sibling's tokenizer does.
    num_tokens: int = 416

    hidden_size: int = 144
    intermediate_size: int = 320
    num_layers: int = 3
    num_heads: int = 6
    num_key_value_heads: int = 3

    # From random weights, so longer than the siblings, which start from a base that can do a little. Until it
    # cools down it wavers between 0.9 and 0.97, however long it is trained.
    training: ExpertTraining = field(
        default_factory=lambda: ExpertTraining(
            batch=96, enough=0.93, warmup_updates=20, check_every=20, cooldown_updates=150, max_updates=900
        )
    )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self)


def llama_key(settings: Settings, llama: LlamaSettings, seed: int) -> str:
    """SHA-256 over all that its siblings follow from, its own settings and this package's source."""
    digest = hashlib.sha256(json.dumps([cache_key(settings, seed), llama.as_dict()], sort_keys=True).encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.name.encode() + b"\0" + module.read_bytes())
    return digest.hexdigest()
