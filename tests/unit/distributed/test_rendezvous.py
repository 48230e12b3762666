"""Ranks from environment variables of the launcher, torchrun and Slurm."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from mergeopd.distributed.rendezvous import RankInfo, allow_files, num_files
from mergeopd.errors import ProcessError

ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
TORCHRUN = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, RankInfo()),
        (SLURM, RankInfo()),  # a job that starts one process by itself
        ({**TORCHRUN, **ADDRESS}, RankInfo(2, 0, 4)),
        ({**TORCHRUN, "MERGEOPD_RENDEZVOUS": "/tmp/x/meet"}, RankInfo(2, 0, 4, Path("/tmp/x/meet"))),
        ({**SLURM, **ADDRESS}, RankInfo(5, 1, 8)),
        ({**SLURM, **TORCHRUN, **ADDRESS}, RankInfo(2, 0, 4)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, RankInfo()),
    ],
)
def test_rank_from_the_environment(env: dict[str, str], place: RankInfo) -> None:
    assert RankInfo.of(env) == place


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (
            {"RANK": "2"},
            "invalid rank in the environment: RANK=2, LOCAL_RANK=, WORLD_SIZE=; "
            "start the run with mergeopd run --nproc N, or with torchrun",
        ),
        (
            {**TORCHRUN, "WORLD_SIZE": "four"},
            "invalid rank in the environment: RANK=2, LOCAL_RANK=0, WORLD_SIZE=four; "
            "start the run with mergeopd run --nproc N, or with torchrun",
        ),
        (
            {**TORCHRUN, "MASTER_ADDR": "node0"},
            "RANK and WORLD_SIZE are set, but not MASTER_PORT, so the 4 processes cannot connect; "
            "start the run with mergeopd run --nproc N, or with torchrun",
        ),
    ],
)
def test_an_incomplete_environment_is_refused(env: dict[str, str], text: str) -> None:
    with pytest.raises(ProcessError) as caught:
        RankInfo.of(env)
    assert str(caught.value) == text


def test_a_large_run_may_open_a_file_for_every_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = (num_files(RankInfo(rank, rank % 8, 1024)) for rank in (0, 700))
    assert first > 2048 > 1024 > other
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.append(new))
    allow_files(other)
    assert limits == [(1024, 4096)]
    allow_files(first)
    assert limits[-1] == (first, 4096)
    with pytest.raises(ProcessError, match="needs 5000 open files in a process, and the system allows 4096"):
        allow_files(5000)
