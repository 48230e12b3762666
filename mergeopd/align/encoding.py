"""A tokenizer for aligning: texts to ids, and what the ids stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import tokenizers

from mergeopd.align.inversion import without_prefix
from mergeopd.align.token_bytes import TokenBytes

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class ByteTokenizer:
    """Texts to ids, many at a time, and the bytes of the ids.

    `encode` adds no special tokens and recognises none: what a student wrote is text, even where it looks
    like the mark that ends a teacher's turn. `encode_inside` is the same in the middle of a text: no space
    is put before it. Both are made on first use, which takes half a second for 130,000 tokens.
    """

    tokens: TokenBytes
    _state: str = field(repr=False)

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, name: str) -> ByteTokenizer:
        """From a tokenizer of the tokenizers library, which stays as it is; `name` is what errors call it.

        Raises:
            TokenizerError: its tokens cannot be turned back into bytes.
        """
        return cls(TokenBytes.from_tokenizer(tokenizer, name), tokenizer.to_str())

    @cached_property
    def encode(self) -> Encode:
        """Ids of each text as a text of its own."""
        return _encoder(self._state)

    @cached_property
    def encode_inside(self) -> Encode:
        """Ids of each text as if other text stood before it."""
        if not self.tokens.prefix:
            return self.encode
        return _encoder(json.dumps(without_prefix(json.loads(self._state))))


def _encoder(state: str) -> Encode:
    backend = tokenizers.Tokenizer.from_str(state)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: Sequence[str]) -> Sequence[Sequence[int]]:
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    return encode
