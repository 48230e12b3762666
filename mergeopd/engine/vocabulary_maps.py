"""Vocabulary maps on disk: made once for a pair of tokenizers, kept for every run that asks again."""

from __future__ import annotations

from pathlib import Path

from mergeopd.align.answers import EndTokens
from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.vocab import MadeFor, VocabularyMap
from mergeopd.errors import StorageError
from mergeopd.storage.folders import atomic_folder, verify

_FILE = "map.safetensors"


def vocabulary_map(
    cache: Path, student: ByteTokenizer, teacher: ByteTokenizer, ends: EndTokens, k: int = 4
) -> VocabularyMap:
    """The map of a pair from `cache`, or made (seconds for 150,000 tokens) and kept there.

    Its folder is named by the fingerprints of both tokenizers, the end tokens and `k`, so that a changed
    tokenizer has a map of its own.

    Raises:
        StorageError: what is kept is damaged, or the disk refuses.
        TokenizerError: what is kept was made for another pair.
    """
    made_for = MadeFor.of(student.tokens, teacher.tokens, ends, k)
    folder = cache / made_for.digest
    if not folder.exists():
        made = VocabularyMap.build(student, teacher, ends, k)
        try:
            with atomic_folder(folder) as temporary:
                made.save(temporary / _FILE)
        except StorageError:
            # Another run may have made the same map meanwhile. Any other failure is one.
            if not folder.exists():
                raise
        return made
    fault = verify(folder)
    if fault is not None:
        raise StorageError(
            f"{folder}: the vocabulary map is damaged: {fault}; delete it, and it is made again"
        )
    return VocabularyMap.load(folder / _FILE, made_for, student.tokens, teacher.tokens)
