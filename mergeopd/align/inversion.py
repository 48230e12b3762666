"""Derive, from a tokenizer's JSON (`Tokenizer.to_str()`), how its tokens map back to bytes.

A part that is not known to be invertible is refused: a wrong guess would shift every later token of a
response silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, cast

from mergeopd.errors import TokenizerError

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
# Pre-tokenizers that split text without changing it: Split and Punctuation unless they remove their matches.
_CUTS = ("Digits", "UnicodeScripts", "FixedLength", "Split", "Punctuation")
_REFUSED_NORMALIZERS = {
    "Precompiled": "replaces characters by a table of its own (SentencePiece's nmt_nfkc or the like)",
    "Lowercase": "lowers case",
    "BertNormalizer": "changes characters, spaces or case",
    "StripAccents": "takes accents away",
    "Strip": "takes spaces away",
    "Nmt": "changes control characters and spaces",
}


@dataclass(frozen=True, slots=True)
class Inversion:
    """Rules by which token strings map to bytes.

    `byte_level`: every character is a byte in GPT-2's alphabet. `space`: the character for a space.
    `byte_fallback`: "<0xEE>" is one byte. `normal`: text is normalised to this Unicode form first. `prefix`:
    encoding may put a space before the text. `strip`: decoding removes one leading space.
    """

    byte_level: bool = False
    space: str | None = None
    byte_fallback: bool = False
    normal: NormalForm | None = None
    prefix: bool = False
    strip: bool = False


def read_inversion(state: Mapping[str, Any], name: str) -> Inversion:
    """Read the rules of a tokenizer. Raises TokenizerError naming the part that cannot be inverted."""
    _check_model(state["model"], name)
    rules = Inversion(byte_fallback=bool(state["model"].get("byte_fallback")))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _steps(state[part]):
            rules = _after(part.replace("_", "-"), rules, step, name)
    if rules.byte_level and rules.space is not None:
        _refuse(name, f"writes bytes as characters and spaces as {rules.space!r} at once")
    return rules


def without_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer that puts no space before a text."""

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [changed(item) for item in part if not _prepends(item)]
        if not isinstance(part, dict):
            return part
        kept = {key: changed(value) for key, value in part.items()}
        if kept.get("type") == "Metaspace":
            kept["prepend_scheme"] = "never"
        elif kept.get("type") == "ByteLevel":
            kept["add_prefix_space"] = False
        return kept

    normalizer = state["normalizer"]
    return {
        **state,
        "normalizer": None if _prepends(normalizer) else changed(normalizer),
        "pre_tokenizer": changed(state["pre_tokenizer"]),
    }


# A Unicode noncharacter, with which no token of a text begins.
_UNMATCHABLE = "\ufdd0"


def without_special_pieces(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer of a Unigram model that does not match special tokens in text; others as they are.

    The tokenizers library matches every piece of a Unigram vocabulary, control symbols included, whatever
    `encode_special_tokens` says. SentencePiece itself does not.
    """
    model = state["model"]
    if model["type"] != "Unigram":
        return dict(state)
    listed = {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    inside = {
        listed[token["content"]]
        for token in state["added_tokens"]
        if token["special"] and listed.get(token["content"]) == token["id"]
    }
    vocab = [
        [f"{_UNMATCHABLE}{i}" if i in inside else piece, score]
        for i, (piece, score) in enumerate(model["vocab"])
    ]
    added = [token for token in state["added_tokens"] if token["id"] not in inside]
    return {**state, "model": {**model, "vocab": vocab}, "added_tokens": added, "post_processor": None}


def _prepends(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of a pipeline in order, with sequences flattened."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        for step in part.get(key, ()):
            yield from _steps(step)


def _after(part: str, rules: Inversion, step: Mapping[str, Any], name: str) -> Inversion:
    """Return the rules after one step of the normalizer, the pre-tokenizer or the decoder."""
    kind = step["type"]
    match part, kind:
        case _, "ByteLevel":
            prefix = part == "pre-tokenizer" and step["add_prefix_space"]
            return replace(rules, byte_level=True, prefix=rules.prefix or prefix)
        case "normalizer", "NFC" | "NFD" | "NFKC" | "NFKD":
            if rules.normal not in (None, kind):
                _refuse(name, f"the normalizer brings text to {rules.normal} and to {kind}")
            return replace(rules, normal=cast(NormalForm, kind))
        case "normalizer", "Prepend":
            if step["prepend"] not in (" ", "▁", rules.space):
                _refuse(name, f"the normalizer puts {step['prepend']!r} before every text")
            return replace(rules, prefix=True)
        case "normalizer", "Replace":
            if step["pattern"] != {"String": " "} or len(step["content"]) != 1:
                _refuse(name, f"the normalizer replaces {step['pattern']} by {step['content']!r}")
            return _with_space(rules, step["content"], name)
        case "pre-tokenizer", "Metaspace":
            prefix = rules.prefix or step["prepend_scheme"] != "never"
            return _with_space(replace(rules, prefix=prefix), step["replacement"], name)
        case "pre-tokenizer", _ if kind in _CUTS and step.get("behavior") != "Removed":
            return rules
        case "decoder", "Metaspace":
            strip = step["prepend_scheme"] != "never"
            return _with_space(replace(rules, strip=strip), step["replacement"], name)
        case "decoder", "Replace" if step["content"] == " " and set(step["pattern"]) == {"String"}:
            return _with_space(rules, step["pattern"]["String"], name)
        case "decoder", "Strip" if step["content"] == " " and step["start"] <= 1 and not step["stop"]:
            return replace(rules, strip=rules.strip or step["start"] == 1)
        case "decoder", "ByteFallback" | "Fuse":
            return rules
    reasons = {
        "normalizer": _REFUSED_NORMALIZERS.get(kind, "is not known"),
        "pre-tokenizer": "drops the spaces or characters between words",
        "decoder": "does more than to join pieces",
    }
    return _refuse(name, f"the {part} {kind} {reasons[part]}")


def _check_model(model: Mapping[str, Any], name: str) -> None:
    if model["type"] == "WordPiece":
        _refuse(name, "WordPiece joins pieces by '##' and does not say where spaces were")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            _refuse(name, f"the model marks pieces of words by {key} {model[key]!r}")
    if model.get("dropout"):
        _refuse(name, f"the model cuts words at random (dropout {model['dropout']})")


def _with_space(rules: Inversion, character: str, name: str) -> Inversion:
    if rules.space not in (None, character):
        _refuse(name, f"spaces are written as {rules.space!r} and as {character!r}")
    return replace(rules, space=character)


def _refuse(name: str, why: str) -> NoReturn:
    raise TokenizerError(
        f"{name}: its tokens cannot be turned back into the bytes they were read from: {why}; such a model "
        "can teach only students that share its tokenizer"
    )
