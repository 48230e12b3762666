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
    options_a, options_b = (
        {key: value for key, value in state["model"].items() if key not in _VOCABULARY} for state in (a, b)
    )
    text = (
        _differing_ids(_ids(a), _ids(b))
        or _added_tokens(a["added_tokens"], b["added_tokens"])
        or _component("the normalizer", a["normalizer"], b["normalizer"])
        or _component("the pre-tokenizer", a["pre_tokenizer"], b["pre_tokenizer"])
        or _component("the model", options_a, options_b)
        or _merges(a["model"], b["model"])
        or _scores(a["model"]["vocab"], b["model"]["vocab"])
    )
    return text and f"{text} (here: {here}, there: {there})"


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


def _ids(state: Mapping[str, Any]) -> dict[int, str]:
    """Map ids to tokens. Unigram lists `[token, score]` in id order, the others map tokens to ids."""
    vocab = state["model"]["vocab"]
    listed = isinstance(vocab, list)
    ids = {i: row[0] for i, row in enumerate(vocab)} if listed else {i: token for token, i in vocab.items()}
    return ids | {token["id"]: token["content"] for token in state["added_tokens"]}


def _differing_ids(a: dict[int, str], b: dict[int, str]) -> str:
    parts = []
    differing = [
        f"{i} is {a[i]!r} here and {b[i]!r} there" for i in sorted(a.keys() & b.keys()) if a[i] != b[i]
    ]
    if differing:
        parts.append(f"{_counted(differing, 'id differs', 'ids differ')}: {_listed(differing)}")
    for where, own, other in (("here", a, b), ("there", b, a)):
        if ids := sorted(own.keys() - other.keys()):
            verb, noun = ("exists", "id") if len(ids) == 1 else ("exist", "ids")
            parts.append(
                f"{noun} {_ranges(ids)} ({_listed([repr(own[i]) for i in ids])}) {verb} only {where}"
            )
    return "; ".join(parts)


def _added_tokens(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> str | None:
    """Compare added tokens, which are split off before the model. `special` only matters in decoding."""
    keys = ("single_word", "lstrip", "rstrip", "normalized")
    cut_a, cut_b = ({token["id"]: [token[key] for key in keys] for token in side} for side in (a, b))
    names = {token["id"]: f"{token['id']} {token['content']!r}" for token in (*a, *b)}
    for where, own, other in (("here", cut_a, cut_b), ("there", cut_b, cut_a)):
        if only := [names[i] for i in sorted(own.keys() - other.keys())]:
            counted = _counted(only, "token is", "tokens are")
            return f"{counted} recognised in text only {where}: {_listed(only)}"
    differing = [names[i] for i in sorted(cut_a) if cut_a[i] != cut_b[i]]
    if not differing:
        return None
    flags = sorted(key for n, key in enumerate(keys) if any(cut_a[i][n] != cut_b[i][n] for i in cut_a))
    counted = _counted(differing, "added token differs", "added tokens differ")
    return f"{counted} in {', '.join(flags)}: {_listed(differing)}"


def _component(what: str, a: Any, b: Any) -> str | None:
    """Compare a component by its meaning, ignoring one-element sequences, empty prefixes and offsets."""
    a, b = _simplified(a), _simplified(b)
    if a == b:
        return None
    if not (isinstance(a, dict) and isinstance(b, dict) and a.get("type") == b.get("type")):
        return f"{what} differs: {_short(a)} here and {_short(b)} there"
    details = [
        f"{key} is {_short(a.get(key))} here and {_short(b.get(key))} there"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]
    return f"{what} differs: {'; '.join(details)}"


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


def _merges(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Compare merges in rank order, in either spelling ("a b" or ["a", "b"])."""
    merges_a, merges_b = (
        [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
        for model in (a, b)
    )
    for rank, (one, two) in enumerate(zip(merges_a, merges_b, strict=False)):  # lengths are compared below
        if one != two:
            here, there = (" + ".join(map(repr, merge)) for merge in (one, two))
            return f"merge {rank} joins {here} here and {there} there"
    return (
        f"{len(merges_a)} merges here and {len(merges_b)} there" if len(merges_a) != len(merges_b) else None
    )


def _scores(a: Any, b: Any) -> str | None:
    if not isinstance(a, list) or not isinstance(b, list):
        return None
    differing = [
        f"{i} {token!r} has {x} here and {y} there"
        for i, ((token, x), (_, y)) in enumerate(zip(a, b, strict=False))
        if x != y
    ]
    if not differing:
        return None
    return f"{_counted(differing, 'score differs', 'scores differ')}: {_listed(differing)}"


def _counted(items: Sequence[str], one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"


def _listed(items: Sequence[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


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
