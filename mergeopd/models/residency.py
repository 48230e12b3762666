"""How a local teacher is held while it scores: its whole body, or one layer after the other. No torch.

Streaming needs the weights of two layers and the hidden states of a pass; a teacher that has more tokens than
fit takes several passes, each of which reads the body once. Writing hidden states to a file instead would
move `2 x layers x` their bytes, which is more than another pass reads wherever the memory for hidden states
is larger than half a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.experts import is_of_expert
from mergeopd.models.facts import ModelFacts, read_config
from mergeopd.models.stored import StoredWeight, stored_weights

Residency = Literal["auto", "resident", "stream"]
# Layers whose bytes are in memory: one is computed, the next is being read.
WINDOW = 2
_STORED = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Masks and rotary embeddings that are kept for the shapes of a pass.
ARGUMENT_BYTES = 64 << 20
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_of(parameter: str) -> int | None:
    """Return the number of the layer to which a parameter or tensor belongs; None for those around."""
    match = _LAYER.match(parameter)
    return None if match is None else int(match[1])


def is_copied(facts: ModelFacts, checkpoint: Checkpoint, dtype: str) -> bool:
    """Whether a body's parameters are made of its tensors by copies: of another precision, or by expert."""
    return any(
        is_of_expert(facts.model_type, name) or not _is_kept(own, checkpoint, dtype)
        for name, own in stored_weights(facts, checkpoint).items()
        if layer_of(name) is not None
    )


def _is_kept(stored: StoredWeight, checkpoint: Checkpoint, dtype: str) -> bool:
    """Whether a weight stays in memory as it is stored."""
    if stored.encoding is not None:
        return stored.encoding.packed is not None
    [tensor] = stored.tensors.values()
    return checkpoint.tensors[tensor].dtype == _STORED[dtype]


@dataclass(frozen=True, slots=True)
class BodySizes:
    """Bytes of a teacher's body: the model without a prediction head of its own.

    `body` and `layer`, the largest, are in the computing precision, `stored_layer` in that of the files.
    `per_token` is a token's hidden state, `working` what a layer needs besides to compute it. `is_copied`:
    parameters are not views of what is read, see `is_copied`.
    """

    body: int
    layer: int
    stored_layer: int
    embedding: int
    per_token: int
    working: int
    is_copied: bool

    @classmethod
    def of(
        cls, facts: ModelFacts, checkpoint: Checkpoint, dtype: str, *, quantize: bool = False
    ) -> BodySizes:
        """Read the sizes from headers and config.json; with `quantize`, of a copy with a byte per weight."""
        width = ITEMSIZE[dtype]
        head = {facts.head_bias_name} | (set() if facts.tied else {facts.head_name})
        stored, computed = dict[int | None, int](), dict[int | None, int]()
        for name, own in stored_weights(facts, checkpoint).items():
            if name in head:
                continue
            layer = layer_of(name)
            in_files = sum(checkpoint.tensors[tensor].num_bytes for tensor in own.tensors.values())
            will_be_packed = quantize and layer is not None and len(own.shape) > 1
            in_files = own.numel if will_be_packed else in_files
            is_packed = will_be_packed or (own.encoding is not None and own.encoding.packed is not None)
            keeps = is_packed and not is_of_expert(facts.model_type, name)
            stored[layer] = stored.get(layer, 0) + in_files
            computed[layer] = computed.get(layer, 0) + (in_files if keeps else own.numel * width)
        ffn = read_config(facts.folder).get("intermediate_size") or 4 * facts.hidden_size
        return cls(
            body=sum(computed.values()),
            layer=max((size for layer, size in computed.items() if layer is not None), default=0),
            stored_layer=max((size for layer, size in stored.items() if layer is not None), default=0),
            embedding=facts.vocab_rows * facts.hidden_size * width,
            per_token=facts.hidden_size * width,
            working=(2 * facts.hidden_size + 3 * int(ffn)) * width,
            is_copied=is_copied(facts, checkpoint, dtype),
        )

    def resident_bytes(self, batch_tokens: int) -> int:
        """Return the memory of a pass with the whole body, in batches of `batch_tokens`."""
        return self.body + batch_tokens * self.working

    def window_bytes(self, batch_tokens: int) -> int:
        """Return the memory of a streamed pass besides its hidden states."""
        layers = self.stored_layer + self.layer if self.is_copied else WINDOW * self.stored_layer
        return layers + ARGUMENT_BYTES + batch_tokens * self.working

    def hidden_bytes(self, tokens: int) -> int:
        """Return the memory of a pass's hidden states, and of the embeddings that they start from."""
        return tokens * self.per_token + min(tokens * self.per_token, self.embedding)

    def stream_bytes(self, batch_tokens: int, pass_tokens: int) -> int:
        """Return the memory of a streamed pass over `pass_tokens` tokens, padding included."""
        return self.window_bytes(batch_tokens) + self.hidden_bytes(max(pass_tokens, batch_tokens))

    def pass_tokens(self, batch_tokens: int, num_bytes: int) -> int:
        """Return the tokens of the largest streamed pass within `num_bytes`; 0 if no batch fits."""
        room = num_bytes - self.window_bytes(batch_tokens)
        tokens = max(room // (2 * self.per_token), (room - self.embedding) // self.per_token)
        return tokens if tokens >= batch_tokens else 0


@dataclass(frozen=True, slots=True)
class Held:
    """The decision for one teacher. `pass_tokens` is the largest streamed pass, None for a resident teacher.

    `reason` completes the sentence "teacher X is streamed, because ...".
    """

    pass_tokens: int | None
    num_bytes: int
    reason: str

    @property
    def is_streamed(self) -> bool:
        return self.pass_tokens is not None

    def num_passes(self, tokens: int) -> int:
        """Return how often the body is read for `tokens` tokens."""
        return 1 if self.pass_tokens is None else max(1, ceil(tokens / self.pass_tokens))


def held(
    wanted: Residency,
    sizes: BodySizes,
    batch_tokens: int,
    room_bytes: int,
    *,
    is_mapped: bool = False,
    is_strict: bool = False,
) -> Held:
    """Decide how a teacher is held in `room_bytes`, the memory that its pass may have.

    `auto` keeps the whole body where it fits with a batch of `batch_tokens`. `is_mapped`: a resident body is
    pages of a mapped file, which need no memory of the process, so that one that was asked for always fits.
    Batches are often smaller than they may be: only where the room `is_strict` must one of them fit.

    Raises ModelError when what is wanted does not fit.
    """
    resident, room = sizes.resident_bytes(batch_tokens), gib(room_bytes)
    if wanted != "stream" and resident <= room_bytes:
        return Held(None, resident, f"its {gib(resident)} fit into {room}")
    if wanted == "resident" and is_mapped:
        return Held(None, resident, "its card says so")
    tokens = sizes.pass_tokens(batch_tokens, room_bytes)
    if not tokens and not is_strict and sizes.stream_bytes(1, 1) <= room_bytes:
        tokens = batch_tokens
    least = gib(sizes.stream_bytes(batch_tokens, batch_tokens))
    if wanted == "resident":
        other = f"`residency: stream` takes {least}" if tokens else _smaller(sizes, room_bytes)
        raise ModelError(f"held whole, it takes {gib(resident)}, and there are {room}; {other}")
    if tokens:
        cause = "its card says so" if wanted == "stream" else f"whole, its {gib(resident)} exceed {room}"
        return Held(tokens, sizes.stream_bytes(batch_tokens, tokens), cause)
    if wanted == "auto" and is_mapped:
        return Held(None, resident, "pages of a mapped file take no memory of the process")
    raise ModelError(
        f"streamed, it takes {least} for two layers and a batch of {batch_tokens:,} tokens, and there are "
        f"{room}; {_smaller(sizes, room_bytes)}"
    )


def _smaller(sizes: BodySizes, room_bytes: int) -> str:
    """Name the largest batch with which a streamed teacher fits, if there is one."""
    tokens = 1 << max(room_bytes // max(sizes.working, 1), 1).bit_length()
    while tokens and not sizes.pass_tokens(tokens, room_bytes):
        tokens //= 2
    if tokens:
        return f"`residency: stream` with `student.micro_batch_tokens: {tokens}` fits"
    return (
        f"streamed in batches of one token, it takes {gib(sizes.stream_bytes(1, 1))}: raise "
        "`memory.teacher_gib`, or use a machine with more free memory"
    )


def by_layer(parameters: Iterable[str]) -> dict[int | None, list[str]]:
    """Group parameters or tensors by their layer; None has those around the layers."""
    groups: dict[int | None, list[str]] = {}
    for name in parameters:
        groups.setdefault(layer_of(name), []).append(name)
    return groups


def gib(num_bytes: int) -> str:
    """Format bytes: `15.21 GiB`, `3.5 MiB`."""
    if num_bytes < 2**30 // 10:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB"
