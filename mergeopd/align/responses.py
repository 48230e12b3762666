"""Encode a student's responses with a teacher's tokenizer, and group the tokens that cover the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from mergeopd.align.agreement import agreement
from mergeopd.align.encoding import ByteTokenizer, Encode
from mergeopd.align.groups import Closed, Ends, close_groups
from mergeopd.align.sides import Side, TokenRow
from mergeopd.align.token_bytes import TokenBytes

Ints = NDArray[np.int64]


class Unaligned(StrEnum):
    """The reason why a token of the student is in no group."""

    NO_TEXT = "no text"  # a special token inside the response, or a leading space that decoding strips
    INTERRUPTED = "interrupted"  # in a group with a special token inside, which the other side does not have
    NOT_UTF8 = "not UTF-8"  # after the first byte that is part of no complete character
    TOO_LONG = "too long"  # in a group of more tokens, on either side, than are compared at once
    LEADING_SPACE = "leading space"  # in a first group in which only one side has a leading space
    NO_ROOM = "no room"  # after the end of the teacher's context
    ROUND_TRIP = "round trip"  # after the point up to which decoding the teacher's tokens restores the text


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """A response in the tokens of both sides.

    `teacher_ids` is the response in the teacher's tokens, up to the last group; if the student ended it, it
    ends with the teacher's end token. Group g is the student's tokens `student_starts[g]` to
    `student_stops[g] - 1` of the response, and likewise the teacher's. Groups are in order, do not overlap,
    have tokens on both sides and cover the same bytes of the text; the end tokens are a group of their own.
    `unaligned` counts the student's tokens that are in no group, by reason, without zeros.
    `space_on_one_side`: only one side's tokens begin with a space that is not part of the text, so the first
    tokens of the two sides differ even where they mean the same.
    """

    teacher_ids: Ints  # [T]
    student_starts: Ints  # [G]
    student_stops: Ints
    teacher_starts: Ints
    teacher_stops: Ints
    unaligned: Mapping[Unaligned, int]
    space_on_one_side: bool

    @property
    def num_student(self) -> int:
        """Number of the student's tokens that are in a group."""
        return int((self.student_stops - self.student_starts).sum())

    @property
    def num_teacher(self) -> int:
        """Number of the teacher's tokens that are in a group."""
        return int((self.teacher_stops - self.teacher_starts).sum())

    @property
    def num_one_to_one(self) -> int:
        """Number of groups with one token on both sides."""
        sizes_S = self.student_stops - self.student_starts
        sizes_T = self.teacher_stops - self.teacher_starts
        return int(np.count_nonzero((sizes_S == 1) & (sizes_T == 1)))

    def groups(self) -> list[tuple[slice, slice]]:
        """Return each group as slices of the response and of `teacher_ids`."""
        bounds = (self.student_starts, self.student_stops, self.teacher_starts, self.teacher_stops)
        rows = zip(*(array.tolist() for array in bounds), strict=True)
        return [(slice(a, b), slice(c, d)) for a, b, c, d in rows]


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The ids that end a student's response, the one it generates first, and the teacher's end token."""

    student: Sequence[int]
    teacher: int


def align_responses(
    responses: Sequence[TokenRow],
    student: ByteTokenizer,
    teacher: ByteTokenizer,
    ends: EndTokens,
    *,
    as_continuation: bool = False,
) -> list[Alignment]:
    """Align a student's responses, as token ids, with the tokens of a teacher. See `align`.

    `as_continuation`: the teacher's prompt ends within a text, so its tokenizer puts no space before the
    response.

    Raises TokenizerError when an id is not in its tokenizer.
    """
    encode = teacher.encode_inside if as_continuation else teacher.encode
    return align(responses, student.tokens, teacher.tokens, encode, ends)


def align(
    responses: Sequence[TokenRow], student: TokenBytes, teacher: TokenBytes, encode: Encode, ends: EndTokens
) -> list[Alignment]:
    """Encode the student's responses with the teacher's tokenizer, and group the tokens of both by bytes.

    The text of a response is the bytes of the student's tokens, canonical or not, without special tokens and
    without the leading space that decoding strips. It is encoded on its own, never together with a prompt,
    so no token crosses from the prompt into the response. An id of `ends.student` at the end of a response is
    its end; elsewhere it is a special token like others. Alignment stops at bytes that are not UTF-8, and
    where the bytes of the teacher's tokens differ from the text. For a teacher that normalises text they are
    compared with its normal form, and groups close only at positions that both texts share.

    `encode` adds no special tokens and recognises none in the text (`ByteTokenizer.encode`).

    Raises TokenizerError when an id is not in its tokenizer.
    """
    if not responses:
        return []
    own_end_ids = frozenset(ends.student)
    own = Side.of(responses, [len(r) > 0 and int(r[-1]) in own_end_ids for r in responses], student)
    texts = [_Text.of(own.bytes_of(row), student.strip) for row in range(len(responses))]
    encoded = _encoded([text.text for text in texts], encode)
    ended = [bool(end) and text.whole for end, text in zip(own.ended, texts, strict=True)]
    teacher_rows = [[*ids, ends.teacher] if end else ids for ids, end in zip(encoded, ended, strict=True)]
    other = Side.of(teacher_rows, ended, teacher)
    matched = _matched(texts, own, other, encoded, teacher)
    closed = close_groups(Ends(matched.own, own.rows), Ends(matched.other, other.rows), matched.limits)
    return _assembled(closed, own, other, teacher_rows, matched)


def written_text(ids: TokenRow, tokens: TokenBytes) -> tuple[str, bool]:
    """Decode tokens up to the first byte that is part of no complete character; also whether that is all."""
    text = _Text.of(tokens.joined(np.array(ids, np.int64)).tobytes(), tokens.strip)
    return text.text, text.whole


@dataclass(frozen=True, slots=True)
class _Text:
    """The part of a response that is text, after `dropped` leading bytes."""

    text: str
    num_bytes: int
    dropped: int
    whole: bool

    @classmethod
    def of(cls, content: bytes, strip: bool) -> _Text:
        dropped = int(strip and content[:1] == b" ")
        content = content[dropped:]
        try:
            return cls(content.decode(), len(content), dropped, True)
        except UnicodeDecodeError as error:
            return cls(content[: error.start].decode(), error.start, dropped, False)


def _encoded(texts: Sequence[str], encode: Encode) -> list[Sequence[int]]:
    """Encode with the teacher's tokenizer; an empty text has no ids, even if a space is put before it."""
    given = [text for text in texts if text]
    ids = iter(encode(given) if given else ())
    return [next(ids) if text else () for text in texts]


@dataclass(frozen=True, slots=True, eq=False)
class _Matched:
    """Ends of both sides as positions in one text, the last position of each, and why it is the last.

    `leading_space_differs`: only one side has a space before the text.
    """

    own: Ints
    other: Ints
    limits: Ints
    broken: list[Unaligned | None]
    leading_space_differs: list[bool]


def _matched(
    texts: Sequence[_Text], own: Side, other: Side, encoded: Sequence[Sequence[int]], teacher: TokenBytes
) -> _Matched:
    own_ends, other_ends = own.ends.copy(), other.ends.copy()
    limits = np.empty(len(texts), np.int64)
    broken: list[Unaligned | None] = []
    leading_space_differs: list[bool] = []
    for row, text in enumerate(texts):
        here, there = slice(*own.rows[row : row + 2]), slice(*other.rows[row : row + 2])
        if text.dropped:
            own_ends[here] -= text.dropped
        whole, limit = True, text.num_bytes
        prefix = _prefix(text, own, other, row, teacher)
        if prefix is not None:
            other_ends[there] -= prefix
        else:
            agreed = agreement(text.text, encoded[row], teacher)
            own_ends[here] *= agreed.scale
            other_ends[there][: len(agreed.ends)] = agreed.ends
            whole, limit, prefix = agreed.whole, agreed.limit, agreed.num_before
        leading_space_differs.append(bool(text.num_bytes) and text.dropped != prefix)
        broken.append(Unaligned.ROUND_TRIP if not whole else None if text.whole else Unaligned.NOT_UTF8)
        # The end is one position after the text, or none where something is missing before it.
        end = limit + 1 if broken[-1] is None else 0
        if own.ended[row]:
            own_ends[own.rows[row + 1] - 1] = end
        if other.ended[row]:
            other_ends[other.rows[row + 1] - 1] = end
        limits[row] = max(limit, end)
    return _Matched(own_ends, other_ends, limits, broken, leading_space_differs)


def _prefix(text: _Text, own: Side, other: Side, row: int, teacher: TokenBytes) -> int | None:
    """Count the bytes of the teacher's tokens before the text; None where the rest is not simply the text."""
    begin = own.byte_rows[row] + text.dropped
    expected, given = own.content[begin : begin + text.num_bytes], other.bytes_of(row)
    if given == expected:
        return 0
    return 1 if teacher.prefix and expected and given == b" " + expected else None


def _assembled(
    closed: Closed, own: Side, other: Side, teacher_rows: Sequence[Sequence[int]], matched: _Matched
) -> list[Alignment]:
    """Express groups in positions of all tokens, without groups that have a special token inside."""
    num, sides = len(teacher_rows), []
    whole = np.ones(len(closed.row), bool)
    for side, starts, stops in (
        (own, closed.student_starts, closed.student_stops),
        (other, closed.teacher_starts, closed.teacher_stops),
    ):
        is_end = np.zeros(len(side.where), bool)
        is_end[side.last] = True
        starts = np.where(is_end[stops - 1], stops - 1, starts)  # an end token covers no text
        placed = side.where[starts], side.where[stops - 1] + 1
        whole &= placed[1] - placed[0] == stops - starts
        sides.append((*placed, stops - starts))
    (student_starts, student_stops, sizes), (teacher_starts, teacher_stops, _) = sides
    aligned = np.bincount(closed.row[whole], sizes[whole], num).astype(np.int64)
    interrupted = np.bincount(closed.row[~whole], sizes[~whole], num).astype(np.int64)
    no_text = own.lengths - np.diff(own.rows)
    rest = own.lengths - aligned - interrupted - no_text
    bounds = np.searchsorted(closed.row[whole], np.arange(num + 1))
    arrays = [array[whole] for array in (student_starts, student_stops, teacher_starts, teacher_stops)]
    result = []
    for row, reason in enumerate(matched.broken):
        mine = slice(bounds[row], bounds[row + 1])
        starts_S, stops_S, starts_T, stops_T = (array[mine] for array in arrays)
        used = int(stops_T[-1]) if len(stops_T) else 0
        counts = {Unaligned.NO_TEXT: int(no_text[row]), Unaligned.INTERRUPTED: int(interrupted[row])}
        why = reason or Unaligned.NO_TEXT
        counts[why] = counts.get(why, 0) + int(rest[row])
        ids = np.array(teacher_rows[row][:used], np.int64)
        unaligned = {key: count for key, count in counts.items() if count}
        leading_space_differs = matched.leading_space_differs[row]
        result.append(Alignment(ids, starts_S, stops_S, starts_T, stops_T, unaligned, leading_space_differs))
    return result
