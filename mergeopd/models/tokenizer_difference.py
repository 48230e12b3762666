"""Describe the first difference of two tokenizers in one sentence, from the tokenizers library's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

_SHOWN = 3
# These change offsets or decoding, never the ids of a text.
_IRRELEVANT = {"trim_offsets"}
# More added tokens than these on one side alone are another tokenizer, not a fine-tune's additions.
MAX_ADDED = 64
# Model fields that are compared on their own.
_VOCABULARY = {"vocab", "merges"}


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any], here: str, there: str) -> str | None:
    """Describe the first difference; None when both give the same ids for every text.

    `here` and `there` are the folders' names.
    """
    vocab_a, vocab_b = _ids(a), _ids(b)
    return (
        _differing_ids(vocab_a, vocab_b, here, there)
        or _added_tokens(a["added_tokens"], b["added_tokens"], here, there)
        or _component("the normalizer", a["normalizer"], b["normalizer"], here, there)
        or _component("the pre-tokenizer", a["pre_tokenizer"], b["pre_tokenizer"], here, there)
        or _component("the model", _options(a["model"]), _options(b["model"]), here, there)
        or _merges(a["model"], b["model"], here, there)
        or _scores(a["model"], b["model"], here, there)
    )


def num_shared(a: Mapping[str, Any], b: Mapping[str, Any]) -> int | None:
    """Return how many ids, from 0 on, two tokenizers share; None where other tokens change a text's ids.

    After the shared ids, each may have a few added tokens of its own.
    """
    ids_a, ids_b = _ids(a), _ids(b)
    stop = max(*ids_a, *ids_b) + 1
    first = next((i for i in range(stop) if ids_a.get(i) != ids_b.get(i)), stop)
    for state, ids in ((a, ids_a), (b, ids_b)):
        beyond = {i for i in ids if i >= first}
        if len(beyond) > MAX_ADDED or not beyond <= {token["id"] for token in state["added_tokens"]}:
            return None
    return first if first_difference(first_ids(a, first), first_ids(b, first), "", "") is None else None


def first_ids(state: Mapping[str, Any], num_ids: int) -> dict[str, Any]:
    """Return a tokenizer's state without its added tokens from id `num_ids` on."""
    gone = {token["content"] for token in state["added_tokens"] if token["id"] >= num_ids}
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):
        kept: Any = {token: i for token, i in vocab.items() if token not in gone}
    else:
        kept = [entry for i, entry in enumerate(vocab) if i < num_ids or entry[0] not in gone]
    return {
        **state,
        "model": {**state["model"], "vocab": kept},
        "added_tokens": [token for token in state["added_tokens"] if token["id"] < num_ids],
    }


def _model_ids(model: Mapping[str, Any]) -> dict[str, int]:
    """Token to id. Unigram lists `[token, score]` in id order, the others map."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {token: i for i, (token, _) in enumerate(vocab)}
    return dict(vocab)


def _ids(state: Mapping[str, Any]) -> dict[int, str]:
    ids = {i: token for token, i in _model_ids(state["model"]).items()}
    return ids | {token["id"]: token["content"] for token in state["added_tokens"]}


def _differing_ids(a: dict[int, str], b: dict[int, str], here: str, there: str) -> str | None:
    differing = sorted(i for i in a.keys() & b.keys() if a[i] != b[i])
    parts = []
    if differing:
        shown = ", ".join(f"{i} is {a[i]!r} here and {b[i]!r} there" for i in differing[:_SHOWN])
        parts.append(f"{_counted(len(differing), 'id differs', 'ids differ')}: {shown}{_more(differing)}")
    sides = ((a.keys() - b.keys(), a, here, there), (b.keys() - a.keys(), b, there, here))
    for only, tokens, where, other in sides:
        if only:
            ids = sorted(only)
            named = ", ".join(repr(tokens[i]) for i in ids[:_SHOWN])
            verb, noun = ("exists", "id") if len(ids) == 1 else ("exist", "ids")
            parts.append(
                f"{noun} {_ranges(ids)} ({named}{_more(ids)}) {verb} only in {where}, not in {other}"
            )
    if not parts:
        return None
    return _placed("; ".join(parts), here, there) if differing else "; ".join(parts)


def _added_tokens(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], here: str, there: str
) -> str | None:
    """Compare added tokens, which are split off before the model. `special` only matters in decoding."""
    keys = ("single_word", "lstrip", "rstrip", "normalized")
    cut_a = {token["id"]: {key: token[key] for key in keys} for token in a}
    cut_b = {token["id"]: {key: token[key] for key in keys} for token in b}
    names = {token["id"]: token["content"] for token in (*a, *b)}
    for only, where in ((cut_a.keys() - cut_b.keys(), here), (cut_b.keys() - cut_a.keys(), there)):
        if only:
            ids = sorted(only)
            shown = ", ".join(f"{i} {names[i]!r}" for i in ids[:_SHOWN])
            counted = _counted(len(ids), "token is", "tokens are")
            return f"{counted} recognised in text only in {where}: {shown}{_more(ids)}"
    differing = sorted(i for i in cut_a if cut_a[i] != cut_b[i])
    if not differing:
        return None
    flags = {key for i in differing for key in keys if cut_a[i][key] != cut_b[i][key]}
    shown = ", ".join(f"{i} {names[i]!r}" for i in differing[:_SHOWN])
    counted = _counted(len(differing), "added token differs", "added tokens differ")
    return f"{counted} in {', '.join(sorted(flags))} between {here} and {there}: {shown}{_more(differing)}"


def _component(what: str, a: Any, b: Any, here: str, there: str) -> str | None:
    """Compare a component by its meaning, ignoring one-element sequences, empty prefixes and offsets."""
    simple_a, simple_b = _simplified(a), _simplified(b)
    if simple_a == simple_b:
        return None
    if (
        isinstance(simple_a, dict)
        and isinstance(simple_b, dict)
        and simple_a.get("type") == simple_b.get("type")
    ):
        keys = sorted(k for k in simple_a.keys() | simple_b.keys() if simple_a.get(k) != simple_b.get(k))
        details = "; ".join(
            f"{key} is {_short(simple_a.get(key))} here and {_short(simple_b.get(key))} there" for key in keys
        )
        return _placed(f"{what} differs: {details}", here, there)
    text = f"{what} differs: {_short(simple_a)} here and {_short(simple_b)} there"
    return _placed(text, here, there)


def _simplified(part: Any) -> Any:
    if isinstance(part, list):
        return [_simplified(item) for item in part]
    if not isinstance(part, dict):
        return part
    for key in ("normalizers", "pretokenizers"):
        if part.get("type") == "Sequence" and key in part:
            steps: list[Any] = []
            for step in (_simplified(item) for item in part[key]):
                if step is not None:
                    steps.extend(step[key] if isinstance(step, dict) and key in step else [step])
            return None if not steps else steps[0] if len(steps) == 1 else {"type": "Sequence", key: steps}
    # A missing prefix or suffix is null or "".
    kept = {key: value for key, value in part.items() if key not in _IRRELEVANT and value not in (None, "")}
    return {key: _simplified(value) for key, value in kept.items()}


def _options(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in _VOCABULARY}


def _merges(a: Mapping[str, Any], b: Mapping[str, Any], here: str, there: str) -> str | None:
    """Compare merges in rank order, in either spelling ("a b" or ["a", "b"])."""
    merges_a, merges_b = (
        [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", ())]
        for model in (a, b)
    )
    for rank, (one, two) in enumerate(zip(merges_a, merges_b, strict=False)):  # lengths are compared below
        if one != two:
            text = (
                f"merge {rank} joins {' + '.join(map(repr, one))} here and {' + '.join(map(repr, two))} there"
            )
            return _placed(text, here, there)
    if len(merges_a) != len(merges_b):
        return _placed(f"{len(merges_a)} merges here and {len(merges_b)} there", here, there)
    return None


def _scores(a: Mapping[str, Any], b: Mapping[str, Any], here: str, there: str) -> str | None:
    if not isinstance(a["vocab"], list) or not isinstance(b["vocab"], list):
        return None
    differing = [
        (i, token, x, y)
        for i, ((token, x), (_, y)) in enumerate(zip(a["vocab"], b["vocab"], strict=False))
        if x != y
    ]
    if not differing:
        return None
    shown = ", ".join(f"{i} {token!r} has {x} here and {y} there" for i, token, x, y in differing[:_SHOWN])
    text = f"{_counted(len(differing), 'score differs', 'scores differ')}: {shown}{_more(differing)}"
    return _placed(text, here, there)


def _placed(text: str, here: str, there: str) -> str:
    return f"{text} (here: {here}, there: {there})"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _more(items: Sequence[Any]) -> str:
    return f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""


def _ranges(ids: Iterable[int]) -> str:
    """`[5, 6, 7, 9]` as "5-7, 9"; after three ranges, how many ids follow."""
    runs = []
    for _, group in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0]):
        run = [i for _, i in group]
        runs.append((run[0], run[-1]))
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:_SHOWN])
    rest = sum(b - a + 1 for a, b in runs[_SHOWN:])
    return f"{shown} and {rest} more" if rest else shown


def _short(value: Any, limit: int = 160) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
