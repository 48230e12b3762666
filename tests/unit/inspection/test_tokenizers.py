"""`mergeopd tokenizers`: reports and refusals."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from byte_tokenizers import byte_level, sentencepiece
from rich.console import Console
from tokenizers import models, normalizers

from mergeopd.errors import RecipeError
from mergeopd.inspection.tokenizers import compare_tokenizers

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ messages[0]['content'] }}]"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(name: str, backend: tokenizers.Tokenizer, eos: str, template: str | None = TEMPLATE) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        backend.save(str(folder / "tokenizer.json"))
        config = {"eos_token": eos} | ({} if template is None else {"chat_template": template})
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return write


def test_tokens_shared_by_two_tokenizers(write: Write, tmp_path: Path) -> None:
    write("own", byte_level(("Ġa", "bc"), (("Ġ", "a"), ("b", "c"))), "<end>")
    write("other", sentencepiece("bpe"), "</s>", NO_SYSTEM)
    text = tmp_path / "text.txt"
    text.write_text("a bc a\nhe\n")
    pair = compare_tokenizers("own", "other", text)
    # 256 bytes, " a" and "bc". Spelled the same are a, b, c and bc alone; "Ġa" is not "▁a".
    assert (pair.num_shared_bytes, pair.num_shared_written) == (258, 4)
    there, back = pair.coverage
    # a| |bc| a|\n, he|\n and ▁a|▁|bc|▁a|<0x0A>, ▁|<0x68>|<0x65>|<0x0A>
    assert (there.num_writer, there.num_reader, there.num_groups, there.num_one_to_one) == (7, 9, 7, 6)
    assert (back.num_writer, back.num_reader, back.num_groups, back.num_one_to_one) == (9, 7, 7, 6)
    assert there.num_bytes == 10
    assert there.unaligned == back.unaligned == {}
    assert (pair.first.opening, pair.second.opening) == ("<user>Hi", "[Hi]")
    assert (pair.first.takes_system, pair.second.takes_system) == (True, False)
    assert (pair.first.prefix, pair.second.prefix) == (False, True)
    assert pair.second.named == {"eos_token": ("</s>", 1)}
    document = json.loads(json.dumps(pair.document()))
    assert document["coverage"][0]["one_to_one"] == pytest.approx(6 / 7)
    assert document["shared_tokens"] == {"by_bytes": 258, "by_spelling": 4}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(pair)
    shown = console.export_text()
    assert (
        "258 tokens have the same bytes, 98.1% of the smaller vocabulary; 4 have the same spelling." in shown
    )
    assert "85.71%" in shown
    assert "other: '[Hi]'" in shown


def test_unaligned_tokens_are_reported(write: Write, tmp_path: Path) -> None:
    write("own", byte_level(), "<end>", None)
    write("other", sentencepiece("bpe"), "</s>", None)
    text = tmp_path / "text.txt"
    text.write_text("a▁b", encoding="utf-8")
    pair = compare_tokenizers("own", "other", text)
    assert pair.coverage[0].unaligned == {"round trip": 4}
    assert pair.coverage[0].lost == 4 / 5
    assert pair.first.opening is None


def test_every_line_is_a_sample(write: Write, tmp_path: Path) -> None:
    """What cannot be aligned in one line costs nothing in the next."""
    write("own", byte_level(), "<end>", None)
    write("other", sentencepiece("bpe"), "</s>", None)
    text = tmp_path / "text.txt"
    text.write_text("a▁b\nabc abc\n", encoding="utf-8")
    pair = compare_tokenizers("own", "other", text)
    assert pair.coverage[0].unaligned == {"round trip": 5}
    assert pair.coverage[0].num_writer == 14


def test_the_same_tokenizer_needs_no_bridge(write: Write) -> None:
    write("own", byte_level(), "<end>")
    pair = compare_tokenizers("own", "own", None)
    assert pair.difference is None
    assert [side.one_to_one for side in pair.coverage] == [1.0, 1.0]
    assert (pair.first.name, pair.second.name) == ("own (A)", "own (B)")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(pair)
    assert "a teacher needs no bridge" in console.export_text()


def test_all_mistakes_are_reported_at_once(write: Write, tmp_path: Path) -> None:
    write("lower", byte_level(normalizer=normalizers.Lowercase()), "<end>")
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    with pytest.raises(RecipeError) as caught:
        compare_tokenizers("lover", "lower", Path("bytes.txt"))
    assert str(caught.value) == (
        "A  \n    unknown tokenizer folder 'lover'; did you mean 'lower'?\n"
        "B  \n    lower: its tokens cannot be turned back into the bytes they were read from: the normalizer "
        "Lowercase lowers case; such a model can teach only students that share its tokenizer\n"
        "--text  \n    bytes.txt: not UTF-8 (byte 3); save the file as UTF-8"
    ).replace("  \n", "\n")


def test_word_pieces_are_refused(write: Write) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.add_special_tokens(["[SEP]"])
    write("bert", backend, "[SEP]")
    write("own", byte_level(), "<end>")
    with pytest.raises(RecipeError, match="WordPiece joins pieces"):
        compare_tokenizers("own", "bert", None)


def test_neither_torch_nor_transformers_is_loaded(write: Write) -> None:
    write("own", byte_level(), "<end>")
    code = (
        "import sys; from mergeopd.inspection.tokenizers import compare_tokenizers\n"
        "compare_tokenizers('own', 'own', None)\n"
        "print(*sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
