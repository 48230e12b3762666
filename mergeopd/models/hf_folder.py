"""What an exported model folder has beside weights and config."""

from __future__ import annotations

import shutil
from pathlib import Path

_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, template and generation config, those that the source folder has."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
