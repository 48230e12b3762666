"""Which tokenizers can be turned back into bytes, and which are refused in words."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tokenizers
from byte_tokenizers import byte_level, sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mergeopd.align.agreement import agreement
from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.normal import normalised
from mergeopd.align.responses import EndTokens, Unaligned, align
from mergeopd.align.token_bytes import ADDED, BYTE, SPECIAL, TEXT, UNKNOWN, TokenBytes
from mergeopd.errors import TokenizerError


def test_bytes_of_a_byte_level_vocabulary() -> None:
    backend = byte_level()
    tokens = TokenBytes.from_tokenizer(backend, "t")
    assert len(tokens) == 261
    for i in range(259):
        written = backend.id_to_token(i)
        assert tokens.pieces[i] == bytes(byte_of(character) for character in written)
    assert sorted(p for p in tokens.pieces if len(p) == 1) == [bytes([b]) for b in range(256)]
    assert tokens.pieces[259:] == (b"", b"<think>")
    assert tokens.kind[-3:].tolist() == [TEXT, SPECIAL, ADDED]
    assert tokens.joined(np.array([260, 259, 256])).tobytes() == b"<think>he"


def byte_of(character: str) -> int:
    """The byte by the library: its decoder gives bytes as latin-1 cannot, so ask how each byte is written."""
    code = ord(character)
    if code < 0x100:
        return code
    return [b for b in range(256) if not (0x21 <= b < 0x7F or 0xA1 <= b < 0xAD or b >= 0xAE)][code - 0x100]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_bytes_of_unigram_with_byte_fallback(scheme: str) -> None:
    tokens = TokenBytes.from_tokenizer(sentencepiece("unigram", scheme), "t")
    assert tokens.kind[:3].tolist() == [UNKNOWN, SPECIAL, BYTE]
    assert tokens.pieces[2 + 0xE6] == b"\xe6"
    assert tokens.pieces[-7:] == (b" ", b"a", b"b", b"c", b" a", b"bc", b"  ")
    assert tokens.prefix is tokens.strip is (scheme != "never")
    assert tokens.ids[b" "] == 258  # not <0x20>


WORDS = {"a": 0, "##b": 1, "[UNK]": 2}
REFUSED = {
    "WordPiece joins pieces by '##'": tokenizers.Tokenizer(models.WordPiece(WORDS, unk_token="[UNK]")),
    "the normalizer Lowercase lowers case": byte_level(normalizer=normalizers.Lowercase()),
    "the normalizer BertNormalizer changes": byte_level(normalizer=normalizers.BertNormalizer()),
    "the normalizer StripAccents takes accents away": byte_level(
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "the normalizer replaces": byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "puts 'x' before every text": byte_level(normalizer=normalizers.Prepend("x")),
    "to NFC and to NFKC": byte_level(
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])
    ),
    "the pre-tokenizer WhitespaceSplit drops": byte_level(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "the pre-tokenizer Split drops": byte_level(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
    "end_of_word_suffix '</w>'": tokenizers.Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")),
    "at random": tokenizers.Tokenizer(models.BPE({"a": 0}, [], dropout=0.1)),
    "the decoder CTC does more": byte_level(decoder=decoders.CTC()),
    "writes bytes as characters and spaces as": byte_level(normalizer=normalizers.Replace(" ", "▁")),
    # Says it is byte-level in its decoder alone: what it reads is not what its tokens say.
    "no part of the tokenizer explains why": byte_level(("é", "漢"), pre_tokenizer=None),
}


@pytest.mark.parametrize("why", REFUSED)
def test_tokenizers_that_cannot_be_inverted_are_refused(why: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        TokenBytes.from_tokenizer(REFUSED[why], "models/other")
    assert why in str(caught.value)
    assert str(caught.value).startswith("models/other: ")
    assert str(caught.value).endswith("such a model can teach only students that share its tokenizer")


def one(
    ids: list[int], student: tokenizers.Tokenizer, teacher: tokenizers.Tokenizer, ends: EndTokens
) -> tuple[list[tuple[bytes, bytes]], dict[Unaligned, int]]:
    """The groups of one answer as bytes of both sides."""
    own, other = TokenBytes.from_tokenizer(student, "own"), ByteTokenizer.of(teacher, "other")
    [found] = align([ids], own, other.tokens, other.encode, ends)
    joined = [
        (
            b"".join(own.pieces[i] for i in ids[a:b]),
            b"".join(other.tokens.pieces[i] for i in found.teacher_ids[c:d]),
        )
        for a, b, c, d in zip(
            found.student_starts, found.student_stops, found.teacher_starts, found.teacher_stops, strict=True
        )
    ]
    return joined, dict(found.unaligned)


def encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


NO_ENDS = EndTokens((), 0)


def test_decomposed_accents_under_a_teacher_that_composes() -> None:
    student, teacher = byte_level(), byte_level(normalizer=normalizers.NFC())
    groups, unaligned = one(encode(student, "hee\u0301l\u00e9"), student, teacher, NO_ENDS)
    assert groups == [
        (b"he", b"he"),
        (b"e\xcc\x81", b"\xc3\xa9"),
        (b"l", b"l"),
        (b"\xc3", b"\xc3"),
        (b"\xa9", b"\xa9"),
    ]
    assert not unaligned


def test_an_end_behind_decomposed_text() -> None:
    student, teacher = byte_level(), byte_level(normalizer=normalizers.NFC())
    ids = [*encode(student, "e\u0301"), 259]
    groups, unaligned = one(ids, student, teacher, EndTokens((259,), 259))
    assert groups == [(b"e\xcc\x81", b"\xc3\xa9"), (b"", b"")]
    assert not unaligned


def test_a_teacher_that_reads_something_else_is_believed_only_so_far() -> None:
    """To SentencePiece a written ▁ is a space."""
    student = byte_level()
    groups, unaligned = one(
        [*encode(student, "ab▁c"), 259], student, sentencepiece("bpe"), EndTokens((259,), 1)
    )
    assert groups == [(b"a", b" a"), (b"b", b"b")]
    assert unaligned == {Unaligned.ROUND_TRIP: 5}


def test_unknown_tokens_give_nothing_back() -> None:
    student = byte_level()
    teacher = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "h": 1, "e": 2}, unk_token="<unk>"))
    teacher.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    groups, unaligned = one(encode(student, "heXhe"), student, teacher, NO_ENDS)
    assert groups == [(b"he", b"he")]
    assert unaligned == {Unaligned.ROUND_TRIP: 2}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_spaces_before_a_text_and_after_added_tokens(kind: str) -> None:
    student, teacher = byte_level(), sentencepiece(kind)
    teacher.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    groups, unaligned = one(encode(student, "a<think>a bc"), student, teacher, NO_ENDS)
    # After <think>, too, the teacher reads " a".
    assert groups == [
        (b"a", b" a"),
        (b"<think>", b"<think>"),
        (b"a", b" a"),
        (b" ", b" "),
        (b"bc", b"bc"),
    ]
    assert not unaligned


@pytest.mark.parametrize(
    ("text", "form", "prefix", "expected"),
    [
        ("\u00a0ab", normalizers.NFKC(), False, False),
        ("\u3000ab", normalizers.NFKC(), False, False),
        ("\u00a0ab", normalizers.NFKC(), True, True),
        (" ab", None, True, True),
        (" abX", None, True, True),
        ("abX", None, True, True),
        ("abX", None, False, False),
        (" abX", None, False, False),
    ],
)
def test_whether_one_side_has_a_space_before_the_text(
    text: str, form: normalizers.Normalizer | None, prefix: bool, expected: bool
) -> None:
    """Found from what encoding put there, not from the first byte; "X" is unknown to the teacher."""
    words = ["▁", "a", "b", "<unk>"]
    teacher = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    steps = [*([form] if form else []), *([normalizers.Prepend("▁")] if prefix else [])]
    teacher.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    teacher.decoder = decoders.Replace("▁", " ")
    other = ByteTokenizer.of(teacher, "other")
    own = byte_level()
    tokens = TokenBytes.from_tokenizer(own, "own")
    [found] = align([encode(own, text)], tokens, other.tokens, other.encode, NO_ENDS)
    assert len(found.student_starts)
    assert found.space_on_one_side is expected


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_student_that_writes_a_space_before_its_text(kind: str) -> None:
    student, teacher = sentencepiece(kind), byte_level()
    groups, unaligned = one([*encode(student, "a bc"), 1], student, teacher, EndTokens((1,), 259))
    assert groups == [(b" a", b"a"), (b" ", b" "), (b"bc", b"bc"), (b"", b"")]
    marker = TokenBytes.from_tokenizer(student, "own").ids[b" "]
    groups, unaligned = one([marker, 1], student, teacher, EndTokens((1,), 259))
    assert groups == [(b"", b"")]
    assert unaligned == {Unaligned.NO_TEXT: 1}


@pytest.mark.parametrize("kind", [UNKNOWN, SPECIAL])
def test_nothing_is_believed_behind_a_token_without_bytes(kind: int) -> None:
    """Even where the next token begins like the character that it stands for: é and ê share a byte."""
    teacher = TokenBytes.from_tokenizer(byte_level(), "t")
    ids = [teacher.ids[piece] for piece in (b"a", b"\xc3", b"\xaa")]
    kinds = teacher.kind.copy()
    kinds[259] = kind
    found = agreement("aéê", [ids[0], 259, *ids[1:]], replace(teacher, kind=kinds))
    assert (found.limit, found.whole) == (1, False)


@pytest.mark.parametrize("inside", [False, True])
def test_a_unigram_teacher_reads_special_tokens_as_text(inside: bool) -> None:
    """Its library matches `</s>` in the vocabulary, and would align the second `</` with the first."""
    student, backend = byte_level(), sentencepiece("unigram")
    backend.add_special_tokens(["<mask>"])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    teacher = ByteTokenizer.of(backend, "teacher")
    text = "a</s></a<mask><think>b"
    [ids] = (teacher.encode_inside if inside else teacher.encode)([text])
    assert teacher.tokens.joined(np.array(ids)).tobytes().decode().replace(" ", "") == text
    assert backend.token_to_id("<think>") in ids
    own = TokenBytes.from_tokenizer(student, "own")
    [found] = align([encode(student, text)], own, teacher.tokens, teacher.encode, NO_ENDS)
    assert not found.unaligned
    # The space that encoding puts behind <think> is a token of its own: it belongs to the next group.
    assert found.teacher_stops[-1] - found.teacher_starts[-1] == 2


@settings(max_examples=200, deadline=None)
@example("\u1100\u1161\u11a8", "NFC")
@example("a\u09c7\u09be", "NFC")
@example("x\u0f73\u0301", "NFKC")
@given(
    text=st.text(
        st.one_of(
            st.sampled_from(
                "ae\u0301\u0323\u0307é①ﬁ\u1100\u1161\u11a8가\u0958\u212b\u0344\u09c7\u09be\u0f73"
            ),
            st.characters(exclude_categories=["Cs"]),
        ),
        max_size=12,
    ),
    form=st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]),
)
def test_places_in_a_normal_form(text: str, form: Any) -> None:
    """Wherever both texts have a place in common, what lies before it is each other's normal form."""
    found = normalised(text, form)
    assert found.content == unicodedata.normalize(form, text).encode()
    ends = np.arange(len(found.content) + 1)
    places = found.places(ends)
    assert (np.diff(places) >= 0).all()
    assert places[0] == 0
    assert places[-1] == 2 * len(text.encode())
    for end, place in zip(ends.tolist(), places.tolist(), strict=True):
        if place % 2 == 0:
            before, normal = text.encode()[: place // 2], found.content[:end]
            try:
                assert unicodedata.normalize(form, before.decode()).encode() == normal
            except UnicodeDecodeError:  # inside a character that is in both texts
                assert before.endswith(normal[-1:])
