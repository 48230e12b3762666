"""Notes on teachers that a recipe quantises: how far they are from their own weights, as far as known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mergeopd.data.quantization_sample import quantization_sample
from mergeopd.data.renderer import Renderer
from mergeopd.messages import shown
from mergeopd.recipe.plan import Plan
from mergeopd.storage.quantized import QuantizedCopy, sample_key


def quantization_notes(
    plan: Plan, renderers: Mapping[str, Renderer], files: Mapping[str, str]
) -> Iterator[str]:
    """Yield a note for each quantised teacher. `files` maps model folders to their fingerprints."""
    for name, teacher in plan.teachers.items():
        if teacher.quantize is None or name not in renderers or str(teacher.folder) not in files:
            continue
        copy = QuantizedCopy(Path(plan.text_cache), files[str(teacher.folder)], teacher.quantize)
        prompt, response = quantization_sample(teacher, renderers[name])
        expected = None if teacher.canary is None else teacher.canary.logprobs
        known = copy.read(sample_key(teacher.dtype, prompt, response, expected))
        if known is None:
            yield (
                f"teacher '{name}' is converted to {teacher.quantize} when the run starts, in "
                f"{shown(copy.folder)}, and compared with its own weights"
            )
        else:
            yield f"teacher '{name}' is read in {known.format}, {known.text}"
