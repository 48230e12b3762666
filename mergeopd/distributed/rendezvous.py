"""How processes of a run find each other, and how one of them alone tells what went wrong.

They were started by `mergeopd run --nproc`, torchrun or srun. Importing this does not import torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mergeopd.distributed.communicator import Communicator, SingleProcess, TorchCommunicator, this_machine
from mergeopd.errors import MergeopdError, PeerFailed, ProcessError, Stopped

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# What `mergeopd run --nproc` sets besides torchrun's names: its process number, and a file to meet through.
LAUNCHER = "MERGEOPD_LAUNCHER"
RENDEZVOUS = "MERGEOPD_RENDEZVOUS"
# Signals that it keeps from the processes until they call `join_launcher`.
HELD_BACK = (signal.SIGINT, signal.SIGTERM)

_PR_SET_PDEATHSIG = 1
# A collective call fails when a process has been waited for so long: longer than the first may work alone,
# which brings checkpoints to the disk (840 GB for 70 billion weights) while others wait. A process that ends
# is noticed at once; this is for one that hangs.
_TIMEOUT = timedelta(hours=2)
# How long a process that lost another one waits for somebody to tell why.
_HEARSAY_S = 3.0
_CLAIM = "mergeopd/error"


def join_launcher() -> None:
    """For a process that `launch` started, first of all: end with the launcher, and take signals again."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os._exit(1)  # the launcher ended before this could be arranged
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)


class ErrorToReport(Exception):  # noqa: N818 (a wrapper)
    """An error that this process, of several, is to show: `error`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class RankInfo:
    """What the environment says of this process; alone where it says nothing.

    `rendezvous` is a file on this machine, made by `mergeopd run --nproc`; without it MASTER_ADDR and
    MASTER_PORT name the place of meeting.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    rendezvous: Path | None = None

    @classmethod
    def of(cls, env: Mapping[str, str] = os.environ) -> RankInfo:
        """Read the variables of the launcher and of torchrun, with MASTER_ADDR also those of Slurm.

        Raises ProcessError for variables that are incomplete or no numbers.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if "RANK" not in env and {"MASTER_ADDR", "SLURM_PROCID"} <= env.keys():
            names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        if names[0] not in env and names[2] not in env:
            return cls()
        try:
            rank, local_rank, world = (int(env[name]) for name in names)
        except (KeyError, ValueError):
            said = ", ".join(f"{name}={env.get(name, '')}" for name in names)
            raise ProcessError(
                f"the environment does not say which process this is: {said}; {_START}"
            ) from None
        file = env.get(RENDEZVOUS)
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if world > 1 and file is None and lacking:
            raise ProcessError(
                f"{names[0]} and {names[2]} are set, {' and '.join(lacking)} not, so the {world} processes "
                f"cannot meet; {_START}"
            )
        return cls(rank, local_rank, world, None if file is None else Path(file))

    @property
    def name(self) -> str:
        """What messages call it; processes count from 1."""
        return f"process {self.rank + 1} of {self.world}"

    @property
    def told(self) -> Path | None:
        """The file by which one process of the launcher's takes it on itself to tell."""
        return None if self.rendezvous is None else self.rendezvous.with_name("told")


_START = "start the run with mergeopd run --nproc N, or with torchrun"


class Claims(Protocol):
    """One process of a run takes it on itself to tell the error."""

    def claim(self) -> bool:
        """Whether this one was the first to ask."""

    def is_claimed(self) -> bool:
        """Whether any has asked; True where nobody can be asked any more."""


def claims_before_meeting(place: RankInfo) -> Claims:
    """Without torch: through the launcher's folder; else each machine's first process may."""
    return _FileClaims(place.told) if place.told is not None else _FirstOfMachine(place)


@contextmanager
def open_communicator(place: RankInfo, *, grouped: bool) -> Iterator[Communicator]:
    """The processes of this run, which all enter and leave; torch's default group is theirs inside.

    A process alone has a group of its own with `grouped` only, which a student on Megatron needs. On a GPU
    machine each process takes the one of its local number.

    What is raised inside comes out as it was from a process alone. Of several the first one to meet an error
    raises `ErrorToReport` with it, others raise PeerFailed; Stopped and KeyboardInterrupt pass. Raises
    ProcessError where the processes cannot meet.
    """
    if place.world == 1:
        if not grouped:
            yield SingleProcess()
            return
        with _group_of_one():
            yield SingleProcess()
        return
    import torch.distributed as dist

    store = _meet(place)
    claims = _StoreClaims(store) if place.told is None else _FileClaims(place.told)
    try:
        yield TorchCommunicator(this_machine())
    except (PeerFailed, Stopped):
        raise
    except KeyboardInterrupt:
        claims.claim()
        raise
    except Exception as error:
        own = error
        if _is_of_a_lost_process(error):
            if _is_claimed_soon(claims):
                raise PeerFailed from error
            own = ProcessError(
                f"{place.name} lost the connection to another process, which ended or does not respond; "
                f"run the same command to resume from the newest checkpoint ({str(error).splitlines()[0]})"
            )
        elif not isinstance(error, MergeopdError):
            own.add_note(f"(in {place.name})")
        if claims.claim():
            raise ErrorToReport(own) from error
        raise PeerFailed from error
    # Not where something was raised: others may be waiting in the group, and to end it could wait for them.
    dist.destroy_process_group()


@contextmanager
def _group_of_one() -> Iterator[None]:
    import torch.distributed as dist

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(_backend(0), store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meet(place: RankInfo) -> Store:
    """Open torch's default group; its store."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    backend = _backend(place.local_rank)
    store = None
    if place.rendezvous is not None:
        store = dist.FileStore(str(place.rendezvous), place.world)  # type: ignore[attr-defined]
    try:
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, timeout=_TIMEOUT
        )
    except RuntimeError as error:  # also DistError
        meeting = place.rendezvous or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ProcessError(
            f"{place.name} did not meet the others at {meeting}: {str(error).splitlines()[0]}; "
            "see that all were started and reach each other (GLOO_SOCKET_IFNAME names a network interface)"
        ) from error
    return _get_default_store()


def _backend(local_rank: int) -> str:
    """The group's backend, with this process's GPU chosen where there are any. Raises ProcessError."""
    import torch

    if not torch.cuda.is_available():
        return "gloo"
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ProcessError(
            f"more processes than GPUs on this machine: {count} GPUs, and a process with local number "
            f"{local_rank}; start at most {count}, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(local_rank)
    return "cpu:gloo,cuda:nccl"


def _is_of_a_lost_process(error: Exception) -> bool:
    """Whether gloo, NCCL or the store says that another process is gone, or does not answer."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    # gloo's errors have no type of their own, but begin with the place in its source.
    return type(error) is RuntimeError and ("/gloo/" in str(error) or "NCCL" in str(error))


def _is_claimed_soon(claims: Claims) -> bool:
    """Who ended for an error has claimed it before; one that was killed or hangs has not."""
    deadline = time.monotonic() + _HEARSAY_S
    while not claims.is_claimed():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class _FileClaims:
    """Through a folder that all see, with or without torch."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def claim(self) -> bool:
        try:
            os.close(os.open(self._file, os.O_CREAT | os.O_EXCL))
        except OSError:  # it is there, or the launcher has ended and its folder with it
            return False
        return True

    def is_claimed(self) -> bool:
        return self._file.exists() or not self._file.parent.exists()


class _FirstOfMachine:
    """Before processes of several machines have met: what they find is mostly found by all."""

    def __init__(self, place: RankInfo) -> None:
        self._may = place.local_rank == 0

    def claim(self) -> bool:
        return self._may

    def is_claimed(self) -> bool:
        return not self._may


class _StoreClaims:
    """Through the store of the group."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def claim(self) -> bool:
        return self._count(1) == 1

    def is_claimed(self) -> bool:
        return self._count(0) != 0

    def _count(self, more: int) -> int:
        """Claims, with `more` added; -1 where the store is gone, and the process that had it told why."""
        try:
            return int(self._store.add(_CLAIM, more))
        except RuntimeError:
            return -1
