"""Encode texts for alignment, and find the bytes of the ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import tokenizers

from mergeopd.align.inversion import without_prefix, without_special_pieces
from mergeopd.align.token_bytes import TokenBytes
from mergeopd.errors import TokenizerError

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class ByteTokenizer:
    """A tokenizer that encodes batches of texts, with the bytes of its ids.

    `encode` adds no special tokens and recognises none: a student's response is text, even where it contains
    the string of the teacher's end token. `encode_inside` encodes a continuation: no space is put before it.
    """

    tokens: TokenBytes
    _backend: tokenizers.Tokenizer = field(repr=False)

    @classmethod
    def of(cls, tokenizer: object, name: str) -> ByteTokenizer:
        """Read a `tokenizers.Tokenizer`, or a fast tokenizer of transformers; it is not changed.

        `name` is what errors call it.

        Raises TokenizerError when its tokens cannot be turned back into bytes.
        """
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise TokenizerError(
                f"{name}: a {type(tokenizer).__name__} is not backed by the tokenizers library; "
                "load a fast tokenizer"
            )
        return cls(TokenBytes.from_tokenizer(backend, name), backend)

    @cached_property
    def encode(self) -> Encode:
        """Encode each text on its own."""
        return _encoder(_twin(self._backend))

    @cached_property
    def encode_inside(self) -> Encode:
        """Encode each text as the continuation of another."""
        if not self.tokens.prefix:
            return self.encode
        state = without_prefix(json.loads(self._backend.to_str()))
        return _encoder(tokenizers.Tokenizer.from_str(json.dumps(without_special_pieces(state))))


def _twin(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Copy a tokenizer, to set switches on the copy; a deep copy takes a second for 130,000 tokens."""
    if isinstance(backend.model, tokenizers.models.Unigram):
        state = without_special_pieces(json.loads(backend.to_str()))
        return tokenizers.Tokenizer.from_str(json.dumps(state))
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
