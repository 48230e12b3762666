"""The sample on which quantised weights are compared with the original. Importing this imports no torch."""

from __future__ import annotations

from mergeopd.data.canary import sample_ids
from mergeopd.data.renderer import Renderer
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.types import TokenIds, token_ids

_PROMPT = "Explain in a few sentences why the sky is blue, and what 12 * 7 is."
_RESPONSE = (
    "Air scatters short waves of light more than long ones, so from all directions of the sky more blue "
    "light reaches the eye than red light. At sunset the light has a longer way through the air, most of the "
    "blue is lost on it, and the sky looks red. The product is 12 * 7 = 84."
)


def quantization_sample(teacher: TeacherPlan, renderer: Renderer) -> tuple[TokenIds, TokenIds]:
    """Return prompt and response ids of the card's canary, or of a fixed text without one."""
    canary = teacher.canary
    prompt, response = (_PROMPT, _RESPONSE) if canary is None else (canary.prompt, canary.response)
    prompt_ids, response_ids = sample_ids(renderer, prompt, response)
    room = renderer.max_positions - len(prompt_ids)
    return token_ids(prompt_ids), token_ids(response_ids[:room])
