"""Build the rollout engine that a recipe names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mergeopd.distributed.communicator import Communicator
from mergeopd.errors import ServingError
from mergeopd.models.facts import ModelFacts
from mergeopd.preflight.servers import api_of, headers_of
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.rollout import AnyServerRollout, VllmRollout
from mergeopd.rollout.local import LocalEngine
from mergeopd.rollout.protocol import EngineContext, RolloutEngine, WeightSource
from mergeopd.rollout.served import Begin, ServedEngine
from mergeopd.rollout.servers import LaunchedServers, RunningServers, Servers
from mergeopd.rollout.transfer import GroupTransfer, TransferSync, WeightTransfer
from mergeopd.rollout.vllm_transfer import VllmTransfer
from mergeopd.serving.launch import ServerLaunch
from mergeopd.storage.published_weights import PublishedWeights
from mergeopd.storage.run_folder import RunFolder

# The run stops after so long without any server.
_LOST_S = 60.0

MakeEngine = Callable[[WeightSource, EngineContext, Any], RolloutEngine]

ENGINES: Mapping[str, MakeEngine] = MappingProxyType(
    {
        "local": lambda source, context, settings: LocalEngine(
            source, context, settings.batch_size, settings.replay_routes
        )
    }
)
"""Engines that generate the student's responses, by `rollout.engine`; they get that section of the recipe."""


def engines_of(
    plan: Plan, vocab_size: int, ranks: Communicator, begin: Begin, check_stop: Callable[[], None]
) -> dict[str, MakeEngine]:
    """Return all engines that the recipe of `plan` can name; those with servers belong to its run folder.

    `begin` reports that servers start; `check_stop` may raise while they load weights.
    """
    make = partial(_served, plan, vocab_size, ranks, begin, check_stop)
    return {**ENGINES, "vllm": make, "sglang": make}


def _served(
    plan: Plan,
    vocab_size: int,
    ranks: Communicator,
    begin: Begin,
    check_stop: Callable[[], None],
    source: WeightSource,
    context: EngineContext,
    settings: AnyServerRollout,
) -> ServedEngine:
    model = Path(plan.student.model)
    return ServedEngine(
        api_of(settings),
        _servers(plan, settings),
        context,
        _publisher(plan, ranks, context, settings),
        padding=range(vocab_size, ModelFacts.read(model).vocab_rows),
        concurrency=settings.concurrency,
        timeout_s=settings.timeout_s,
        # A server that the run starts is restarted in this time.
        lost_s=_LOST_S + (0.0 if settings.launch is None else settings.launch.startup_s),
        headers=headers_of(settings),
        begin=begin,
        check_stop=check_stop,
    )


def _publisher(
    plan: Plan, ranks: Communicator, context: EngineContext, settings: AnyServerRollout
) -> _Publisher | TransferSync:
    """Return the way of weights to the servers: from memory, or through a folder."""
    sync, device = settings.sync, context.device
    if sync.method == "ipc" and ranks.size > 1:
        raise ServingError(
            "`rollout.sync.method: ipc` is for one training process: write `nccl` or `folder`, or train with "
            "one process"
        )
    if sync.method != "folder":
        if sync.method != "gloo" and device.type != "cuda":
            raise ServingError(
                f"`rollout.sync.method: {sync.method}` needs a student on a GPU; it is on {device}"
            )
        transfer: WeightTransfer
        if sync.method == "ipc" or (sync.method == "nccl" and isinstance(settings, VllmRollout)):
            transfer = VllmTransfer(sync.method, device)
        else:
            device = device if sync.method == "nccl" else torch.device("cpu")
            transfer = GroupTransfer(sync.method, device)
        is_current = settings.ahead == 0 and sync.every == 1
        return TransferSync(api_of(settings), transfer, context.run_on_first, is_current)
    folder = RunFolder(Path(plan.output)).weights
    if sync.folder is not None:
        folder = Path(sync.folder) / f"mergeopd-{plan.hash[:12]}"  # other runs may name it, too
    return _Publisher(PublishedWeights(folder, Path(plan.student.model), ranks))


def _servers(plan: Plan, settings: AnyServerRollout) -> Servers:
    launch, model = settings.launch, Path(plan.student.model)
    if launch is None:
        assert settings.url is not None
        return RunningServers(settings.url)
    logs = RunFolder(Path(plan.output)).servers
    python = shutil.which(launch.python) or launch.python  # reported by `check` where it does not exist
    devices = [tuple(map(int, entry.split(","))) for entry in launch.devices] or [()]
    launches = [
        ServerLaunch(
            settings.engine,
            model,
            model_name="student",
            context_length=launch.length(ModelFacts.read(model).max_positions),
            dtype=plan.student.dtype,
            log=logs / f"{index}.log",
            devices=own,
            port=None if launch.port is None else launch.port + index,
            python=Path(python),
            script=None if launch.script is None else Path(launch.script).resolve(),
            weight_transfer=None if settings.sync.method == "folder" else settings.sync.method,
            arguments=launch.args,
            environment=launch.env,
        )
        for index, own in enumerate(devices)
    ]
    return LaunchedServers(launches, launch.startup_s)


@dataclass
class _Publisher:
    """Keeps the newest version and the one before, which servers may still read."""

    weights: PublishedWeights
    _num_kept: int = field(default=0, init=False)  # none of an earlier process

    def publish(self, source: WeightSource, version: int) -> Path:
        if self.weights.ranks.is_first:
            self.weights.prune(self._num_kept)
        self._num_kept = 1
        return self.weights.publish(source, version)

    def discard(self) -> None:
        self.weights.prune(0)
