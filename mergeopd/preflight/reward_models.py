"""Check reward models: their folders, and that their templates render the conversations of their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergeopd.config.tree import Keys
from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError
from mergeopd.preflight.conversations import left_out
from mergeopd.preflight.models import ModelReader
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.plan import SourcePlan
from mergeopd.types import Message, Prompt

_RESPONSE = Message("assistant", "Yes, it is.")


@dataclass
class RewardModelChecks:
    """Reads the reward models of sources; `renderers` has those without a problem, by the source's name."""

    findings: Findings
    models: ModelReader
    renderers: dict[str, Renderer] = field(default_factory=dict, init=False)

    def read(self, place: Keys, source: SourcePlan, prompts: Sequence[Prompt]) -> None:
        """Read the reward model of a source, if it has one; report a template that does not fit."""
        if source.reward_model is None:
            return
        card: Keys = (*place, "verifier", "card")
        renderer = self.models.reward_model(card, source.reward_model)
        if renderer is None:
            return
        self.renderers[source.name] = renderer
        if prompts and _ignores_response(renderer, prompts[0]):
            self.findings.report(
                (*card, "template") if source.reward_model.template else card,
                f"{renderer.template.name}: leaves the response out, so that all would have one score",
                "give the reward model's card the `template` that it was trained with",
            )
        self.findings.notes += left_out(source.name, prompts, self.of(source))

    def of(self, source: SourcePlan) -> Mapping[str, Renderer]:
        """Return the renderer of a source's reward model, by its name in messages."""
        if source.reward_model is None or source.name not in self.renderers:
            return {}
        return {f"reward model '{source.reward_model.name}'": self.renderers[source.name]}


def _ignores_response(renderer: Renderer, prompt: Prompt) -> bool:
    try:
        text = renderer.template.render(
            (*prompt.messages, _RESPONSE), tools=prompt.tools, add_generation_prompt=False
        )
    except DataError:
        return False  # reported with all prompts that cannot be rendered
    return _RESPONSE.content not in text
