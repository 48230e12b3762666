"""Small tokenizers of the two common kinds, in milliseconds."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(
    extra: tuple[str, ...] = (), merges: tuple[tuple[str, str], ...] = (), **parts: Any
) -> tokenizers.Tokenizer:
    """256 bytes, "he", "ll", " 1" and `extra`; then "<end>", special, and "<think>", which is text."""
    words = ["he", "ll", "Ġ1", *extra]
    vocab = {token: i for i, token in enumerate([*ALPHABET, *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("Ġ", "1"), *merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def sentencepiece(kind: str, scheme: str = "always") -> tokenizers.Tokenizer:
    """Kind "bpe" with the normalizer of older files, or "unigram" with Metaspace. "</s>" is 1."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "▁a", "bc", "▁▁"]
    if kind == "bpe":
        merges = [("▁", "a"), ("b", "c"), ("▁", "▁")]
        vocab = {w: i for i, w in enumerate(words)}
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        model: Any = models.Unigram([(w, -float(i > 1) * i) for i, w in enumerate(words)], 0, True)
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
        )
    backend.add_special_tokens(["</s>"])
    return backend
