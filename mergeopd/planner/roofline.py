"""Seconds of model passes on one device, by cause: a roofline with overheads.

A pass takes the time of its matrix products at the rate of their size, or of reading the weights if that is
longer; of attention; of everything elementwise, at a bandwidth; and a fixed time per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergeopd.models.flops import TRAINING
from mergeopd.planner.profile import Hardware
from mergeopd.planner.shapes import ITEMSIZE, ModelShape


class Causes(dict[str, float]):
    """Seconds by cause."""

    def __missing__(self, cause: str) -> float:
        return 0.0

    def add(self, other: Mapping[str, float], times: float = 1.0) -> Causes:
        """Add the seconds of another, so many times; return this."""
        for cause, seconds in other.items():
            self[cause] += times * seconds
        return self

    @property
    def total(self) -> float:
        return sum(self.values())


MATRICES, MEMORY, ELEMENTWISE, OVERHEAD = "matrix products", "memory", "elementwise", "overhead"
ATTENTION, DISK, NETWORK, WAITING = "attention", "disk", "network", "waiting"
# Flash attention computes the scores again in its backward pass.
_ATTENTION_BACKWARD = 2.5
# A decoding step reads the cache for attention, and copies it to append a token.
_CACHE_PASSES = 3
# The loss reads and writes a chunk's logits about as often: shift, exponential, sums, differences, gradient.
_LOSS_PASSES = 6
_SAMPLING_PASSES = 4
# Tokens of the loss's products on a CPU, as in `loss/slicing.py`.
_CPU_ROWS = 256
# AdamW reads weight, gradient and two moments and writes three; the norm and the clipping read and write.
_OPTIMIZER_PASSES = 10


@dataclass(frozen=True, slots=True)
class Device:
    """One process's device; `tensor` processes share each matrix."""

    hardware: Hardware
    tensor: int = 1

    @property
    def _bandwidth(self) -> float:
        return self.hardware.profile.memory_bandwidth * self.hardware.threads

    def _products(self, flops: float, weights: float, dtype: str, side: float) -> Causes:
        """Return the seconds of products, or of reading `weights` bytes if that takes longer."""
        profile, ways = self.hardware.profile, self.tensor
        computing = flops / ways / (profile.rate(dtype, side) * self.hardware.threads)
        reading = weights / ways / self._bandwidth
        return Causes({MATRICES: computing} if computing >= reading else {MEMORY: reading})

    def _elementwise(self, num_bytes: float, kind: str, dtype: str) -> float:
        return num_bytes / (self.hardware.profile.bandwidth(dtype, kind) * self.hardware.threads)

    def _widening(self, head: ModelShape, times: float, dtype: str) -> float:
        """Return the seconds of converting a head of halves to float32 for a CPU's products."""
        if dtype != "bfloat16" or not self.hardware.profile.is_cpu:
            return 0.0
        return times * head.embedding * (ITEMSIZE[dtype] + 4) / self._bandwidth

    def forward(
        self, shape: ModelShape, tokens: float, positions: float, dtype: str, passes: float
    ) -> Causes:
        """Return the seconds of `passes` forward passes of a body over `tokens` tokens in all.

        `positions` counts the pairs of tokens that attention reads.
        """
        profile, flops = self.hardware.profile, shape.flops
        per_pass = tokens / max(passes, 1.0)
        weights = passes * shape.read_matrices(per_pass) * ITEMSIZE[dtype]
        seconds = self._products(flops.per_token * tokens, weights, dtype, shape.smallest_side(per_pass))
        rate = profile.rate(dtype, shape.head_size) * profile.attention * self.hardware.threads
        seconds[ATTENTION] += flops.per_position * positions / self.tensor / rate
        saved = shape.saved_numbers(dtype)[0] * shape.layers * ITEMSIZE[dtype]
        seconds[ELEMENTWISE] += self._elementwise(2 * saved * tokens / self.tensor, "forward", dtype)
        seconds[OVERHEAD] += passes * shape.layers * profile.overheads.forward_layer_s
        return seconds

    def backward(
        self, shape: ModelShape, tokens: float, positions: float, dtype: str, passes: float
    ) -> Causes:
        """Return the seconds of the backward passes after `forward`."""
        profile, flops = self.hardware.profile, shape.flops
        per_pass = tokens / max(passes, 1.0)
        weights = 2 * passes * shape.read_matrices(per_pass) * ITEMSIZE[dtype]
        products = (TRAINING - 1) * flops.per_token * tokens
        seconds = self._products(products, weights, dtype, shape.smallest_side(per_pass))
        rate = profile.rate(dtype, shape.head_size) * profile.attention * self.hardware.threads
        seconds[ATTENTION] += _ATTENTION_BACKWARD * flops.per_position * positions / self.tensor / rate
        saved = shape.saved_numbers(dtype)[0] * shape.layers * ITEMSIZE[dtype]
        seconds[ELEMENTWISE] += self._elementwise(2 * saved * tokens / self.tensor, "backward", dtype)
        seconds[OVERHEAD] += passes * shape.layers * profile.overheads.backward_layer_s
        return seconds

    def loss(
        self,
        shape: ModelShape,
        teachers: Mapping[str, ModelShape],
        trained: float,
        *,
        dtype: str,
        gradient: bool,
    ) -> Causes:
        """Return the seconds of the loss kernel on `trained` tokens, with teachers of hidden states."""
        sides = [shape, *teachers.values()]
        own = (TRAINING if gradient else 1) * shape.flops.per_logits
        flops = trained * (own + sum(teacher.flops.per_logits for teacher in teachers.values()))
        # A CPU widens halves to float32 for these products.
        wide = "float32" if self.hardware.profile.is_cpu and dtype == "bfloat16" else dtype
        seconds = self._products(flops, 0.0, wide, min(256.0, shape.hidden))
        logits = trained * shape.vocab * 4 * len(sides) / self.tensor
        chunks = trained / _CPU_ROWS
        seconds[MEMORY] += self._widening(shape, chunks * (2 if gradient else 1), dtype)
        passes = _LOSS_PASSES if gradient else _LOSS_PASSES / 2
        seconds[ELEMENTWISE] += self._elementwise(passes * logits, "loss", dtype)
        return seconds

    def decode(
        self, shape: ModelShape, dtype: str, *, rows: float, prompt: float, new: float, steps: float
    ) -> Causes:
        """Return the seconds of decoding one batch: `rows` responses of `new` tokens, in `steps` steps."""
        profile, width = self.hardware.profile, ITEMSIZE[dtype]
        seconds = Causes()
        flops = shape.flops
        weights = shape.read_matrices(rows) * width
        seconds.add(self._products(flops.per_token * rows * new, steps * weights, dtype, rows))
        head = shape.embedding * (4 if profile.is_cpu else width)
        wide = "float32" if profile.is_cpu and dtype == "bfloat16" else dtype
        seconds.add(self._products(flops.per_logits * rows * new, steps * head, wide, rows))
        seconds[MEMORY] += self._widening(shape, steps, dtype)
        cached = shape.kv_bytes(dtype) * rows * new * (prompt + new / 2)
        seconds[MEMORY] += _CACHE_PASSES * cached / self._bandwidth
        saved = shape.saved_numbers(dtype)[0] * shape.layers * width
        seconds[ELEMENTWISE] += self._elementwise(2 * saved * rows * new, "forward", dtype)
        logits = rows * new * shape.vocab * 4
        seconds[ELEMENTWISE] += self._elementwise(_SAMPLING_PASSES * logits, "sampling", dtype)
        overheads = profile.overheads
        seconds[OVERHEAD] += steps * (shape.layers * overheads.decode_layer_s + overheads.decode_step_s)
        return seconds

    def optimizer(self, weights: float, dtype: str) -> Causes:
        """Return the seconds of an AdamW step over so many weights of this device."""
        num_bytes = _OPTIMIZER_PASSES * 4 * weights + (ITEMSIZE[dtype] + 4) * weights * (dtype == "bfloat16")
        return Causes({ELEMENTWISE: self._elementwise(num_bytes, "optimizer", dtype)})
