"""What a teacher with another tokenizer is left of an answer, by its bridge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from byte_tokenizers import byte_level, sentencepiece

from mergeopd.align.encoding import ByteTokenizer
from mergeopd.align.responses import EndTokens, Unaligned
from mergeopd.recipe.bridges import KINDS, Bridge
from mergeopd.teacher.cross_tokenizer import CrossTokenizer


def crossing(kind: str, *, inside: bool) -> CrossTokenizer:
    own, other = byte_level(), sentencepiece("bpe")
    renderer: Any = SimpleNamespace(max_positions=64, render=lambda prompt: ())
    return CrossTokenizer(
        teacher="other",
        bridge=Bridge.model_validate({kind: {}}),
        renderer=renderer,
        student=ByteTokenizer.of(own, "student"),
        other=ByteTokenizer.of(other, "other"),
        ends=EndTokens((own.token_to_id("<end>"),), other.token_to_id("</s>")),
        inside=inside,
    )


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_leading_space_on_one_side_is_not_trained(kind: str, inside: bool) -> None:
    """Where the teacher begins with "▁a" and the student with "a", tokens of equal bytes mean other texts."""
    over = crossing(kind, inside=inside)
    [ids, *_] = over.student.encode(["abc"])
    answer: Any = SimpleNamespace(response_ids=(*ids, over.ends.student[0]), prompt=None)
    empty: Any = SimpleNamespace(response_ids=over.ends.student, prompt=None)
    found, nothing = over.align([answer, empty])
    left_out = not inside and kind in ("pieces", "gold", "projection")
    assert found.student_starts.tolist() == ([1, 3] if left_out else [0, 1, 3])
    assert dict(found.unaligned) == ({Unaligned.LEADING_SPACE: 1} if left_out else {})
    assert over.other.tokens.pieces[found.teacher_ids[0]] == (b"a" if inside else b" a")
    assert nothing.student_starts.tolist() == [0]
