"""Read the bytes of every token of a vocabulary."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mergeopd.align.inversion import Inversion, NormalForm, read_inversion
from mergeopd.errors import TokenizerError

# Kinds of ids. Only the first three have bytes.
TEXT, BYTE, ADDED, SPECIAL, UNKNOWN, UNUSED = range(6)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of the ids of one tokenizer.

    Those of token i are `flat[starts[i]:starts[i + 1]]`. Special tokens, the unknown token and unused ids
    have none, whatever their strings are. `kind[i]` is TEXT, BYTE ("<0xEE>" and the like), ADDED (text
    that is split off before the model), SPECIAL, UNKNOWN or UNUSED.

    `normal`: the Unicode form that encoding normalises text to. `prefix`: encoding may put a space before the
    text. `strip`: decoding removes one leading space of a response. `fingerprint` differs between tokenizers
    that could give a text different ids.
    """

    name: str
    flat: NDArray[np.uint8] = field(repr=False)  # [bytes of all tokens]
    starts: NDArray[np.int64] = field(repr=False)  # [V + 1]
    kind: NDArray[np.uint8] = field(repr=False)  # [V]
    fingerprint: str
    normal: NormalForm | None = None
    prefix: bool = False
    strip: bool = False

    @classmethod
    def from_tokenizer(cls, tokenizer: tokenizers.Tokenizer, name: str) -> TokenBytes:
        """Read a tokenizer of the tokenizers library; `name` is what errors call it.

        Byte-level BPE, and BPE or Unigram with SentencePiece's "▁" and byte fallback.

        Raises TokenizerError when its tokens cannot be mapped to bytes, or do not restore a trial text.
        """
        text = tokenizer.to_str()
        state = json.loads(text)
        rules = read_inversion(state, name)
        added = {token["id"]: token for token in state["added_tokens"]}
        vocab = _vocabulary(state)
        kind = np.full(max(vocab.values(), default=-1) + 1, UNUSED, np.uint8)
        pieces = [b""] * len(kind)
        plain = {string: i for string, i in vocab.items() if i not in added}
        for i, piece in zip(plain.values(), _pieces(list(plain), rules), strict=True):
            pieces[i], kind[i] = piece, TEXT
        if rules.byte_fallback:
            for string, i in plain.items():
                if match := _BYTE_TOKEN.fullmatch(string):
                    pieces[i], kind[i] = bytes.fromhex(match[1]), BYTE
        for i, token in added.items():
            pieces[i] = b"" if token["special"] else token["content"].encode()
            kind[i] = SPECIAL if token["special"] else ADDED
        model = state["model"]
        named = vocab.get(model.get("unk_token") or "")
        unknown: int | None = model.get("unk_id") if model["type"] == "Unigram" else named
        if unknown is not None:
            pieces[unknown], kind[unknown] = b"", UNKNOWN
        starts = offsets_of([len(piece) for piece in pieces])
        kind[(starts[1:] == starts[:-1]) & (kind < SPECIAL)] = SPECIAL
        for array in (starts, kind):
            array.flags.writeable = False
        flat, fingerprint = (
            np.frombuffer(b"".join(pieces), np.uint8),
            hashlib.sha256(text.encode()).hexdigest(),
        )
        made = cls(name, flat, starts, kind, fingerprint, rules.normal, rules.prefix, rules.strip)
        _check_trials(tokenizer, made)
        return made

    def __len__(self) -> int:
        """V: the highest id + 1."""
        return len(self.kind)

    @cached_property
    def widths(self) -> NDArray[np.int64]:
        """`[V]`: number of bytes of each token."""
        return np.diff(self.starts)

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """Each token's bytes, one object per id."""
        whole, starts = self.flat.tobytes(), self.starts.tolist()
        return tuple(whole[a:b] for a, b in pairwise(starts))

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of each byte string: text before byte tokens, the lowest id of equal ones."""
        ids: dict[bytes, int] = {}
        for kind in (TEXT, ADDED, BYTE):
            for i in np.flatnonzero(self.kind == kind).tolist():
                ids.setdefault(self.pieces[i], i)
        return ids

    def joined(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Concatenate the bytes of tokens `[N]`. Raises IndexError for an id that is not below V."""
        widths = self.widths[ids]
        ends = np.cumsum(widths)
        # Byte j of token n is at starts[n] + j; arange runs on, so earlier widths are subtracted.
        where = np.repeat(self.starts[ids] - ends + widths, widths)
        where += np.arange(len(where))
        return self.flat[where]


def offsets_of(lengths: Sequence[int] | NDArray[np.generic]) -> NDArray[np.int64]:
    """Return `[N + 1]`: where each of N concatenated parts starts, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _byte_alphabet() -> NDArray[np.int16]:
    """Return the byte of each character of GPT-2's alphabet, by code point; -1 for all others.

    Printable bytes are represented by themselves, the other 68 in order by the characters from U+0100 on.
    """
    codes = np.array(sorted(map(ord, tokenizers.pre_tokenizers.ByteLevel.alphabet())))
    printable = codes[codes < 0x100]
    table = np.full(codes[-1] + 2, -1, np.int16)
    table[printable] = printable
    table[codes[codes >= 0x100]] = np.setdiff1d(np.arange(0x100), printable)
    return table


_ALPHABET = _byte_alphabet()


def _pieces(strings: Sequence[str], rules: Inversion) -> list[bytes]:
    """Return the bytes of the model's token strings."""
    if not rules.byte_level:
        return [token.replace(rules.space or " ", " ").encode() for token in strings]
    codes = np.frombuffer("".join(strings).encode("utf-32-le"), np.uint32)
    values = _ALPHABET[np.minimum(codes, len(_ALPHABET) - 1)]
    whole = values.astype(np.uint8).tobytes()
    offsets = offsets_of([len(token) for token in strings])
    pieces = [whole[a:b] for a, b in pairwise(offsets.tolist())]
    # The library's decoder leaves a token with other characters unchanged.
    for i in np.unique(np.searchsorted(offsets[1:], np.flatnonzero(values < 0), side="right")).tolist():
        pieces[i] = strings[i].encode()
    return pieces


def _vocabulary(state: Mapping[str, Any]) -> dict[str, int]:
    """Map every token string to its id. Unigram lists tokens in the order of their ids."""
    listed = state["model"]["vocab"]
    model = {row[0]: i for i, row in enumerate(listed)} if isinstance(listed, list) else listed
    return {**model, **{token["content"]: token["id"] for token in state["added_tokens"]}}


_TRIALS = ("Hello, world! 12 345", "  two  spaces\n\nand\ttabs ", "naïve é 漢字 🙂", "x = [1, 2];\n")


def _check_trials(tokenizer: tokenizers.Tokenizer, tokens: TokenBytes) -> None:
    """Encode a few texts: where there is no unknown token, the bytes must equal the text."""
    for text, encoded in zip(_TRIALS, tokenizer.encode_batch(_TRIALS, add_special_tokens=False), strict=True):
        ids = np.array(encoded.ids, np.int64)
        if (tokens.kind[ids] == UNKNOWN).any():
            continue
        read, given = text.encode(), tokens.joined(ids).tobytes()
        if given != read and not (tokens.prefix and given == b" " + read):
            raise TokenizerError(
                f"{tokens.name}: the tokens of {text!r} are the bytes {given!r}, and no part of the "
                "tokenizer explains why; such a model can teach only students that share its tokenizer"
            )
