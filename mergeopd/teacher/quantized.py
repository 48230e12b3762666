"""Teachers that a recipe quantises: converted once into a cache, and compared with their own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import NoReturn

import torch

from mergeopd.data.quantization_sample import quantization_sample
from mergeopd.data.renderer import Renderer
from mergeopd.errors import ModelError, TeacherError
from mergeopd.loss.compare import compare
from mergeopd.loss.heads import Hidden
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.quantize import write_quantized
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.storage.folders import atomic_folder
from mergeopd.storage.lock import waiting
from mergeopd.storage.quantized import Quantization, QuantizedCopy, sample_key
from mergeopd.teacher.canary import Canary
from mergeopd.teacher.local import LocalTeacher, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import Teacher, TeacherSequence

# Nats per token, a heuristic: int8 and float8 weights of trained models are 1e-6 to 1e-2 from the original.
LARGEST_KL = 0.1
# Seconds between two reports of progress.
_REPORT_EVERY_S = 2.0


@dataclass(frozen=True, eq=False)
class QuantizedTeacher:
    """Converts a teacher's folder, and measures the divergence that this adds.

    `announce` gets what is being done.
    """

    plan: TeacherPlan
    renderer: Renderer
    cache: Path
    device: torch.device
    announce: Callable[[str], None]

    @property
    def folder(self) -> Path:
        """The folder of the quantised copy."""
        return self._copy.folder

    def convert(self) -> None:
        """Write the quantised copy if it is not in the cache.

        Raises StorageError if the disk fails, ModelError for damaged weights.
        """
        copy = self._copy
        with waiting(copy.folder, "text_cache"):
            if not copy.folder.is_dir():
                with atomic_folder(copy.folder) as temporary:
                    write_quantized(self.plan.folder, temporary, copy.format, self.device, self._progress())
        try:
            Checkpoint.open(copy.folder)
        except ModelError as error:
            raise ModelError(
                f"{copy.folder}: the quantised copy is damaged; delete the folder, and it is made again"
            ) from error

    def measure(self) -> Quantization:
        """Return the divergence of the quantised copy, from the cache if it is there.

        If it is not, both models score the sample, and the original is compared with its canary. Raises
        TeacherError if this is not the model that the card describes, or the divergence is too large.
        """
        canary, copy = Canary.of(self.plan, self.renderer), self._copy
        prompt, response = quantization_sample(self.plan, self.renderer)
        key = sample_key(self.plan.dtype, prompt, response, None if canary is None else canary.logprobs)
        measured = copy.read(key)
        if measured is None:
            self.announce(f"comparing {self.plan.name} in {copy.format} with its own weights")
            measured = self._compared(TeacherSequence(prompt, response), canary)
            copy.write(key, measured)
        if not measured.forward_kl <= LARGEST_KL:
            other = {"int8": "float8", "float8": "int8"}[copy.format]
            raise TeacherError(
                f"teacher {self.plan.name!r} is another model in {copy.format}: it is {measured.text}, more "
                f"than {LARGEST_KL}; remove `quantize`, or try {other}"
            )
        return measured

    def canary(self, measured: Quantization) -> Canary:
        """Return a sample with which the quantised copy is verified when it is loaded."""
        sequence = TeacherSequence(*quantization_sample(self.plan, self.renderer))
        return Canary(
            self.plan.name, sequence, measured.logprobs, self.renderer.vocab_size, self._copy.folder
        )

    @cached_property
    def _copy(self) -> QuantizedCopy:
        assert self.plan.quantize is not None
        return QuantizedCopy(self.cache, Checkpoint.open(self.plan.folder).fingerprint, self.plan.quantize)

    def _compared(self, sequence: TeacherSequence, canary: Canary | None) -> Quantization:
        folders = {"own": self.plan.folder, "quantized": self._copy.folder}
        num_ids = self.renderer.vocab_size
        sources = {name: TeacherSource(folder, self.plan.dtype, num_ids) for name, folder in folders.items()}
        store, states = TeacherStore(sources, self.device), {}
        for name in sources:
            # Streamed, since its own weights may not fit.
            with store.stream(name, sequence.num_tokens, lambda: None, _generates_nothing) as session:
                [(_, hidden)] = session.hidden([sequence], sequence.num_tokens)
                states[name] = Hidden(hidden, session.read_head())
            if name == "own" and canary is not None:
                canary.verify(hidden, states[name].head)
        labels = torch.tensor(sequence.response_ids, dtype=torch.long, device=self.device)
        both = compare(states["quantized"], states["own"], labels)
        return Quantization(
            format=self._copy.format,
            dtype=self.plan.dtype,
            sample="text" if canary is None else "canary",
            num_tokens=len(labels),
            forward_kl=both.forward_kl.mean().item(),
            logprob_gap=(both.logprob_S - both.logprob_T).abs().mean().item(),
            logprobs=tuple(both.logprob_S.tolist()),
        )

    def _progress(self) -> Callable[[int, int], None]:
        what, last = f"converting {self.plan.name} to {self._copy.format}", monotonic()
        self.announce(what)

        def report(done: int, total: int) -> None:
            nonlocal last
            if monotonic() - last >= _REPORT_EVERY_S:
                last = monotonic()
                self.announce(f"{what}, {done / 1e9:,.1f} of {total / 1e9:,.1f} GB")

        return report


def quantizations(teachers: Mapping[str, Teacher]) -> dict[str, Quantization]:
    """Return how far the weights of quantised teachers are from their own, by name."""
    local = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, LocalTeacher)}
    return {name: one.quantization for name, one in local.items() if one.quantization is not None}


def _generates_nothing() -> NoReturn:
    raise AssertionError("a comparison generates nothing")
