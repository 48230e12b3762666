"""Decoding with a body whose forward is collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mergeopd.errors import PeerFailed

_DONE, _BUSY, _FAILED = range(3)


class JoinedBody(nn.Module):
    """A body that the processes of `group` can only run together, since each has a part of its weights.

    Processes decode sequences of their own, of other shapes and lengths. Each forward is announced, and a
    process that has finished takes part in those of the others with one token, until all have finished.
    """

    def __init__(self, body: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__()
        self._body, self._group = body, group
        self._token = torch.zeros(1, 1, dtype=torch.long, device=device)

    @property
    def config(self) -> Any:
        """The body's configuration, from which caches are made."""
        return self._body.config

    def forward(self, **arguments: Any) -> Any:
        self._announce(_BUSY)
        return self._body(**arguments)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Run forwards inside the context; at its end, take part in those of other processes. Collective.

        If a process leaves it by an exception, the others raise PeerFailed.
        """
        try:
            yield
        except PeerFailed:
            raise
        except Exception:
            self._announce(_FAILED)
            raise
        while self._announce(_DONE) == _BUSY:
            with torch.no_grad():
                self._body(input_ids=self._token, use_cache=False)

    def _announce(self, state: int) -> int:
        """Return the largest state of all processes; raise PeerFailed if another one has failed."""
        states = torch.tensor(state, device=self._token.device)
        dist.all_reduce(states, op=dist.ReduceOp.MAX, group=self._group)
        largest = int(states)
        if largest == _FAILED and state != _FAILED:
            raise PeerFailed
        return largest
