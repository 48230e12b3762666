"""Files of an exported model folder besides weights and config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from mergeopd.models.facts import ModelFacts

_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, template and generation config, if the source folder has them."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_turns(folder: Path, eos_ids: Collection[int], template: str | None) -> None:
    """Write the end tokens `eos_ids` and, if given, the chat template into an exported folder.

    Programs that serve the folder would otherwise use the base model's end tokens, not those of training.
    """
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if set(ModelFacts.read(folder).eos_ids) == set(eos_ids):
        return
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = list(eos_ids)
    config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
