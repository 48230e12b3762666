"""Rollout settings: how responses are sampled, and the engines that generate them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from mergeopd.config.folders import absolute
from mergeopd.config.values import GPUS_PATTERN, Flag, NonEmptyText, Positive, PositiveInt, Strict
from mergeopd.recipe.served import Urls, checked_urls
from mergeopd.rollout.protocol import EngineCapabilities

Temperature = Annotated[float, Field(gt=0.0, le=10.0, strict=True)]
TopP = Annotated[float, Field(gt=0.0, le=1.0, strict=True)]
NotNegative = Annotated[int, Field(ge=0, strict=True)]


class RolloutSettings(Strict):
    """How responses are sampled, whichever engine generates them."""

    engine: str
    samples_per_prompt: PositiveInt = Field(default=1, description="responses per prompt and round")
    temperature: Temperature = 1.0
    """sampling temperature"""
    top_p: TopP = 1.0
    """nucleus sampling: sample from the smallest set of tokens with this total probability"""
    max_new_tokens: PositiveInt = Field(default=256, description="maximum response length, in tokens")
    stop: tuple[str, ...] = ()
    """strings that end a response, in addition to the end token"""
    batch_size: PositiveInt = Field(default=256, description="sequences decoded together in this process")


class LocalRollout(RolloutSettings):
    """Sampling inside the training process."""

    capabilities: ClassVar = EngineCapabilities(
        returns_logprobs=True, is_reproducible=True, needs_replica=True
    )

    engine: Literal["local"] = "local"
    """rollout engine that generates the student's responses"""
    replay_routes: Flag = False
    """for a student that is a mixture of experts: in training, each token of its own responses is computed by
    the experts that computed it when it was generated"""
    gather: Literal["model", "layer"] = "model"
    """with a student that `backend: torch` shards: `model` gathers a whole copy on every process; `layer`
    gathers one layer at a time for every token, which is slower and needs no copy"""


class Launch(Strict):
    """Servers that the run starts, watches, restarts once after a crash, and stops.

    They listen on 127.0.0.1, and write their output into the folder `servers` of the run.
    """

    python: str = "python"
    """Python interpreter of the environment in which the engine is installed"""
    devices: tuple[Annotated[str, Field(pattern=GPUS_PATTERN)], ...] = ()
    """one server for each entry: numbers of its GPUs, such as `"0"` or `"0,1"` (tensor parallel); empty: one
    server on the CPU"""
    port: Annotated[int, Field(ge=1, le=65535, strict=True)] | None = None
    """port of the first server; the others follow. Default: free ones"""
    context_length: PositiveInt | None = None
    """longest sequence of prompt and response, in tokens; default: the student's context, at most 32768"""
    script: str | None = None
    """program to run in place of the engine's own, with the same arguments"""
    args: tuple[str, ...] = ()
    """further arguments of the server's command line"""
    env: dict[str, str] = Field(default={}, description="further environment variables of the server")
    startup_s: Positive = Field(default=900.0, description="seconds that a server may take to start")

    def length(self, max_positions: int) -> int:
        """Return the servers' context for a model with this one."""
        return min(max_positions, self.context_length or 32768)


class WeightSync(Strict):
    """How the student's weights reach the servers."""

    every: PositiveInt = Field(default=1, description="optimizer updates between two syncs")
    method: Literal["folder", "nccl", "gloo", "ipc"] = "folder"
    """`folder`: through files, which works everywhere. From memory to memory: `nccl` between GPUs; `gloo` to
    SGLang, over the network; `ipc` to one vLLM server on the training process's own GPU. With vLLM, `nccl`
    and `ipc` need the package vllm in this environment, too"""
    folder: str | None = None
    """folder for the weights, under the same path on the servers' machines; default: `weights` in the run
    folder. On one machine, a folder in memory such as /dev/shm is faster"""

    @model_validator(mode="after")
    def _folder_is_used(self) -> WeightSync:
        if self.folder is not None and self.method != "folder":
            raise ValueError(f"`method: {self.method}` writes no files: remove `folder`, or `method`")
        return self


class Parity(Strict):
    """Compare the servers' log-probabilities with the student's on the same responses.

    At the start, with the first weights that training has changed, and after a server was lost, too.
    """

    every: PositiveInt = Field(default=50, description="updates between two comparisons, from the first on")
    num_responses: PositiveInt = Field(default=8, description="responses that are compared")
    max_mean_gap: Positive = 0.05
    """largest mean of |server - student| over tokens, in nats; above it the run stops. Rounding in bfloat16
    explains about 0.01"""


class ServerRollout(RolloutSettings):
    """Sampling by inference servers, which get the student's weights after its updates."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["url"]}, {"required": ["launch"]}]})
    # Retries and batching change the order of random numbers.
    capabilities: ClassVar = EngineCapabilities(
        returns_logprobs=True, is_reproducible=False, needs_replica=False
    )

    url: Urls | None = None
    """address of a running server, or of several; either `url` or `launch` is required"""
    api_key_env: NonEmptyText | None = None
    """environment variable with the API key of the servers, if they ask for one"""
    launch: Launch | None = Field(default=None, description="servers to start for this run")
    concurrency: PositiveInt = Field(default=256, description="requests that run at once at each server")
    timeout_s: Positive = Field(default=600.0, description="seconds that a response may take")
    ahead: NotNegative = 0
    """rounds that are generated while earlier ones are scored and trained on. 0: none, so that every response
    comes from the current weights; 1: one-step-off"""
    max_staleness: NotNegative | None = None
    """largest number of updates between the weights that begin a round and those that learn from it first;
    rounds wait until the servers' weights are new enough. Default: what `ahead` implies"""
    sync: WeightSync = WeightSync()
    """how the student's weights reach the servers"""
    parity: Parity | None = Parity()
    """comparison of the servers' log-probabilities with the student's; null: none"""

    @field_validator("url")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if urls is None else checked_urls(urls)

    @model_validator(mode="after")
    def _one_origin(self) -> ServerRollout:
        if self.url is None and self.launch is None:
            raise ValueError("no server: give its address as `url`, or `launch: {}` to start one")
        if self.url is not None and self.launch is not None:
            raise ValueError("`url` and `launch` both name servers: remove one")
        return self


class VllmRollout(ServerRollout):
    """Sampling by vLLM 0.24 or newer.

    A server at `url` must run with `--enable-scale-out --logprobs-mode processed_logprobs
    --generation-config vllm` and with the environment variable `VLLM_SERVER_DEV_MODE=1`.
    """

    engine: Literal["vllm"] = Field(description="rollout engine that generates the student's responses")

    @model_validator(mode="after")
    def _can_transfer(self) -> VllmRollout:
        method, launch = self.sync.method, self.launch
        if method == "gloo":
            raise ValueError("vLLM takes no weights over `gloo`: write `sync: {method: nccl}` or `folder`")
        # Its protocol has pickled handles in requests, which no server but the run's own should accept.
        if method == "ipc" and (launch is None or [entry.isdecimal() for entry in launch.devices] != [True]):
            raise ValueError(
                "`sync: {method: ipc}` is for one server that the run starts on the GPU of the training "
                'process: write it as `launch: {devices: ["0"]}`, or use `method: nccl`'
            )
        if method == "nccl" and launch is not None and not launch.devices:
            raise ValueError("`sync: {method: nccl}` needs GPUs: name them in `launch.devices`")
        return self


class SglangRollout(ServerRollout):
    """Sampling by SGLang 0.5.9 or newer."""

    engine: Literal["sglang"] = Field(description="rollout engine that generates the student's responses")

    @model_validator(mode="after")
    def _can_transfer(self) -> SglangRollout:
        if self.sync.method == "ipc":
            raise ValueError("`sync: {method: ipc}` is for vLLM: write `method: nccl`, `gloo` or `folder`")
        if self.sync.method == "nccl" and self.launch is not None and not self.launch.devices:
            raise ValueError(
                "`sync: {method: nccl}` needs GPUs: name them in `launch.devices`, or use `gloo`"
            )
        return self


def default_engine(value: Any) -> Any:
    """Add the default engine to a section that names none."""
    return {"engine": "local", **value} if isinstance(value, dict) else value


_Rollout = Annotated[LocalRollout | VllmRollout | SglangRollout, Field(discriminator="engine")]
AnyRollout = Annotated[_Rollout, BeforeValidator(default_engine, json_schema_input_type=_Rollout)]
"""The section `rollout` of a recipe: that of one engine."""


AnyServerRollout = VllmRollout | SglangRollout


def with_paths(rollout: AnyRollout, base: Callable[[tuple[str, ...]], Path]) -> AnyRollout:
    """Make the paths of servers absolute; `base` returns the project folder of a key."""
    if not isinstance(rollout, AnyServerRollout):
        return rollout
    changes: dict[str, Any] = {}
    if rollout.sync.folder is not None:
        folder = absolute(rollout.sync.folder, base(("sync", "folder")))
        changes["sync"] = rollout.sync.model_copy(update={"folder": str(folder)})
    if (launch := rollout.launch) is not None:
        own = {"python": launch.python if os.sep in launch.python else None, "script": launch.script}
        paths = {
            key: str(absolute(written, base(("launch", key)))) for key, written in own.items() if written
        }
        changes["launch"] = launch.model_copy(update=paths)
    return rollout.model_copy(update=changes)


class PhaseRollout(Strict):
    """How responses are sampled in one phase; the default of every key is that of `rollout`."""

    samples_per_prompt: PositiveInt | None = Field(default=None, description="responses per prompt and round")
    temperature: Temperature | None = Field(default=None, description="sampling temperature")
    top_p: TopP | None = Field(default=None, description="total probability of the tokens sampled from")
    max_new_tokens: PositiveInt | None = Field(default=None, description="maximum length, in tokens")
    stop: tuple[str, ...] | None = Field(default=None, description="strings that end a response")

    def over(self, rollout: AnyRollout) -> AnyRollout:
        """Return the settings of a phase: these, and those of `rollout` where there is none."""
        return rollout.model_copy(update=self.model_dump(exclude_none=True))
