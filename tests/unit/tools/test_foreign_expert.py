"""The foreign expert: another architecture, a tokenizer that cuts otherwise, and siblings left as they are."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from small_experts import TOOLS, load_script, small_llama, small_settings  # puts TOOLS on the path
from tiny_experts import tasks
from tiny_experts.cache import cache_key, why_stale, written_aside
from tiny_experts.llama.settings import FOLDER, LlamaSettings, llama_key
from tiny_experts.settings import Settings
from tokenizers import Tokenizer

SMALL = small_llama(4)
SETTINGS = replace(small_settings(2), rows={"eval": 40, "check": 10, "train": 400})
TEXTS = (
    "", " ", "a", " a", "a b", "  a  b ", "a\nb\t", "é", "e\u0301", "漢字", "👩‍👩‍👧 ☃", "x = {'a': 201}\n", "[USER", "x y c",
)  # fmt: skip


def rows(split: str) -> list[tasks.Example]:
    return tasks.splits("sort", SETTINGS.rows, 3)[split]


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("foreign") / FOLDER
    load_script().make_foreign(out, SETTINGS, SMALL, 3, 1, Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def tokenizer(expert: Path) -> Tokenizer:
    return Tokenizer.from_file(str(expert / "tokenizer.json"))


def test_the_folder_is_an_ordinary_llama(expert: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loaded = AutoModelForCausalLM.from_pretrained(expert), AutoTokenizer.from_pretrained(expert)
    assert model.config.model_type == "llama"
    assert model.generation_config.eos_token_id == loaded.eos_token_id == 2
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table.shape == head.shape == (SMALL.num_tokens, SMALL.hidden_size)
    assert table.data_ptr() != head.data_ptr()
    assert not table.equal(head)
    assert len(loaded) == SMALL.num_tokens


def test_encoding_is_what_the_chat_template_gives(expert: Path, tokenizer: Tokenizer) -> None:
    from tiny_experts.llama.tokens import encode
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(expert)
    for row in rows("eval"):
        (encoded,) = encode(tokenizer, [row])
        prompt = [{"role": "user", "content": row.prompt}]
        ids = loaded.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert encoded.prompt_ids == ids
        both = [*prompt, {"role": "assistant", "content": row.answer}]
        assert encoded.prompt_ids + encoded.answer_ids == loaded.apply_chat_template(both, return_dict=False)
        assert loaded.decode(encoded.answer_ids, skip_special_tokens=True) == row.answer
    assert ids.count(loaded.bos_token_id) == 1
    assert loaded.convert_ids_to_tokens(ids[:3]) == ["<s>", "[USER]", "<0x0A>"]
    system = [{"role": "system", "content": "be brief"}, *prompt]
    assert loaded.apply_chat_template(system, tokenize=False) == f"<s>[SYS]\nbe brief[USER]\n{row.prompt}"


@pytest.mark.parametrize("text", TEXTS)
def test_texts_survive_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """Behind a special token; and alone, where the library puts a space before them unless there is one."""
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.removeprefix(" ")
    behind = tokenizer.encode(f"[MODEL]\n{text}").ids
    assert tokenizer.decode(behind) == f"\n{text}"
    assert tokenizer.token_to_id("<unk>") not in behind


def test_tokens_stand_for_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    """Worked out here from the written tokens alone: `▁` is a space, `<0xEE>` a byte."""
    letters = random.Random(0)
    texts = [*TEXTS, *("".join(letters.choices("ab cd é☃\n", k=30)) for _ in range(50))]
    for text in texts:
        pieces = tokenizer.encode(f"[MODEL]\n{text}").tokens[2:]
        written = b"".join(
            bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()
            for piece in pieces
        )
        assert written == text.encode()


def test_answers_are_cut_otherwise_than_by_the_siblings(tokenizer: Tokenizer) -> None:
    """Some of its tokens hold two letters, none of a sibling's does, and all texts are the same."""
    from tiny_experts.llama.tokens import encode
    from tiny_experts.tokens import encode as sibling_encode
    from tiny_experts.tokens import train_tokenizer as train_sibling

    sibling = train_sibling((text for row in rows("train") for text in (row.prompt, row.answer)), 290)
    here, there = encode(tokenizer, rows("eval")), sibling_encode(sibling, rows("eval"))
    assert {len(row.answer_ids) for row in there} == {6}  # five letters and the end token
    lengths = [len(row.answer_ids) for row in here]
    assert max(lengths) == 6
    assert 0.1 < sum(length < 6 for length in lengths) / len(lengths) < 0.8
    for row, mine in zip(rows("eval"), here, strict=True):
        pieces = [tokenizer.id_to_token(i).replace("▁", " ") for i in mine.answer_ids]
        assert "".join(pieces) == row.answer + "</s>"


def test_too_little_text_is_refused() -> None:
    from tiny_experts.llama.tokens import train_tokenizer

    with pytest.raises(ValueError, match=r"the text gives 36\d tokens, not 1000: give more text"):
        train_tokenizer(["a b c"], 1000)


def test_a_seam_inside_a_token_is_refused(tokenizer: Tokenizer) -> None:
    from tiny_experts.llama.tokens import encode, train_tokenizer

    merging = train_tokenizer(["\na"] * 5, 6 + 256 + 96 + 2)  # the line break and the letter in one token
    assert any("\n" in token and len(token) > 1 for token in merging.get_vocab())
    with pytest.raises(ValueError, match="a token reaches from the prompt into the answer"):
        encode(merging, [tasks.Example("sort b a", "a b")])


def test_same_seed_same_bytes_other_seed_other_weights(expert: Path, tmp_path: Path) -> None:
    script = load_script()
    for seed in (3, 4):
        script.make_foreign(tmp_path / str(seed), SETTINGS, SMALL, seed, 1, Console(quiet=True))
    first, again, other = (
        json.loads((folder / "manifest.json").read_text())["files"]
        for folder in (expert, tmp_path / "3", tmp_path / "4")
    )
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


def test_siblings_stay_as_they_are(tmp_path: Path) -> None:
    out, siblings = tmp_path / "experts", cache_key(SETTINGS, 3)
    with written_aside(out, siblings, {"accuracy": {"base": {"sort": 0.25}}}) as folder:
        (folder / "weights").write_text("theirs")
    manifest = (out / "manifest.json").read_bytes()
    load_script().make_foreign(out / FOLDER, SETTINGS, SMALL, 3, 1, Console(quiet=True))
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", FOLDER, "weights"]
    assert (out / "manifest.json").read_bytes() == manifest
    assert why_stale(out, siblings) is None

    key = llama_key(SETTINGS, SMALL, 3)
    assert why_stale(out / FOLDER, key) is None
    others = (
        llama_key(SETTINGS, SMALL, 4),
        llama_key(SETTINGS, replace(SMALL, num_layers=2), 3),
        llama_key(replace(SETTINGS, rows={**SETTINGS.rows, "eval": 41}), SMALL, 3),
    )
    for other in others:
        assert why_stale(out / FOLDER, other) == "the seed, the settings or the tool changed"


@pytest.mark.parametrize("foreign", [True, False])
def test_a_second_run_loads_neither_torch_nor_transformers(tmp_path: Path, foreign: bool) -> None:
    """The real script, in a fresh process, with manifests that match its own settings."""
    out, settings = tmp_path / "experts", Settings()
    domains = dict.fromkeys(("total", "sort"), 0.25)
    with written_aside(out, cache_key(settings, 0), {"accuracy": {"base": domains}}):
        pass
    with written_aside(
        out / FOLDER, llama_key(settings, LlamaSettings(), 0), {"accuracy": {FOLDER: {"sort": 0.75}}}
    ):
        pass
    code = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import runpy; "
        f"sys.argv = ['make_tiny_experts.py', '--out', {str(out)!r}] + {['--foreign'] * foreign!r}; "
        f"runpy.run_path({str(TOOLS / 'make_tiny_experts.py')!r}, run_name='__main__'); "
        "print('heavy:', sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "The tiny experts are in" in done.stdout
    assert ("The foreign expert is in" in done.stdout) is foreign
    assert ("75.0%" in done.stdout) is foreign
    assert "heavy: []" in done.stdout
