"""Token ids of a card's sample. Importing this does not import torch."""

from __future__ import annotations

from datetime import datetime

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.types import Message

_DAY = datetime(2026, 1, 1)


def sample_ids(renderer: Renderer, prompt: str, response: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of a sample, with the prompt rendered as a user's message on a fixed date."""
    own = renderer.template
    template = ChatTemplate(
        own.source, own.special_tokens, name=own.name, now=lambda: _DAY, arguments=own.arguments
    )
    text = template.render((Message("user", prompt),))
    return tuple(renderer.tokenizer.encode(text)), tuple(renderer.tokenizer.encode(response))
