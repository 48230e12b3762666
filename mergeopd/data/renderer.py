"""How one model reads a conversation: its tokenizer, its chat template, the ids that end its answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.teacher_prompt import SAME, TeacherPrompt
from mergeopd.errors import DataError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.types import Message, Prompt, TokenIds, token_ids

_ANSWER = "Yes, it is."


@dataclass(frozen=True)
class Renderer:
    """Renders prompts for one model. Renderings are kept: a prompt comes back every epoch.

    Its true vocabulary are the first `vocab_size` ids, which both its tokenizer and its head have. Its
    responses end at any of `eos_ids`. A teacher's `script` may show it another system message or more in the
    prompt than the student sees.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_positions: int
    script: TeacherPrompt = SAME
    _rendered: dict[str, TokenIds] = field(init=False, default_factory=dict, repr=False, compare=False)

    @cached_property
    def end_id(self) -> int:
        """The id that closes a response which this model did not generate: its template's end of a turn.

        Of several end tokens the tokenizer's EOS is often not the one that ends a turn (Gemma, Phi). Where
        the template writes none of them behind a response, it is that one all the same, or the first.
        """
        own = self.tokenizer.eos_id
        return own if own in self.closing_ids else self.closing_ids[0]

    @cached_property
    def closing_ids(self) -> tuple[int, ...]:
        """The end tokens that this model expects behind a response.

        The one that its template writes there, although it may stop at others (chat models list the EOS of
        their base). Any of them where the template writes none (GLM ends turns with the next role's header).
        """
        written = turn_end(self.tokenizer, self.template, self.eos_ids)
        return (written,) if written in self.eos_ids else self.eos_ids

    @property
    def end_token(self) -> str:
        """The text of `end_id`."""
        return self.tokenizer.decode([self.end_id], skip_special_tokens=False)

    @property
    def as_measured(self) -> Renderer:
        """Without a prompt of its own that shows more of a row (its reference) than the student sees."""
        own = self.script.prompt
        return (
            self if own is None or not own.fields else replace(self, script=TeacherPrompt(self.script.system))
        )

    def text(self, prompt: Prompt) -> str:
        """The text up to where the answer begins. Raises DataError when a template refuses the prompt."""
        return self.template.render(self.script.messages(prompt), add_generation_prompt=True)

    def render(self, prompt: Prompt) -> TokenIds:
        """Token ids up to where the answer begins."""
        ids = self._rendered.get(prompt.key)
        if ids is None:
            ids = self._rendered[prompt.key] = token_ids(self.tokenizer.encode(self.text(prompt)))
        return ids


def turn_end(tokenizer: Tokenizer, template: ChatTemplate, eos_ids: Collection[int]) -> int | None:
    """The id that a template writes to end an assistant's turn: one of `eos_ids`, else a special token.

    None where it writes neither. Base models are published with the chat template of their family and with
    another EOS than the token that it ends turns with.
    """
    asked, answered = Message("user", "?"), Message("assistant", _ANSWER)
    try:
        text = template.render((asked, answered), add_generation_prompt=False)
    except DataError:
        return None
    behind = tokenizer.encode(text.rpartition(_ANSWER)[2]) if _ANSWER in text else []
    known = [i for i in behind if i in eos_ids]
    return next(iter(known or [i for i in behind if i in tokenizer.special_ids]), None)


def masked_in_teacher_term(
    trained_ids: Sequence[int] | TokenIds, student: Renderer, teachers: Mapping[str, Renderer]
) -> dict[str, tuple[int, ...]]:
    """Positions in `trained_ids` of tokens that end the student's turns and not the teacher's, by teacher.

    A teacher finds an end token that it does not expect absurd, whatever it thinks of the response, so the
    position does not count in its term; it stays in the loss mask otherwise. Teachers without any are absent.
    """
    import numpy as np

    ids = np.asarray(trained_ids)
    positions = np.flatnonzero(np.isin(ids, student.eos_ids))
    ends = list(zip(positions.tolist(), ids[positions].tolist(), strict=True))
    masked = {
        name: tuple(position for position, i in ends if i not in dialect.closing_ids)
        for name, dialect in teachers.items()
    }
    return {name: positions for name, positions in masked.items() if positions}
