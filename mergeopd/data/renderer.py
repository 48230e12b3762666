"""How one model reads a conversation: its tokenizer, its chat template, the ids that end its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.teacher_prompt import SAME, Script
from mergeopd.errors import DataError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.types import Message, Prompt

_ANSWER = "Yes, it is."


@dataclass(frozen=True)
class Dialect:
    """Renders prompts for one model. Renderings are kept: a prompt comes back every epoch.

    A teacher's `script` may show it another system message or more in the prompt than the student sees.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    eos_ids: tuple[int, ...]
    max_positions: int
    script: Script = SAME
    _rendered: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict, repr=False, compare=False)

    @cached_property
    def end_id(self) -> int:
        """The id that closes an answer which this model did not write itself: its template's end of a turn.

        Of several end tokens the tokenizer's EOS is often not the one that ends a turn (Gemma, Phi). Where
        the template writes none of them behind an answer, it is that one all the same, or the first.
        """
        asked, answered = Message("user", "?"), Message("assistant", _ANSWER)
        try:
            text = self.template.render((asked, answered), add_generation_prompt=False)
        except DataError:
            text = ""
        behind = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
        written = (i for i in self.tokenizer.encode(behind) if i in self.eos_ids)
        own = self.tokenizer.eos_id
        return next(written, own if own in self.eos_ids else self.eos_ids[0])

    def text(self, prompt: Prompt) -> str:
        """The text up to where the answer begins. Raises DataError when a template refuses the prompt."""
        return self.template.render(self.script.messages(prompt), add_generation_prompt=True)

    def render(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids up to where the answer begins."""
        ids = self._rendered.get(prompt.key)
        if ids is None:
            ids = self._rendered[prompt.key] = tuple(self.tokenizer.encode(self.text(prompt)))
        return ids


def masked_in_teacher_term(
    trained_ids: Sequence[int], student: Dialect, teachers: Mapping[str, Dialect]
) -> dict[str, tuple[int, ...]]:
    """Positions in `trained_ids` of tokens that end the student's turns and not the teacher's, by teacher.

    Such a teacher finds the student's stop token absurd, whatever it thinks of the answer, so the position
    does not count in its term (it stays in the loss mask otherwise). Teachers without any are absent.
    """
    ends = [(position, i) for position, i in enumerate(trained_ids) if i in student.eos_ids]
    masked = {
        name: tuple(position for position, i in ends if i not in dialect.eos_ids)
        for name, dialect in teachers.items()
    }
    return {name: positions for name, positions in masked.items() if positions}
