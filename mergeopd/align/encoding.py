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
    is put before it.
    """

    tokens: TokenBytes
    _backend: tokenizers.Tokenizer = field(repr=False)

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, name: str) -> ByteTokenizer:
        """From a tokenizer of the tokenizers library, which stays as it is; `name` is what errors call it.

        Raises:
            TokenizerError: its tokens cannot be turned back into bytes.
        """
        return cls(TokenBytes.from_tokenizer(tokenizer, name), tokenizer)

    @cached_property
    def encode(self) -> Encode:
        """Ids of each text as a text of its own."""
        return _encoder(_twin(self._backend))

    @cached_property
    def encode_inside(self) -> Encode:
        """Ids of each text as if other text stood before it."""
        if not self.tokens.prefix:
            return self.encode
        state = without_prefix(json.loads(self._backend.to_str()))
        return _encoder(tokenizers.Tokenizer.from_str(json.dumps(state)))


def _twin(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer with switches of its own; a deep copy takes a second for 130,000 tokens."""
    twin = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(twin, part, getattr(backend, part))
    added = backend.get_added_tokens_decoder()
    twin.add_tokens([added[i] for i in sorted(added)])
    # Ids of added tokens are given in order, so where a file leaves some out only a copy has the same.
    same = {i: token.content for i, token in twin.get_added_tokens_decoder().items()} == {
        i: token.content for i, token in added.items()
    }
    return twin if same else tokenizers.Tokenizer.from_str(backend.to_str())


def _encoder(backend: tokenizers.Tokenizer) -> Encode:
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: Sequence[str]) -> Sequence[Sequence[int]]:
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    return encode
