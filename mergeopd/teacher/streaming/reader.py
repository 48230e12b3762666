"""Read a checkpoint layer by layer, ahead of the computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mergeopd.distributed.communicator import Communicator
from mergeopd.errors import ModelError, PeerFailed
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.residency import WINDOW
from mergeopd.teacher.packing import Batch, all_gather


@dataclass(eq=False)
class _Slot:
    """Memory of one layer: this rank's part on the host, and the gathered bytes on the device.

    On a GPU, `copied` marks the end of the copy from `part`, and `computed` the last use of `whole`.
    """

    part: Tensor
    own: Tensor
    whole: Tensor
    copied: Any = None
    computed: Any = None


@dataclass(frozen=True, slots=True)
class _Layer:
    batch: Batch
    slot: _Slot


class _Abandoned(Exception):  # noqa: N818 (control flow: the caller has failed)
    pass


class LayerReader:
    """Reads the tensors of each layer in turn, `num_passes` times, in a thread that is one layer ahead.

    Each rank reads a part of every layer, and the thread gathers the parts over torch's default process
    group. So while the context is entered, no other thread of this process may take part in a collective,
    and all ranks must enter it. It takes as many passes as the rank that needs most. On a GPU, parts are
    read into pinned memory and copied on a stream of their own. A layer that the caller copies is overwritten
    as soon as its last tensor was taken, others when the next layer is asked for. `bytes_read` counts this
    rank's parts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[Sequence[str]],
        num_passes: int,
        ranks: Communicator,
        device: torch.device,
        *,
        is_copied: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._batches = [Batch.of(checkpoint, names) for names in layers]
        self._own_passes = num_passes
        self._ranks = ranks
        self._device = device
        self._is_copied = is_copied
        self._free: SimpleQueue[_Slot | None] = SimpleQueue()
        self._ready: SimpleQueue[int | _Layer | BaseException] = SimpleQueue()
        self._thread = Thread(target=self._run, name="layer reader", daemon=True)
        self._is_abandoned = False
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.bytes_read = 0

    def __enter__(self) -> Self:
        for slot in self._slots():
            self._free.put(slot)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Other ranks are told at the next layer, so that none waits for this one.
        self._is_abandoned = True
        self._free.put(None)
        self._thread.join()

    def num_passes(self) -> int:
        """Wait for all ranks and return the passes to take. To be called once, before `layers`.

        Raises ModelError on all ranks when their files differ.
        """
        number = self._next()
        assert isinstance(number, int)
        return number

    def layers(self) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Yield the tensors of each layer of a pass, on the device.

        Raises ModelError when this rank cannot read its part, PeerFailed when another one has failed.
        """
        for _ in self._batches:
            layer = self._next()
            assert isinstance(layer, _Layer)
            if self._side is not None:
                torch.cuda.current_stream(self._device).wait_event(layer.slot.copied)
            if self._is_copied:
                yield self._taken(layer)
            else:
                yield layer.batch.tensors(self._checkpoint, layer.slot.whole)
                self._release(layer.slot)

    def _taken(self, layer: _Layer) -> Iterator[tuple[str, Tensor]]:
        yield from layer.batch.tensors(self._checkpoint, layer.slot.whole)
        self._release(layer.slot)

    def _release(self, slot: _Slot) -> None:
        if self._side is not None:
            slot.computed = torch.cuda.current_stream(self._device).record_event()
        self._free.put(slot)

    def _next(self) -> int | _Layer:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _slots(self) -> Iterator[_Slot]:
        size, on_gpu = self._ranks.size, self._side is not None
        part_bytes = max(batch.part_bytes(size) for batch in self._batches)
        for _ in range(1 if self._is_copied else WINDOW):
            part = torch.empty(part_bytes, dtype=torch.uint8, pin_memory=on_gpu)
            own = torch.empty(part_bytes, dtype=torch.uint8, device=self._device) if on_gpu else part
            whole = own
            if size > 1:
                whole = torch.empty(part_bytes * size, dtype=torch.uint8, device=self._device)
            yield _Slot(part, own, whole)

    def _run(self) -> None:
        try:
            if self._side is not None:
                torch.cuda.set_device(self._device)
            passes = self._agreed_passes()
            self._ready.put(passes)
            for _ in range(passes):
                for batch in self._batches:
                    self._ready.put(_Layer(batch, self._filled(batch)))
        except _Abandoned:
            pass
        except Exception as error:  # noqa: BLE001 - raised where the layers are used
            self._ready.put(error)

    def _agreed_passes(self) -> int:
        """Return the passes of the rank that needs most. Collective."""
        checkpoint = self._checkpoint
        if self._ranks.size == 1:
            return self._own_passes
        of_ranks = self._ranks.gather((checkpoint.fingerprint, self._own_passes))
        odd = [str(rank) for rank, (fingerprint, _) in enumerate(of_ranks) if fingerprint != of_ranks[0][0]]
        if odd:
            raise ModelError(
                f"{checkpoint.folder}: the files on rank {', '.join(odd)} are not those on rank 0; "
                "give every machine the same model folder"
            )
        return max(passes for _, passes in of_ranks)

    def _filled(self, batch: Batch) -> _Slot:
        """Read and gather a layer into a free slot. Collective."""
        slot = self._free.get()
        size = self._ranks.size
        num = batch.part_bytes(size)
        failure: Exception | None = None
        try:
            if slot is None or self._is_abandoned:
                raise _Abandoned
            if slot.copied is not None:
                slot.copied.synchronize()
            part = slot.part[:num].numpy().data
            self.bytes_read += batch.read_part(self._checkpoint, self._ranks.rank, size, part)
        except Exception as error:  # noqa: BLE001 - raised below, once the others know
            failure = error
        # Before the collective, so that no rank waits for one that cannot read.
        has_failed = self._ranks.gather(failure is not None)
        if failure is not None:
            raise failure
        if any(has_failed):
            raise PeerFailed
        assert slot is not None
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            if slot.computed is not None and self._side is not None:
                self._side.wait_event(slot.computed)
            if slot.own is not slot.part:
                slot.own[:num].copy_(slot.part[:num], non_blocking=True)
            if size > 1 and num:
                all_gather(slot.whole[: num * size], slot.own[:num])
            if self._side is not None:
                slot.copied = self._side.record_event()
        return slot
