"""Tokenizers loaded directly from tokenizer.json, in milliseconds and without transformers.

Text maps to the same ids as with transformers' generic fast tokenizer and `add_special_tokens=False`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from mergeopd.errors import TokenizerError
from mergeopd.models.json_file import read_object
from mergeopd.models.tokenizer_difference import MAX_ADDED, first_difference, first_ids, num_shared

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_OPTIONS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer folder. `vocab_size` is its highest id + 1, added tokens included.

    `special_tokens` maps names such as "eos_token" to texts, for chat templates. `backend` is the tokenizers
    library's tokenizer, declared tokens included; not to be changed.
    """

    folder: Path
    vocab_size: int
    eos_id: int
    special_tokens: Mapping[str, str]
    chat_template: str | None
    backend: tokenizers.Tokenizer = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        Raises TokenizerError when tokenizer.json is missing or damaged, there is no EOS token, or the
        configuration names a token that tokenizer.json does not have.
        """
        backend = _load_backend(folder)
        config = read_object(folder / "tokenizer_config.json", TokenizerError) or {}
        special_tokens = _special_tokens(folder, config)
        _add_declared_tokens(folder, backend, config, special_tokens)
        if "eos_token" not in special_tokens:
            raise TokenizerError(
                f"{folder}: no eos_token, so responses could not end; add it to tokenizer_config.json"
            )
        vocab = backend.get_vocab(with_added_tokens=True)
        return cls(
            folder=folder,
            vocab_size=max(vocab.values()) + 1,
            eos_id=vocab[special_tokens["eos_token"]],
            special_tokens=MappingProxyType(special_tokens),
            chat_template=_chat_template(folder, config),
            backend=backend,
        )

    def encode(self, text: str) -> list[int]:
        """Encode `text`. Special tokens written in it are recognised; none are added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode `ids`; bytes that are not UTF-8 become U+FFFD, unknown ids are skipped."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    def difference(self, other: Tokenizer) -> str | None:
        """Describe the first difference in one sentence; None when both map every text to the same ids.

        Compares ids, added tokens, normaliser, pre-tokeniser, model options, merges and scores as serialised
        by the tokenizers library, so that older and newer spellings of one tokenizer.json are equal.
        Templates, EOS and the special tokens skipped by decoding are not compared.
        """
        if self._state == other._state:
            return None
        return first_difference(
            json.loads(self._state), json.loads(other._state), str(self.folder), str(other.folder)
        )

    def num_shared(self, other: Tokenizer) -> int | None:
        """Return how many ids, from 0 on, are the same; None if more differs than a few added tokens."""
        if self._state == other._state:
            return self.vocab_size
        return num_shared(json.loads(self._state), json.loads(other._state))

    def added_from(self, num_ids: int) -> tuple[str, ...] | None:
        """Return the tokens from id `num_ids` on; None unless they are just a few added ones."""
        if num_ids >= self.vocab_size:
            return ()
        added = {i: t.content for i, t in self.backend.get_added_tokens_decoder().items() if i >= num_ids}
        ids = {i for i in self.backend.get_vocab(with_added_tokens=True).values() if i >= num_ids}
        if len(ids) > MAX_ADDED or not ids <= added.keys():
            return None
        return tuple(added[i] for i in sorted(ids))

    def truncated_backend(self, num_ids: int) -> tokenizers.Tokenizer:
        """Return the tokenizer of the tokenizers library without added tokens from id `num_ids` on."""
        if num_ids >= self.vocab_size:
            return self.backend
        state = first_ids(json.loads(self._state), num_ids)
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer, all declared tokens included."""
        return hashlib.sha256(self._state.encode()).hexdigest()

    @cached_property
    def _state(self) -> str:
        """The tokenizer as serialised by the library, all declared tokens included."""
        text: str = self.backend.to_str()
        return text


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        there = "has no tokenizer.json" if folder.is_dir() else "there is no such folder"
        raise TokenizerError(
            f"{folder}: {there}; make one where the model comes from: "
            "AutoTokenizer.from_pretrained(model).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise TokenizerError(f"{path}: not a tokenizer: {error}; fetch the file again") from error
    # Both would silently change ids; lengths are limited by the recipe only.
    backend.no_truncation()
    backend.no_padding()
    if not backend.get_vocab_size():
        raise TokenizerError(f"{path}: the vocabulary is empty; fetch the file again")
    return backend


def _token_text(value: Any) -> str | None:
    """Return the text of a token, which is a string or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return named special tokens; as in transformers, special_tokens_map.json only for older folders."""
    declared = {name: config.get(name) for name in SPECIAL_NAMES}
    # transformers 5 stores model-specific names, such as `image_token`, separately.
    own = config.get("model_specific_special_tokens")
    declared.update(own if isinstance(own, dict) else {})
    if "added_tokens_decoder" not in config:
        legacy = read_object(folder / "special_tokens_map.json", TokenizerError) or {}
        declared.update({name: value for name, value in legacy.items() if name in SPECIAL_NAMES})
    texts = {name: _token_text(value) for name, value in declared.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _add_declared_tokens(
    folder: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Add the tokens that only the configuration declares, without assigning new ids."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in _declared_tokens(folder, config):
        if token.content not in added:
            backend.add_tokens([token])
            added.add(token.content)
        actual_id = backend.token_to_id(token.content)
        if actual_id != token_id:
            raise TokenizerError(
                f"{folder}: {token.content!r} is {token_id} in tokenizer_config.json and {actual_id} in "
                "tokenizer.json; the two files are not of one tokenizer, fetch both again"
            )
    for name, text in special_tokens.items():
        if backend.token_to_id(text) is None:
            raise TokenizerError(
                f"{folder}: {name} is {text!r}, which tokenizer.json does not have; a new id would be "
                "outside the model's vocabulary. Name an existing token in tokenizer_config.json"
            )
        if text not in added:
            backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])
            added.add(text)


def _declared_tokens(folder: Path, config: Mapping[str, Any]) -> list[tuple[int, tokenizers.AddedToken]]:
    """Return `added_tokens_decoder` of the configuration, in order of ids."""
    tokens = []
    for key, fields in (config.get("added_tokens_decoder") or {}).items():
        try:
            options = {name: fields[name] for name in _TOKEN_OPTIONS if name in fields}
            tokens.append((int(key), tokenizers.AddedToken(fields["content"], **options)))
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder[{key!r}] is damaged ({error!r}); "
                "fetch the file again"
            ) from error
    return sorted(tokens, key=lambda item: item[0])


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Read chat_template.jinja, else the config's; of several named templates, `default`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path}: cannot be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item["name"]: item["template"] for item in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
