"""Align the tokens of two tokenizers by the bytes that they stand for. Without torch.

    student = ByteTokenizer.of(tokenizers.Tokenizer.from_file("a/tokenizer.json"), "a")
    teacher = ByteTokenizer.of(tokenizers.Tokenizer.from_file("b/tokenizer.json"), "b")
    [found] = align([ids], student.tokens, teacher.tokens, teacher.encode, EndTokens([eos_a], eos_b))

`found` is an `Alignment`: the text in the teacher's tokens, and groups of tokens of both that cover the same
bytes. `VocabularyMap` relates whole vocabularies. `examples/align_tokenizers.py` prints groups of a text.
"""

from mergeopd.align.answers import Alignment, EndTokens, Unaligned, align
from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.token_bytes import TokenBytes
from mergeopd.align.vocab import VocabularyMap

__all__ = [
    "Alignment",
    "ByteTokenizer",
    "EndTokens",
    "TokenBytes",
    "Unaligned",
    "VocabularyMap",
    "align",
]
