"""Vocabulary maps on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from byte_tokenizers import byte_level, sentencepiece

from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.responses import EndTokens
from mergeopd.align.vocab import VocabularyMap
from mergeopd.errors import StorageError, TokenizerError
from mergeopd.teacher.cross_tokenizer import vocabulary_map

ENDS = EndTokens((259,), 1)


def sides() -> tuple[ByteTokenizer, ByteTokenizer]:
    return ByteTokenizer.of(byte_level(), "student"), ByteTokenizer.of(sentencepiece("bpe"), "teacher")


def test_a_map_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = sides()
    made = vocabulary_map(tmp_path, student, teacher, ENDS)
    monkeypatch.setattr(VocabularyMap, "build", None)
    again = vocabulary_map(tmp_path, *sides(), ENDS)
    assert np.array_equal(made.projection_weights, again.projection_weights)
    assert again.made_for == made.made_for
    assert len(list(tmp_path.iterdir())) == 1


def test_other_ends_and_sizes_have_maps_of_their_own(tmp_path: Path) -> None:
    student, teacher = sides()
    for ends, k in ((ENDS, 4), (ENDS, 2), (EndTokens((259, 3), 1), 4), (EndTokens((), 1), 4)):
        vocabulary_map(tmp_path, student, teacher, ends, k)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_map_is_reported(tmp_path: Path) -> None:
    student, teacher = sides()
    vocabulary_map(tmp_path, student, teacher, ENDS)
    [folder] = tmp_path.iterdir()
    other = EndTokens((3,), 1)
    vocabulary_map(tmp_path, student, teacher, other)
    [second] = set(tmp_path.iterdir()) - {folder}
    file = folder / "map.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"the vocabulary map is damaged: .*; delete the folder"):
        vocabulary_map(tmp_path, student, teacher, ENDS)
    # One that was put in another's place.
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    second.rename(folder)
    with pytest.raises(TokenizerError, match="made for other tokenizers than student and teacher, or other"):
        vocabulary_map(tmp_path, student, teacher, ENDS)
