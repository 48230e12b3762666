"""Files of an exported model folder besides weights and config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mergeopd.models.facts import ModelFacts

_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "generation_config.json"),
    # Licences may ask that their text is passed on.
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, template, generation config and licence, if the source folder has them."""
    for file in (file for pattern in _COMPANIONS for file in source.glob(pattern) if file.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def write_turns(folder: Path, eos_ids: Collection[int], template: str | None) -> None:
    """Write the end tokens `eos_ids` and, if given, the chat template into an exported folder.

    Programs that serve the folder would otherwise use the base model's end tokens and template, not those of
    training.
    """
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        if "chat_template" in _read(folder / "tokenizer_config.json"):  # where older programs look
            _change(folder / "tokenizer_config.json", chat_template=template)
    if set(ModelFacts.read(folder).eos_ids) != set(eos_ids):
        ids = list(eos_ids)
        _change(folder / "generation_config.json", eos_token_id=ids[0] if len(ids) == 1 else ids)


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config


def _change(path: Path, **values: object) -> None:
    config = {**_read(path), **values}
    config.pop("_from_model_config", None)  # with it, transformers takes the values of config.json
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
