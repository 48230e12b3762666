"""Rendezvous of the processes of a run, and the choice of the one process that reports an error.

Processes are started by `mergeopd run --nproc`, torchrun or srun. Importing this does not import torch.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mergeopd.distributed.communicator import Communicator, SingleProcess, TorchCommunicator, this_machine
from mergeopd.errors import MergeopdError, PeerFailed, ProcessError, Stopped

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# Set by `mergeopd run --nproc` besides torchrun's variables: the launcher's process id, and a FileStore path.
LAUNCHER = "MERGEOPD_LAUNCHER"
RENDEZVOUS = "MERGEOPD_RENDEZVOUS"
# Signals that are blocked in the processes until they call `join_launcher`.
BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_PR_SET_PDEATHSIG = 1
# Timeout of collectives, for a process that hangs (one that ends is noticed at once). Must be longer than
# rank 0 takes to write an export (140 GB for 70 billion weights) while the others wait.
_TIMEOUT = timedelta(hours=2)
# Above this number of processes, each connects to another one when it first has something to send: all pairs
# take minutes and a thousand open files in every process.
_MAX_MESH = 128
# Open files of a process beside its connections.
_OTHER_FILES = 512
# How long a process that lost another one waits for a process that reports the cause.
_CLAIM_WAIT_S = 3.0
_CLAIM = "mergeopd/error"


def join_launcher() -> None:
    """End this process together with its launcher, and unblock signals. Called first in every process."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os._exit(1)  # the launcher ended before the call above
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)


class ErrorToReport(Exception):  # noqa: N818 (a wrapper)
    """Wraps the `error` that this process has to report on behalf of all."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process, from the environment. Default: a single process.

    `rendezvous` is the FileStore of `mergeopd run --nproc`; without it, MASTER_ADDR and MASTER_PORT are used.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    rendezvous: Path | None = None

    @classmethod
    def of(cls, env: Mapping[str, str] = os.environ) -> RankInfo:
        """Read the variables of the launcher and of torchrun; with MASTER_ADDR set, also those of Slurm.

        Raises ProcessError if variables are missing or not numbers.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if "RANK" not in env and {"MASTER_ADDR", "SLURM_PROCID"} <= env.keys():
            names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        if names[0] not in env and names[2] not in env:
            return cls()
        try:
            rank, local_rank, world = (int(env[name]) for name in names)
        except (KeyError, ValueError):
            values = ", ".join(f"{name}={env.get(name, '')}" for name in names)
            raise ProcessError(f"invalid rank in the environment: {values}; {_START}") from None
        file = env.get(RENDEZVOUS)
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if world > 1 and file is None and lacking:
            raise ProcessError(
                f"{names[0]} and {names[2]} are set, but not {' and '.join(lacking)}, so the {world} "
                f"processes cannot connect; {_START}"
            )
        return cls(rank, local_rank, world, None if file is None else Path(file))

    @property
    def name(self) -> str:
        """Name in messages, where processes count from 1."""
        return f"process {self.rank + 1} of {self.world}"

    @property
    def claim_file(self) -> Path | None:
        """File created by the process that reports an error, under `mergeopd run --nproc`."""
        return None if self.rendezvous is None else self.rendezvous.with_name("claimed")


_START = "start the run with mergeopd run --nproc N, or with torchrun"


def claim_report(place: RankInfo, store: Store | None = None) -> bool:
    """Claim to report an error on behalf of all processes; True for the first process that does.

    Claims are made in the launcher's folder, else in the `store` of the process group. Before the rendezvous,
    the first process of each machine reports, because such errors usually occur on all ranks.
    """
    if place.claim_file is None:
        return place.local_rank == 0 if store is None else _num_claims(store, 1) == 1
    try:
        os.close(os.open(place.claim_file, os.O_CREAT | os.O_EXCL))
    except OSError:  # it exists, or the launcher has ended and removed the folder
        return False
    return True


@contextmanager
def open_communicator(place: RankInfo, *, grouped: bool) -> Iterator[Communicator]:
    """Connect the processes of this run; torch's default process group is initialised inside.

    A single process has a group with `grouped` only, which Megatron needs. Each process uses the GPU of its
    local rank.

    With several processes, the first that fails raises `ErrorToReport` and the others raise PeerFailed.
    Stopped and KeyboardInterrupt are not changed. Raises ProcessError if the processes cannot connect.
    """
    if place.world == 1 and not grouped:
        yield SingleProcess()
        return
    import torch.distributed as dist

    if place.world == 1:
        hash_store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(_backend(0), store=hash_store, rank=0, world_size=1)
        try:
            yield SingleProcess()
        finally:
            dist.destroy_process_group()
        return
    store = _init_process_group(place)
    try:
        yield TorchCommunicator(this_machine())
    except (PeerFailed, Stopped):
        raise
    except KeyboardInterrupt:
        claim_report(place, store)
        raise
    except Exception as error:
        own = error
        if _is_of_lost_process(error):
            if _is_claimed_soon(place, store):
                raise PeerFailed from error
            own = ProcessError(
                f"{place.name} lost the connection to another process, which ended or does not respond; "
                f"run the same command to resume from the newest checkpoint ({str(error).splitlines()[0]})"
            )
        elif not isinstance(error, MergeopdError):
            own.add_note(f"(in {place.name})")
        if claim_report(place, store):
            raise ErrorToReport(own) from error
        raise PeerFailed from error
    # Not after an error: other processes may be in a collective, and destroying the group could block.
    dist.destroy_process_group()


def _init_process_group(place: RankInfo) -> Store:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    if place.world > _MAX_MESH:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    allow_files(num_files(place))
    backend = _backend(place.local_rank)
    store = None
    if place.rendezvous is not None:
        store = dist.FileStore(str(place.rendezvous), place.world)  # type: ignore[attr-defined]
    try:
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, timeout=_TIMEOUT
        )
    except RuntimeError as error:  # also DistError
        address = place.rendezvous or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ProcessError(
            f"{place.name} could not connect to the others at {address}: {str(error).splitlines()[0]}; "
            "check that all were started and reach each other (GLOO_SOCKET_IFNAME sets the network interface)"
        ) from error
    return _get_default_store()


def num_files(place: RankInfo) -> int:
    """Return the open files that a process needs: rank 0 has two connections to every other one."""
    peers = 2 * place.world if place.rank == 0 else min(place.world, _MAX_MESH)
    return peers + _OTHER_FILES


def allow_files(num: int) -> None:
    """Let this process open `num` files; raises ProcessError where the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    if most < num:
        raise ProcessError(
            f"the run needs {num} open files in a process, and the system allows {most}; raise the limit "
            "(`ulimit -Hn`, or LimitNOFILE of the job's service), or start fewer processes"
        )
    if soft != resource.RLIM_INFINITY and soft < num:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num, hard))


def _backend(local_rank: int) -> str:
    """Select this process's GPU, if there is one, and return the group's backend. Raises ProcessError."""
    import torch

    if not torch.cuda.is_available():
        return "gloo"
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ProcessError(
            f"more processes than GPUs on this machine: {count} GPUs, and a process with local rank "
            f"{local_rank}; start at most {count}, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.set_device(local_rank)
    return "cpu:gloo,cuda:nccl"


def _is_of_lost_process(error: Exception) -> bool:
    """Whether gloo, NCCL or the store reports that another process is gone or does not respond."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    # gloo's errors have no type of their own, but contain the location in its source.
    return type(error) is RuntimeError and ("/gloo/" in str(error) or "NCCL" in str(error))


def _is_claimed_soon(place: RankInfo, store: Store) -> bool:
    """Wait briefly for a claim: a process that failed has claimed; one that was killed or hangs has not."""
    deadline = time.monotonic() + _CLAIM_WAIT_S
    while not _is_claimed(place.claim_file, store):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _is_claimed(file: Path | None, store: Store) -> bool:
    """Whether any process has claimed; True if that can no longer be found out."""
    if file is None:
        return _num_claims(store, 0) != 0
    return file.exists() or not file.parent.exists()


def _num_claims(store: Store, more: int) -> int:
    """Add `more` claims and return their number; -1 if the store ended with its process."""
    try:
        return int(store.add(_CLAIM, more))
    except RuntimeError:
        return -1
