"""Documents are cut into sequences in which every token is learned exactly once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from byte_jobs import write_byte_tokenizer

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.documents import sequences
from mergeopd.data.prompts import read_prompts
from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.plan import SourcePlan
from mergeopd.types import Prompt

TEXTS = ["abcdab", "c", "dd"]


@pytest.fixture
def student(tmp_path: Path) -> Renderer:
    write_byte_tokenizer(tmp_path, [])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    tokenizer = Tokenizer.load(tmp_path)
    return Renderer(tokenizer, ChatTemplate("-", {}), tokenizer.vocab_size, (tokenizer.eos_id,), 64)


def ids_of(student: Renderer) -> list[list[int]]:
    return [[*student.tokenizer.encode(text), student.tokenizer.eos_id] for text in TEXTS]


def source_of(folder: Path, rows: list[str], **settings: object) -> SourcePlan:
    file = folder / "facts.jsonl"
    file.write_text("\n".join(rows))
    document = {
        "name": "facts",
        "source": str(file),
        "domain": "facts",
        "verifier": None,
        "prompt_field": "prompt",
        "reference_field": "answer",
        "response_field": "response",
        "teachers": {},
        "share": 1.0,
        "limit": None,
        "text_field": "text",
    }
    return SourcePlan.model_validate({**document, **settings})


def cut(folder: Path, student: Renderer, num_ids: int = 1000, **settings: object) -> tuple[Prompt, ...]:
    source = source_of(folder, [f'{{"text": "{text}"}}' for text in TEXTS], **settings)
    return sequences(source, read_prompts(source), student, num_ids)


@pytest.mark.parametrize("max_tokens", [2, 3, 5, 64])
def test_every_token_of_a_document_is_learned_once_with_its_predecessor(
    tmp_path: Path, student: Renderer, max_tokens: int
) -> None:
    pieces = cut(tmp_path, student, max_tokens=max_tokens)
    assert len({piece.key for piece in pieces}) == len(pieces)
    learned: dict[str, list[int]] = {}
    for piece in pieces:
        assert piece.document is not None
        before = learned.setdefault(piece.key.partition(".")[0], [])
        assert student.render(piece).tolist() == [before[-1] if before else student.tokenizer.eos_id]
        before += piece.document.ids.tolist()
        assert 1 + len(piece.document.ids) <= max_tokens
    assert list(learned.values()) == ids_of(student)


def test_packed_documents_are_one_sequence_of_tokens(tmp_path: Path, student: Renderer) -> None:
    pieces = [piece.document for piece in cut(tmp_path, student, max_tokens=5, pack=True)]
    stream = [student.tokenizer.eos_id, *(i for ids in ids_of(student) for i in ids)]
    assert [piece.ids.tolist() for piece in pieces if piece] == [stream[1:5], stream[5:9], stream[9:13]]
    assert [piece.context_ids.tolist() for piece in pieces if piece] == [
        stream[0:1],
        stream[4:5],
        stream[8:9],
    ]


def test_a_tokenizer_with_bos_begins_every_document_with_it(tmp_path: Path, student: Renderer) -> None:
    with_bos = dataclasses.replace(student.tokenizer, special_tokens={"bos_token": "z"})
    renderer = dataclasses.replace(student, tokenizer=with_bos)
    [piece, *_] = cut(tmp_path, renderer, pack=True)
    assert piece.document is not None
    first, second, third = ids_of(student)
    [bos] = student.tokenizer.encode("z")
    assert piece.document.context_ids.tolist() == [bos]
    assert piece.document.ids.tolist() == [*first, bos, *second, bos, *third]


def test_rows_without_text_and_tokens_that_a_teacher_lacks_are_refused(
    tmp_path: Path, student: Renderer
) -> None:
    with pytest.raises(DataError, match=r"facts.jsonl: row 0 has the token"):
        cut(tmp_path, student, num_ids=3)
    rows = ['{"txt": "a"}', '{"text": ["a"]}', '{"text": "b"}']
    with pytest.raises(DataError) as error:
        read_prompts(source_of(tmp_path, rows))
    assert "did you mean 'txt'?" in str(error.value)
    assert "field 'text' must be text, not a list" in str(error.value)
