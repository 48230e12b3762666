"""The token that ends a turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_jobs import write_byte_tokenizer
from tokenizers import Tokenizer as Backend

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.models.tokenizer import Tokenizer

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}END\n{% endfor %}"


def dialect(folder: Path, template: str, ends: tuple[str, ...]) -> tuple[Renderer, dict[str, int]]:
    write_byte_tokenizer(folder, [])
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<turn>", "<other>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    ids = {name: backend.token_to_id(name) for name in ("<end>", "<turn>", "<other>")}
    text = ChatTemplate(template, {}, name="test")
    return Renderer(Tokenizer.load(folder), text, 259, tuple(ids[name] for name in ends), 64), ids


@pytest.mark.parametrize(
    ("template", "ends", "expected"),
    [
        # Gemma: EOS stands first in generation_config.json, and turns end otherwise.
        (TURNS.replace("END", "<turn>"), ("<end>", "<turn>"), "<turn>"),
        # Phi: turns end in a token that is no end, then in one that is.
        (TURNS.replace("END", "<other><turn><end>"), ("<end>", "<turn>"), "<turn>"),
        (TURNS.replace("END", "<end>"), ("<turn>", "<end>"), "<end>"),
        # Nothing behind an answer, no answer at all, a template that refuses one.
        (TURNS.replace("END", ""), ("<turn>", "<end>"), "<end>"),
        (TURNS.replace("END", ""), ("<turn>", "<other>"), "<turn>"),
        ("{{ messages[0].content }}<turn>", ("<turn>", "<end>"), "<end>"),
        ("{% if messages | length > 1 %}{{ 1 / 0 }}{% endif %}", ("<turn>", "<end>"), "<end>"),
    ],
)
def test_a_turn_ends_as_the_template_ends_it(
    tmp_path: Path, template: str, ends: tuple[str, ...], expected: str
) -> None:
    found, ids = dialect(tmp_path, template, ends)
    assert found.end_id == ids[expected]
