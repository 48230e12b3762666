"""Vocabulary maps: by bytes, against lookups one token at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import real_tokenizers
from byte_tokenizers import byte_level, sentencepiece
from safetensors.numpy import load_file, save_file

from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.responses import EndTokens
from mergeopd.align.vocab import VocabularyMap
from mergeopd.errors import TokenizerError

ENDS = EndTokens((263,), 1)


def small() -> tuple[ByteTokenizer, ByteTokenizer]:
    student = byte_level(("Ġa", "abc", "æĹ", "Ġhe"))
    student.add_tokens(["<x>"])
    return ByteTokenizer.of(student, "student"), ByteTokenizer.of(sentencepiece("bpe"), "teacher")


def test_tokens_are_matched_by_bytes_and_one_to_one() -> None:
    student, teacher = small()
    own, other = student.tokens, teacher.tokens
    ends = EndTokens((own.ids[b"he"], 3), 1)
    found = VocabularyMap.build(student, teacher, ends)
    pairs = dict(zip(found.student_ids.tolist(), found.teacher_ids.tolist(), strict=True))
    assert pairs.pop(ends.student[0]) == 1
    assert len(set(pairs.values())) == len(pairs)
    for i, j in pairs.items():
        assert own.pieces[i] == other.pieces[j]
    # Every byte (but that of id 3, an end), and " a". "▁" is " ", and "a" is "a" rather than <0x61>.
    assert len(pairs) == 256 - 1 + 1
    assert pairs[own.ids[b" a"]] == 262
    assert pairs[own.ids[b"a"]] == 259
    assert pairs[own.ids[b"\xff"]] == 2 + 0xFF


def test_the_projection_follows_the_teachers_encoding() -> None:
    student, teacher = small()
    own, other = student.tokens, teacher.tokens
    found = VocabularyMap.build(student, teacher, ENDS, k=3)

    def row(piece: bytes) -> dict[bytes, float]:
        i = own.ids[piece]
        return {
            other.pieces[j]: pytest.approx(weight, rel=1e-6)
            for j, weight in zip(
                found.projection_ids[i].tolist(), found.projection_weights[i].tolist(), strict=True
            )
            if weight
        }

    assert row(b" a") == {b" a": 1.0}
    # In the middle of a text there is no space before "abc"; "bc" of the teacher adds nothing to pinned rows.
    assert row(b"abc") == {b"a": 1 / 1.1, b"bc": 0.1 / 1.1}
    assert row(b" he") == {b" ": 1 / 1.11, b"h": 0.1 / 1.11, b"e": 0.01 / 1.11}
    assert row(b"<think>") == {
        b"<": 1 / 1.11,
        b"t": 0.1 / 1.11,
        b"h": 0.01 / 1.11,
    }  # the largest three of seven
    assert row(b"\xe6\x97") == {b"\xe6": 1 / 1.1, b"\x97": 0.1 / 1.1}  # half a character
    assert found.projection_ids[263, 0] == 1
    assert found.projection_weights[263].tolist() == [1.0, 0.0, 0.0]
    assert found.projection_weights.sum(1) == pytest.approx(np.ones(len(own)))
    with pytest.raises(ValueError, match="k must be at least 1"):
        VocabularyMap.build(student, teacher, ENDS, k=0)


def test_the_teachers_own_tokens_add_to_the_rows_of_their_pieces() -> None:
    """ "lo" is the student's alone and "helo" the teacher's, which the student cuts into "he" and "lo"."""
    student = ByteTokenizer.of(byte_level(("lo",), (("l", "o"),)), "student")
    teacher = ByteTokenizer.of(byte_level(("helo",)), "teacher")
    found = VocabularyMap.build(student, teacher, EndTokens((260,), 260))
    expected = {b"l": 1 / 1.1, b"o": 0.1 / 1.1, b"helo": 0.1 / 1.1}
    lo = student.tokens.ids[b"lo"]
    weights = dict(zip(found.projection_ids[lo].tolist(), found.projection_weights[lo].tolist(), strict=True))
    for piece, weight in expected.items():
        assert weights[teacher.tokens.ids[piece]] == pytest.approx(weight / sum(expected.values()), rel=1e-6)
    he = student.tokens.ids[b"he"]  # the teacher has it, too
    assert found.projection_weights[he].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_the_same_vocabulary_is_the_identity() -> None:
    side = ByteTokenizer.of(byte_level(), "both")
    found = VocabularyMap.build(side, side, EndTokens((259,), 259), k=2)
    assert found.student_ids.tolist() == found.teacher_ids.tolist() == list(range(261))
    assert found.projection_ids[:, 0].tolist() == list(range(261))
    assert found.projection_weights.tolist() == [[1.0, 0.0]] * 261


def test_a_map_is_kept_whole_and_for_one_pair(tmp_path: Path) -> None:
    student, teacher = small()
    made, path = VocabularyMap.build(student, teacher, ENDS), tmp_path / "map.safetensors"
    made.save(path)
    again = VocabularyMap.load(path, made.made_for, student.tokens, teacher.tokens)
    for name in (
        "student_ids",
        "teacher_ids",
        "projection_ids",
        "projection_weights",
    ):
        assert np.array_equal(getattr(made, name), getattr(again, name))
    revision = ByteTokenizer.of(byte_level(("Ġa", "abc", "æĹ", "Ġhi")), "revision")
    other = VocabularyMap.build(revision, teacher, ENDS).made_for
    with pytest.raises(TokenizerError, match="made for other tokenizers than revision and teacher"):
        VocabularyMap.load(path, other, revision.tokens, teacher.tokens)
    arrays = load_file(path)
    save_file(arrays, path, metadata={"format": "mergeopd-vocabulary-map-1", "made_for": made.made_for})
    with pytest.raises(TokenizerError, match=r"not a vocabulary map of this version .*; delete it"):
        VocabularyMap.load(path, made.made_for, student.tokens, teacher.tokens)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TokenizerError, match="not a vocabulary map"):
        VocabularyMap.load(path, made.made_for, student.tokens, teacher.tokens)


def test_real_vocabularies_share_bytes_more_than_spellings() -> None:
    backends = [real_tokenizers.load(name) for name in ("deepseek", "sentencepiece")]
    sides = [ByteTokenizer.of(backend, "t") for backend in backends]
    found = VocabularyMap.build(sides[0], sides[1], EndTokens((1,), 2))
    assert len(found.student_ids) == 29_221
    assert len(set(backends[0].get_vocab()) & set(backends[1].get_vocab())) == 10_086
    own, other = sides[0].tokens, sides[1].tokens
    sample = np.random.default_rng(0).choice(np.setdiff1d(np.arange(len(own)), found.student_ids), 300)
    for i in sample[np.isin(own.kind[sample], (0, 2))].tolist():
        [cut] = sides[1].encode_inside([own.pieces[i].decode(errors="replace")])
        if b"".join(other.pieces[j] for j in cut) == own.pieces[i]:
            assert set(found.projection_ids[i][found.projection_weights[i] > 0].tolist()) >= {cut[0]}
