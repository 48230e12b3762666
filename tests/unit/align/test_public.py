"""What `mergeopd.align` offers to other programs."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest
from byte_tokenizers import byte_level, sentencepiece

import mergeopd.align
from mergeopd.align import ByteTokenizer, EndTokens, align_responses
from mergeopd.errors import TokenizerError


def test_the_example() -> None:
    found = doctest.testmod(mergeopd.align)
    assert found.attempted >= 8
    assert found.failed == 0


def test_every_name_is_there() -> None:
    for name in mergeopd.align.__all__:
        assert getattr(mergeopd.align, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mergeopd.align.nothing  # noqa: B018


def test_a_tokenizer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=sentencepiece("unigram"))
    student, teacher = ByteTokenizer.of(byte_level(), "student"), ByteTokenizer.of(fast, "teacher")
    [ids] = student.encode(["abc"])
    for as_continuation, first in ((False, " a"), (True, "a")):
        [found] = align_responses([ids], student, teacher, EndTokens((), 1), as_continuation=as_continuation)
        assert fast.decode(found.teacher_ids) == "abc"
        assert teacher.tokens.pieces[found.teacher_ids[0]].decode() == first
        assert found.groups() == [(slice(0, 1), slice(0, 1)), (slice(1, 3), slice(1, 2))]
    with pytest.raises(TokenizerError, match="teacher: a str is not backed by"):
        ByteTokenizer.of("models/teacher", "teacher")


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, mergeopd.align; print(*sorted({'numpy', 'tokenizers', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
