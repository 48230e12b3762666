"""Tokenizer against transformers.AutoTokenizer on tokenizers of the two common kinds."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from mergeopd.errors import TokenizerError
from mergeopd.models.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\nand\ttabs ",
    "3.14 != 1,000",
    "emoji 🙂👩‍👩‍👧 flags 🇩🇪",
    "漢字とかな 中文",
    "naïve Ünïcödé e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b <think> c </think>",
    "<s>x</s> <unk>",
    "\x00\x7f\u2028\ufeff",
    "a .  b ,c",
]
CORPUS = [
    "the cat sat on the mat, the dog ran",
    "Hello world 123 456",
    "naïve café",
    "<think> so </think>",
    "漢字 中文",
] * 20


def byte_level(**fields: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(**fields))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return backend


def sentencepiece_bpe() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())  # bytes are tokens of the model, not texts to cut out
    state["added_tokens"] = state["added_tokens"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def sentencepiece_unigram() -> tokenizers.Tokenizer:
    pieces = [(f"<0x{i:02X}>", -9.0) for i in range(256)]
    words = [
        "▁",
        "▁the",
        "▁c",
        "at",
        "a",
        "t",
        "h",
        "e",
        "s",
        "d",
        "o",
        "g",
        "▁Hello",
        "漢",
        "▁wor",
        "ld",
        "l",
        "é",
    ]
    vocab = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *pieces,
        *((w, -1.0 - i / 8) for i, w in enumerate(words)),
    ]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


MAKERS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], dict[str, str]]] = {
    "byte-level": (byte_level, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "bpe": (sentencepiece_bpe, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "unigram": (sentencepiece_unigram, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}


def save(folder: Path, backend: tokenizers.Tokenizer, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=sorted(MAKERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by transformers, as users' folders are."""
    from transformers import PreTrainedTokenizerFast

    make, names = MAKERS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    PreTrainedTokenizerFast(tokenizer_object=make(), **names).save_pretrained(path)
    return path


def reference_for(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_equals_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), reference_for(folder)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    assert dict(ours.special_tokens) == theirs.special_tokens_map


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60), st.data())
def test_any_text_equals_transformers(folder: Path, text: str, data: st.DataObject) -> None:
    ours, theirs = _cached(folder)
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    some = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12))
    assert ours.decode(some) == theirs.decode(some, skip_special_tokens=True)


_LOADED: dict[Path, tuple[Tokenizer, Any]] = {}


def _cached(folder: Path) -> tuple[Tokenizer, Any]:
    if folder not in _LOADED:
        _LOADED[folder] = (Tokenizer.load(folder), reference_for(folder))
    return _LOADED[folder]


def test_byte_level_text_survives(tmp_path: Path) -> None:
    ours = Tokenizer.load(save(tmp_path, byte_level(), eos_token="<|im_end|>"))
    for text in TEXTS:
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert ours.decode([*ours.encode("hi"), ours.eos_id]) == "hi"


# --------------------------------------------------------------------------------------- configurations


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    ours = Tokenizer.load(save(tmp_path, backend, eos_token="<|im_end|>"))
    text = "the cat sat on the mat" * 5
    assert ours.decode(ours.encode(text)) == text
    assert (len(ours.encode("the")), ours.encode("")) == (1, [])


@pytest.mark.parametrize("declared", ["decoder", "eos"])
def test_tokens_that_only_the_config_declares(tmp_path: Path, declared: str) -> None:
    backend = byte_level()
    size = backend.get_vocab_size()
    if declared == "decoder":
        fields = {"content": "<new>", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
        save(tmp_path, backend, eos_token="<|im_end|>", added_tokens_decoder={str(size): fields})
        text, ids = "<new>", [size]
    else:  # a word of the model that becomes a special token
        save(tmp_path, backend, eos_token="the")
        text, ids = "catthe", [*Tokenizer.load(tmp_path).encode("cat"), backend.token_to_id("the")]
    ours, theirs = Tokenizer.load(tmp_path), reference_for(tmp_path)
    assert ours.encode(text) == ids == theirs.encode(text, add_special_tokens=False)
    assert ours.vocab_size == len(theirs)


def test_special_tokens_of_older_folders(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), eos_token={"content": "<|endoftext|>", "__type": "AddedToken"})
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": "<|im_end|>", "lstrip": False},
                "additional_special_tokens": ["<|im_start|>"],
            }
        )
    )
    ours, theirs = Tokenizer.load(tmp_path), reference_for(tmp_path)
    assert dict(ours.special_tokens) == theirs.special_tokens_map == {"eos_token": "<|im_end|>"}


def test_chat_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for config, expected in (({}, None), ({"chat_template": "C"}, "C"), ({"chat_template": named}, "D")):
        assert (
            Tokenizer.load(save(tmp_path, byte_level(), eos_token="<|im_end|>", **config)).chat_template
            == expected
        )
    (tmp_path / "chat_template.jinja").write_text("J\n")
    assert Tokenizer.load(tmp_path).chat_template == "J\n"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no eos_token"),
        ({"eos_token": "<eos>"}, "eos_token is '<eos>', which tokenizer.json does not have"),
        (
            {"eos_token": "<|im_end|>", "pad_token": "[PAD]"},
            "pad_token is '[PAD]', which tokenizer.json does not have",
        ),
        (
            {"added_tokens_decoder": {"5": {"content": "<|im_end|>"}}},
            "'<|im_end|>' is 5 in tokenizer_config.json and 3",
        ),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder['x'] is damaged"),
        ({"added_tokens_decoder": {"5": "<a>"}}, "added_tokens_decoder['5'] is damaged"),
    ],
)
def test_bad_configurations(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        Tokenizer.load(save(tmp_path, byte_level(), **config))
    assert str(tmp_path) in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="there is no such folder; make one"):
        Tokenizer.load(tmp_path / "none")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json; .*save_pretrained"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    save(tmp_path, byte_level(), eos_token="<|im_end|>")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.load(tmp_path)


# ------------------------------------------------------------------------------------------- difference

Edit = Callable[[dict[str, Any]], None]


def edited(
    tmp_path: Path, edit: Edit, make: Callable[[], tokenizers.Tokenizer] = byte_level
) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer and the same one after `edit` of its tokenizer.json."""
    eos = "<|im_end|>" if make is byte_level else "</s>"
    a, b = save(tmp_path / "a", make(), eos_token=eos), tmp_path / "b"
    if not b.exists():
        shutil.copytree(a, b)
    state = json.loads((a / "tokenizer.json").read_text())
    edit(state)
    (b / "tokenizer.json").write_text(json.dumps(state))
    return Tokenizer.load(a), Tokenizer.load(b)


def _nothing(state: dict[str, Any]) -> None: ...


def _old_merges(state: dict[str, Any]) -> None:
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]


def _sequence_of_one(state: dict[str, Any]) -> None:
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [state["pre_tokenizer"]]}


def _empty_affixes(state: dict[str, Any]) -> None:
    state["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}


def _offsets_and_decoding(state: dict[str, Any]) -> None:
    state["pre_tokenizer"]["trim_offsets"] = not state["pre_tokenizer"]["trim_offsets"]
    state["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    state["added_tokens"][-1]["special"] = True


def _vocab_order(state: dict[str, Any]) -> None:
    state["model"]["vocab"] = dict(reversed(state["model"]["vocab"].items()))


@pytest.mark.parametrize(
    "edit", [_nothing, _old_merges, _sequence_of_one, _empty_affixes, _offsets_and_decoding, _vocab_order]
)
def test_the_same_tokenizer_written_differently(tmp_path: Path, edit: Edit) -> None:
    a, b = edited(tmp_path, edit)
    assert a.difference(b) is None
    assert b.difference(a) is None
    for text in TEXTS:
        assert a.encode(text) == b.encode(text)


def test_a_tokenizer_saved_by_transformers_is_the_same(tmp_path: Path) -> None:
    save(tmp_path / "a", byte_level(), eos_token="<|im_end|>")
    reference_for(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "a").difference(Tokenizer.load(tmp_path / "b")) is None


def _swap(state: dict[str, Any]) -> None:
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def _drop_added(state: dict[str, Any]) -> None:
    state["added_tokens"] = state["added_tokens"][:-2]


def _not_cut_out(state: dict[str, Any]) -> None:
    state["model"]["vocab"] |= {token["content"]: token["id"] for token in state["added_tokens"]}
    state["added_tokens"] = state["added_tokens"][:-1]


def _strip(state: dict[str, Any]) -> None:
    state["added_tokens"][-1]["lstrip"] = True


def _normalizer(state: dict[str, Any]) -> None:
    state["normalizer"] = {"type": "NFC"}


def _prefix_space(state: dict[str, Any]) -> None:
    state["pre_tokenizer"]["add_prefix_space"] = True


def _ignore_merges(state: dict[str, Any]) -> None:
    state["model"]["ignore_merges"] = True


def _merge_order(state: dict[str, Any]) -> None:
    merges = state["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def _fewer_merges(state: dict[str, Any]) -> None:
    state["model"]["merges"].pop()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            _swap,
            r"^2 ids differ: 64 is 'a' here and 'b' there, 65 is 'b' here and 'a' there \(here: .*/a, there: .*/b\)$",
        ),
        (
            _drop_added,
            r"^ids (\d+)-(\d+) \('<think>', '</think>'\) exist only here \(here: .*/a, there: .*/b\)$",
        ),
        (_not_cut_out, r"^1 token is recognised in text only here: \d+ '</think>' \(here"),
        (_strip, r"^1 added token differs in lstrip: \d+ '</think>' \(here"),
        (_normalizer, r'^the normalizer differs: null here and {"type": "NFC".*} there \(here'),
        (_prefix_space, r"^the pre-tokenizer differs: add_prefix_space is false here and true there \(here"),
        (_ignore_merges, r"^the model differs: ignore_merges is false here and true there \(here"),
        (_merge_order, r"^merge 3 joins '.+' \+ '.+' here and '.+' \+ '.+' there \(here"),
        (_fewer_merges, r"^\d+ merges here and \d+ there \(here"),
    ],
)
def test_real_differences_are_described(tmp_path: Path, edit: Edit, message: str) -> None:
    a, b = edited(tmp_path, edit)
    found = a.difference(b)
    assert found is not None
    assert re.search(message, found), found
    assert b.difference(a) is not None


def test_many_differing_ids_are_counted(tmp_path: Path) -> None:
    def rotate(state: dict[str, Any]) -> None:
        vocab = state["model"]["vocab"]
        ids = list(vocab.values())
        state["model"]["vocab"] = dict(zip(vocab, ids[1:] + ids[:1], strict=True))

    found = str(edited(tmp_path, rotate)[0].difference(Tokenizer.load(tmp_path / "b")))
    assert re.match(
        r"\d{3} ids differ: 0 is .* here and .* there, 1 is .*, 2 is .*, and \d{3} more", found
    ), found


def test_scores_of_unigram_models(tmp_path: Path) -> None:
    def rescored(state: dict[str, Any]) -> None:
        state["model"]["vocab"][260][1] -= 1.0

    a, b = edited(tmp_path, rescored, sentencepiece_unigram)
    assert str(a.difference(b)).startswith("1 score differs: 260 '▁the' has -1.125 here and -2.125 there")
