"""Alignment by bytes over real tokenizers, against a reference that goes token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
import real_tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.responses import Alignment, EndTokens, Unaligned, align
from mergeopd.errors import TokenizerError

TEXTS = (
    "",
    " ",
    "   ",
    "Hello, world!",
    " leading space",
    "  two leading, trailing  ",
    "\n\n\tindented\r\n",
    "def f(x):\n    return x**2  # ² \n\n\n",
    "2011 + 1,000,000 = 3.14159e-10",
    "emoji 🙂👩‍👩‍👧 flags 🇩🇪🇫🇷",
    "漢字とかな 中文 한국어 ไทย العربية",
    "naïve e\u0301 A\u030a q\u0323\u0307 \u1100\u1161\u11a8",
    "<|im_end|></s><s>[INST]<unk>",
    "<0x41>▁",
    "\x00\x7f\u2028\ufeff\u200d",
)
PAIRS = [(a, b) for a in real_tokenizers.NAMES for b in real_tokenizers.NAMES]
ENDS = {"tekken": 2, "deepseek": 1, "sentencepiece": 2, "qwen": 151645}
STARTS = {"tekken": 1, "deepseek": 0, "sentencepiece": 1}


@cache
def side(name: str) -> ByteTokenizer:
    return ByteTokenizer.of(real_tokenizers.load(name), name)


def aligned(student: str, teacher: str, answers: Sequence[Sequence[int]]) -> list[Alignment]:
    ends = EndTokens((ENDS[student],), ENDS[teacher])
    return align(answers, side(student).tokens, side(teacher).tokens, side(teacher).encode, ends)


def groups(found: Alignment) -> list[tuple[int, int, int, int]]:
    arrays = (found.student_starts, found.student_stops, found.teacher_starts, found.teacher_stops)
    return [tuple(int(i) for i in group) for group in zip(*arrays, strict=True)]


def reference(own: list[bytes], other: list[bytes]) -> list[tuple[int, int, int, int]]:
    """Every pair of prefixes is compared; a group lies between two neighbours that are equal."""
    cuts = [
        (i, j)
        for i in range(1, len(own) + 1)
        for j in range(1, len(other) + 1)
        if b"".join(own[:i]) == b"".join(other[:j])
    ]
    return [(a[0], b[0], a[1], b[1]) for a, b in pairwise([(0, 0), *cuts])]


def check(student: str, teacher: str, ids: Sequence[int], found: Alignment) -> None:
    """All that must hold of an answer without surprises: bytes equal, in order, everything covered."""
    own, other = side(student).tokens, side(teacher).tokens
    ended = bool(len(ids)) and ids[-1] == ENDS[student]
    text = b"".join(own.pieces[i] for i in ids[: len(ids) - ended])
    text = text.removeprefix(b" ") if own.strip else text
    read = b"".join(other.pieces[i] for i in found.teacher_ids)
    # What SentencePiece tokenizers write before a text is in the first group's tokens, and no part of it.
    lead_S = b" " * own.strip
    lead_T = b"" if text.startswith(read) else b" " * other.prefix
    last_S = last_T = 0
    for start_S, stop_S, start_T, stop_T in groups(found):
        assert last_S <= start_S < stop_S <= len(ids)
        assert last_T <= start_T < stop_T <= len(found.teacher_ids)
        bytes_S = b"".join(own.pieces[i] for i in ids[start_S:stop_S])
        bytes_T = b"".join(other.pieces[i] for i in found.teacher_ids[start_T:stop_T])
        if last_T == 0:
            bytes_S, bytes_T = bytes_S.removeprefix(lead_S), bytes_T.removeprefix(lead_T)
        assert bytes_S == bytes_T
        last_S, last_T = stop_S, stop_T
    num_aligned = int((found.student_stops - found.student_starts).sum())
    assert num_aligned + sum(found.unaligned.values()) == len(ids)
    assert all(found.unaligned.values())


def student_ids(name: str, text: str) -> list[int]:
    return list(side(name).encode([text])[0])


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_text_is_covered_by_groups(student: str, teacher: str) -> None:
    answers = [[*student_ids(student, text), ENDS[student]] for text in TEXTS]
    for text, ids, found in zip(TEXTS, answers, aligned(student, teacher, answers), strict=True):
        check(student, teacher, ids, found)
        if "▁" in text and "sentencepiece" in (student, teacher):
            continue  # to SentencePiece this sign is a space
        assert set(found.unaligned) <= {Unaligned.NO_TEXT}
        assert groups(found)[-1] == (
            len(ids) - 1,
            len(ids),
            len(found.teacher_ids) - 1,
            len(found.teacher_ids),
        )
        own, other = side(student).tokens, side(teacher).tokens
        pieces_S, pieces_T = (
            [own.pieces[i] for i in ids[:-1]],
            [other.pieces[i] for i in found.teacher_ids[:-1]],
        )
        for pieces, tokens in ((pieces_S, own), (pieces_T, other)):
            if tokens.prefix and pieces:
                pieces[0] = pieces[0].removeprefix(b" ")
        assert b"".join(pieces_T).decode() == b"".join(pieces_S).decode() == text
        if all(pieces_S) and all(pieces_T):
            assert groups(found)[:-1] == reference(pieces_S, pieces_T)


@pytest.mark.parametrize("name", real_tokenizers.NAMES)
def test_the_same_tokenizer_twice_gives_one_group_per_token(name: str) -> None:
    answers = [[*student_ids(name, text), ENDS[name]] for text in TEXTS if "▁" not in text]
    for ids, found in zip(answers, aligned(name, name, answers), strict=True):
        if ids[0] == side(name).tokens.ids[b" "] and name == "sentencepiece":
            continue  # the space before the text, alone in a token, belongs to the token after it
        assert found.teacher_ids.tolist() == ids
        assert groups(found) == [(i, i + 1, i, i + 1) for i in range(len(ids))]
        assert not found.unaligned


ALPHABET = st.one_of(
    st.sampled_from(["🙂", "👩‍👩‍👧", "🇩🇪", "e\u0301", "é", "漢", "字", "한", "\u1112\u1161", "2", "0", "1"]),
    st.sampled_from(
        [" ", "  ", "\n", "\t", "the", " the", "def f():", " ==", "<s>", "</s>", "<0x41>", "😶‍🌫️"]
    ),
    st.characters(exclude_categories=["Cs"], exclude_characters="▁"),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pair=st.sampled_from(PAIRS),
    texts=st.lists(st.lists(ALPHABET, max_size=20).map("".join), min_size=1, max_size=4),
    cut=st.booleans(),
    data=st.data(),
)
def test_any_text(pair: tuple[str, str], texts: list[str], cut: bool, data: st.DataObject) -> None:
    student, teacher = pair
    answers = []
    for text in texts:
        ids = student_ids(student, text)
        if cut:  # the length limit, anywhere
            ids = ids[: data.draw(st.integers(0, len(ids)))]
        answers.append(ids if data.draw(st.booleans()) else [*ids, ENDS[student]])
    for ids, found in zip(answers, aligned(student, teacher, answers), strict=True):
        check(student, teacher, ids, found)
        assert set(found.unaligned) <= {Unaligned.NO_TEXT, Unaligned.NOT_UTF8}
        if Unaligned.NOT_UTF8 in found.unaligned:
            assert cut


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pair=st.sampled_from(PAIRS), data=st.data())
def test_any_tokens(pair: tuple[str, str], data: st.DataObject) -> None:
    """Whatever a student samples: pieces of characters, special tokens, cuts that no tokenizer would make."""
    student, teacher = pair
    ids = data.draw(st.lists(st.integers(0, len(side(student).tokens) - 1), max_size=12))
    [found] = aligned(student, teacher, [ids])
    check(student, teacher, ids, found)
    if not any(side(student).tokens.widths[ids]):
        assert not len(found.teacher_ids) or found.teacher_ids.tolist() == [ENDS[teacher]]


def test_batches_do_not_mix() -> None:
    answers = [[*student_ids("tekken", text), *([2] * (len(text) % 2))] for text in TEXTS]
    together = aligned("tekken", "sentencepiece", answers)
    alone = [aligned("tekken", "sentencepiece", [ids])[0] for ids in answers]
    for a, b in zip(together, alone, strict=True):
        assert groups(a) == groups(b)
        assert a.teacher_ids.tolist() == b.teacher_ids.tolist()
        assert a.unaligned == b.unaligned
    assert aligned("tekken", "sentencepiece", []) == []


def test_empty_and_only_ended() -> None:
    empty, ended = aligned("tekken", "deepseek", [[], [2]])
    assert groups(empty) == []
    assert empty.teacher_ids.tolist() == []
    assert groups(ended) == [(0, 1, 0, 1)]
    assert ended.teacher_ids.tolist() == [1]


def test_a_start_on_one_side_shifts_nothing() -> None:
    text = "Hello, world! 漢字"
    plain = student_ids("sentencepiece", text)
    ids = [STARTS["sentencepiece"], *plain, ENDS["sentencepiece"]]
    [found] = aligned("sentencepiece", "deepseek", [ids])
    [without] = aligned("sentencepiece", "deepseek", [ids[1:]])
    assert [(a - 1, b - 1, c, d) for a, b, c, d in groups(found)] == groups(without)
    assert found.unaligned == {Unaligned.NO_TEXT: 1}
    start, teacher = STARTS["deepseek"], side("deepseek")

    def with_start(texts: Sequence[str]) -> list[list[int]]:
        return [[start, *ids] for ids in teacher.encode(texts)]

    [other] = align([ids[1:]], side("sentencepiece").tokens, teacher.tokens, with_start, EndTokens((2,), 1))
    assert [(a, b, c - 1, d - 1) for a, b, c, d in groups(other)] == groups(without)


def test_digits_cut_differently() -> None:
    """DeepSeek reads up to three digits at once, tekken each alone."""
    ids = student_ids("tekken", "x=2011")
    [found] = aligned("tekken", "deepseek", [ids])
    widths = [(stop - start, stop_T - start_T) for start, stop, start_T, stop_T in groups(found)]
    assert widths[-2:] == [(3, 1), (1, 1)]


def test_an_answer_cut_inside_a_character() -> None:
    ids = student_ids("sentencepiece", "ok 漢")  # three byte tokens at the end
    assert len(ids) >= 4
    [found] = aligned("sentencepiece", "tekken", [[*ids[:-1], 2]])
    check("sentencepiece", "tekken", [*ids[:-1], 2], found)
    assert (
        found.unaligned[Unaligned.NOT_UTF8] == 3
    )  # two bytes, and the end that the teacher cannot see there
    assert b"".join(side("tekken").tokens.pieces[i] for i in found.teacher_ids) in (b"ok", b"ok ")


def test_cuts_that_the_tokenizer_would_not_make() -> None:
    tokens = side("tekken").tokens
    ids = [tokens.ids[piece] for piece in (b"H", b"el", b"l", b"o", b" ", b"wor", b"ld")]
    assert ids != student_ids("tekken", "Hello world")
    [found] = aligned("tekken", "deepseek", [ids])
    assert groups(found) == [(0, 4, 0, 1), (4, 7, 1, 2)]


def test_special_tokens_swallow_no_text() -> None:
    tokens = side("tekken").tokens
    hello, world, tool = tokens.ids[b"Hello"], tokens.ids[b" world"], 9
    [between] = aligned("tekken", "deepseek", [[hello, tool, world, 2]])
    assert groups(between) == [(0, 1, 0, 1), (2, 3, 1, 2), (3, 4, 2, 3)]
    assert between.unaligned == {Unaligned.NO_TEXT: 1}
    parts = [tokens.ids[b"Hel"], tool, tokens.ids[b"lo"], world]
    [inside] = aligned("tekken", "deepseek", [parts])
    assert groups(inside) == [(3, 4, 1, 2)]
    assert inside.unaligned == {Unaligned.NO_TEXT: 1, Unaligned.INTERRUPTED: 2}


def test_marks_of_turns_in_an_answer_are_text_to_the_teacher() -> None:
    text = "</s> <|im_end|> [INST]"
    ids = student_ids("deepseek", text)
    [found] = aligned("deepseek", "sentencepiece", [ids])
    assert not any(side("sentencepiece").tokens.kind[found.teacher_ids] == 3)
    assert not found.unaligned


def test_an_id_of_another_tokenizer_is_refused() -> None:
    with pytest.raises(
        TokenizerError, match=r"sentencepiece: a response has the token 100000, but ids end at 32767"
    ):
        aligned("sentencepiece", "tekken", [[100000]])


@pytest.mark.parametrize(
    ("student", "teacher", "inside", "expected"),
    [
        ("qwen", "sentencepiece", False, True),
        ("qwen", "sentencepiece", True, False),
        ("sentencepiece", "qwen", False, True),
        ("sentencepiece", "sentencepiece", False, False),
        ("sentencepiece", "sentencepiece", True, True),
        ("qwen", "tekken", False, False),
    ],
)
@pytest.mark.parametrize("text", ["Hello, world", " a", "漢字", "e\u0301"])
def test_a_leading_space_on_one_side_is_reported(
    student: str, teacher: str, inside: bool, expected: bool, text: str
) -> None:
    encode = side(teacher).encode_inside if inside else side(teacher).encode
    [ids, *_] = side(student).encode([text])
    ends = EndTokens((ENDS[student],), ENDS[teacher])
    found, nothing = align([ids, ()], side(student).tokens, side(teacher).tokens, encode, ends)
    assert found.space_on_one_side is expected
    assert not nothing.space_on_one_side
