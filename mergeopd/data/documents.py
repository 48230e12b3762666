"""Documents: text that is learned without a prompt, in sequences of a limited number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError
from mergeopd.recipe.plan import SourcePlan
from mergeopd.types import Document, Prompt, token_ids

MAX_TOKENS = 1024
"""Default of `max_tokens`."""


def sequences(
    source: SourcePlan, rows: Sequence[Prompt], student: Renderer, num_ids: int
) -> tuple[Prompt, ...]:
    """Encode the documents in `rows` for the student, and cut them into sequences, in order.

    A document begins with the tokenizer's BOS token (EOS where there is none) and ends with EOS. Every token
    after the first is learned exactly once: a sequence begins with the last token of the one before, as its
    context. Packed documents are cut as if they were one.

    Raises DataError for a token from `num_ids` on, which not every model of the run has.
    """
    tokenizer = student.tokenizer
    bos = tokenizer.special_tokens.get("bos_token")
    start = tokenizer.eos_id if bos is None else tokenizer.encode(bos)[0]
    length = (source.max_tokens or MAX_TOKENS) - 1
    result: list[Prompt] = []
    packed: list[int] = []
    for row in rows:
        ids = [start, *tokenizer.encode(row.messages[0].content), tokenizer.eos_id]
        if beyond := [i for i in ids if i >= num_ids]:
            token = tokenizer.decode(beyond[:1], skip_special_tokens=False)
            raise DataError(
                f"{source.source}: row {row.key.rpartition(':')[2]} has the token {token!r}, which not every "
                "model of the run has"
            )
        if source.pack:
            packed += ids[1:] if bos is None and packed else ids
            continue
        for number, document in enumerate(_cut(ids, length)):
            key = row.key if not number else f"{row.key}.{number}"
            result.append(replace(row, key=key, messages=(), response=None, document=document))
    for number, document in enumerate(_cut(packed, length)):
        key = f"{source.name}:{number}"
        result.append(replace(rows[0], key=key, messages=(), response=None, document=document))
    return tuple(result)


def _cut(ids: Sequence[int], length: int) -> Iterator[Document]:
    """Yield the tokens after the first in pieces of at most `length`, each with the token before it."""
    for end in range(0, len(ids) - 1, length):
        yield Document(token_ids(ids[end : end + 1]), token_ids(ids[end + 1 : end + 1 + length]))
