r"""Find which tokens of two tokenizers cover the same text, by the bytes of the tokens.

`ByteTokenizer` reads a fast tokenizer of transformers or a `tokenizers.Tokenizer`. `align_responses` encodes
a student's responses with a teacher's tokenizer and groups the tokens of both:

>>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
>>> def byte_level(*merges):
...     words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges), "<end>"]
...     tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
...     tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
...     tokenizer.decoder = decoders.ByteLevel()
...     tokenizer.add_special_tokens(["<end>"])
...     return tokenizer
>>> first = byte_level(("t", "h"), ("th", "e"))  # with real models: AutoTokenizer.from_pretrained(...)
>>> second = byte_level(("h", "e"))

>>> from mergeopd.align import ByteTokenizer, EndTokens, align_responses
>>> student, teacher = ByteTokenizer.of(first, "student"), ByteTokenizer.of(second, "teacher")
>>> ends = EndTokens(student=[first.token_to_id("<end>")], teacher=second.token_to_id("<end>"))
>>> response = first.encode("the hen").ids + [first.token_to_id("<end>")]
>>> [alignment] = align_responses([response], student, teacher, ends)
>>> for own, other in alignment.groups():
...     print([first.id_to_token(i) for i in response[own]],
...           [second.id_to_token(i) for i in alignment.teacher_ids[other].tolist()])
['the'] ['t', 'he']
['Ġ'] ['Ġ']
['h', 'e'] ['he']
['n'] ['n']
['<end>'] ['<end>']

A teacher that scores `alignment.teacher_ids` can be compared with the student group by group.
`VocabularyMap` and `teacher_pieces` relate the two vocabularies. Needs numpy and tokenizers, neither torch
nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergeopd.align.encoding import ByteTokenizer
    from mergeopd.align.responses import Alignment, EndTokens, Unaligned, align_responses
    from mergeopd.align.token_bytes import TokenBytes
    from mergeopd.align.vocab import VocabularyMap, teacher_pieces

__all__ = [
    "Alignment",
    "ByteTokenizer",
    "EndTokens",
    "TokenBytes",
    "Unaligned",
    "VocabularyMap",
    "align_responses",
    "teacher_pieces",
]

_MODULES = {"ByteTokenizer": "encoding", "TokenBytes": "token_bytes"}
_MODULES |= dict.fromkeys(("Alignment", "EndTokens", "Unaligned", "align_responses"), "responses")
_MODULES |= dict.fromkeys(("VocabularyMap", "teacher_pieces"), "vocab")


def __getattr__(name: str) -> object:
    # numpy and tokenizers take longer to import than `mergeopd check` takes without them.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
