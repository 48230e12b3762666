"""Render conversations for one model: tokenizer, chat template, end tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.teacher_prompt import SAME, TeacherPrompt
from mergeopd.errors import DataError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.types import Message, Prompt, TokenIds, token_ids

_RESPONSE = "Yes, it is."


@dataclass(frozen=True)
class Renderer:
    """Renders prompts for one model. Renderings are cached, because prompts recur every epoch.

    The true vocabulary is the first `vocab_size` ids, which both tokenizer and head have. Responses end at
    any of `eos_ids`. `teacher_prompt` changes the conversation for a teacher.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_positions: int
    teacher_prompt: TeacherPrompt = SAME
    _rendered: dict[str, tuple[object, TokenIds]] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def end_id(self) -> int:
        """Id appended to text responses: the token with which the template ends a turn.

        Often not the tokenizer's EOS (Gemma, Phi). If the template ends turns with none of the end tokens, it
        is EOS, or the first end token.
        """
        own = self.tokenizer.eos_id
        return own if own in self.closing_ids else self.closing_ids[0]

    @cached_property
    def closing_ids(self) -> tuple[int, ...]:
        """End tokens that this model expects after a response.

        This is the end token in its template, although generation may stop at others (chat models list the
        EOS of their base); any end token if the template has none (GLM ends turns with the next header).
        """
        written = turn_end(self.tokenizer, self.template, self.eos_ids)
        return (written,) if written in self.eos_ids else self.eos_ids

    @property
    def end_token(self) -> str:
        """Text of `end_id`."""
        return self.tokenizer.decode([self.end_id], skip_special_tokens=False)

    @property
    def as_measured(self) -> Renderer:
        """Renderer for evaluation, without a teacher prompt that shows fields such as the reference."""
        own = self.teacher_prompt
        return (
            replace(self, teacher_prompt=TeacherPrompt(own.system))
            if own.prompt and own.prompt.fields
            else self
        )

    def text(self, prompt: Prompt) -> str:
        """Render a prompt as text, with the generation prompt. Raises DataError if a template rejects it."""
        return self.template.render(self.teacher_prompt.messages(prompt), tools=prompt.tools)

    def render(self, prompt: Prompt) -> TokenIds:
        """Render a prompt as token ids, with the generation prompt; of a document, return its context."""
        if prompt.document is not None:
            return prompt.document.context_ids
        # An environment may add other messages and tools to the same prompt.
        content = prompt.messages, prompt.tools
        rendered = self._rendered.get(prompt.key)
        if rendered is None or rendered[0] != content:
            ids = token_ids(self.tokenizer.encode(self.text(prompt)))
            rendered = self._rendered[prompt.key] = content, ids
        return rendered[1]


def turn_end(tokenizer: Tokenizer, template: ChatTemplate, eos_ids: Collection[int]) -> int | None:
    """Return the id with which a template ends an assistant's turn: one of `eos_ids`, else a special token.

    None if there is neither. Base models often have the chat template of their family but another EOS.
    """
    conversation = Message("user", "?"), Message("assistant", _RESPONSE)
    try:
        text = template.render(conversation, add_generation_prompt=False)
    except DataError:
        return None
    behind = tokenizer.encode(text.rpartition(_RESPONSE)[2]) if _RESPONSE in text else []
    known = [i for i in behind if i in eos_ids]
    return next(iter(known or [i for i in behind if i in tokenizer.special_ids]), None)


def masked_in_teacher_term(
    trained_ids: Sequence[int] | TokenIds, student: Renderer, teachers: Mapping[str, Renderer]
) -> dict[str, tuple[int, ...]]:
    """Return positions in `trained_ids` of end tokens that the teacher does not use, by teacher name.

    A teacher gives such a token a negligible probability for any response, so its term skips the position.
    Other terms do not. Teachers without such positions are omitted.
    """
    import numpy as np

    ids = np.asarray(trained_ids)
    positions = np.flatnonzero(np.isin(ids, student.eos_ids))
    ends = list(zip(positions.tolist(), ids[positions].tolist(), strict=True))
    masked = {
        name: tuple(position for position, i in ends if i not in renderer.closing_ids)
        for name, renderer in teachers.items()
    }
    return {name: positions for name, positions in masked.items() if positions}
