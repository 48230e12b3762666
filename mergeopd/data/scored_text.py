"""Render conversations for a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError
from mergeopd.types import Message, TokenIds, token_ids


def scored_ids(
    renderer: Renderer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> TokenIds:
    """Return the token ids of a conversation that ends with the response.

    Raises DataError if the template rejects it, or the model's context or vocabulary does not hold it.
    """
    text = renderer.template.render(messages, tools=tools, add_generation_prompt=False)
    ids = token_ids(renderer.tokenizer.encode(text))
    if len(ids) > renderer.max_positions:
        raise DataError(
            f"the conversation has {len(ids)} tokens, the reward model's context {renderer.max_positions}"
        )
    if ids.max(initial=0) >= renderer.vocab_size:
        raise DataError("the conversation has a token for which the reward model has no embedding")
    return ids
