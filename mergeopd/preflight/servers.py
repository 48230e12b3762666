"""Ask the inference servers of a recipe for what the run needs, before it starts."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mergeopd.errors import ModelError, ServingError
from mergeopd.models.facts import ModelFacts
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.rollout import AnyServerRollout, Launch, VllmRollout
from mergeopd.serving.launch import ENGINE_TITLE, check_port_is_free
from mergeopd.serving.protocol import InferenceApi, ServerFacts
from mergeopd.serving.sglang import SglangApi
from mergeopd.serving.transport import Server, ServerPool
from mergeopd.serving.vllm import VllmApi

# Keys of config.json that decide whether the student's weights fit a server's model.
_SHAPE = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "head_dim", "tie_word_embeddings"),
)


def api_of(settings: AnyServerRollout) -> InferenceApi:
    """Return the wire protocol of the engine that a recipe names."""
    return VllmApi() if isinstance(settings, VllmRollout) else SglangApi()


def headers_of(settings: AnyServerRollout) -> dict[str, str]:
    """Return the headers of every request: the key from the environment, if the recipe names one."""
    key = settings.api_key_env and os.environ.get(settings.api_key_env)
    return {"Authorization": f"Bearer {key}"} if key else {}


def check_rollout_servers(findings: Findings, rollout: AnyServerRollout, student: Path | None) -> int | None:
    """Report servers that cannot be reached, are too old, or run another model than the student's folder.

    Returns the longest sequence that all servers take, in tokens; None where none told.
    """
    name = rollout.api_key_env
    if name is not None and not os.environ.get(name):
        message = f"the environment variable {name} is not set"
        findings.report(("rollout", "api_key_env"), message, f"export {name}=... with the servers' key")
        return None
    if rollout.launch is not None:
        _check_launch(findings, rollout)
        return _context(rollout.launch, student)
    limits = []
    for url, told in _facts(rollout).items():
        if isinstance(told, ServingError):
            remedy = "" if "; " in str(told) else "start the server, or correct the address"
            findings.report(("rollout", "url"), str(told), remedy)
            continue
        limits += [] if told.max_tokens is None else [told.max_tokens]
        difference = None if student is None else _other_model(told, student)
        if difference is not None:
            message = f"{url} runs another model than the student: {difference}"
            findings.report(("rollout", "url"), message, f"start it with {student}")
    return min(limits, default=None)


def note_staleness(findings: Findings, plan: Plan) -> None:
    """Note policy terms that learn from responses of older weights without a correction."""
    rollout = plan.rollout
    if not isinstance(rollout, AnyServerRollout) or not (rollout.ahead or rollout.sync.every > 1):
        return
    for phase in filter(plan.has_policy, plan.phases):
        if phase.correction.kind == "none":
            findings.notes.append(
                f"phase '{phase.name}' has policy terms, and its responses come from older weights "
                "(`rollout.ahead` or `rollout.sync.every`); give it `correction: truncate`"
            )


def _check_launch(findings: Findings, rollout: AnyServerRollout) -> None:
    launch, place = rollout.launch, ("rollout", "launch")
    assert launch is not None
    if shutil.which(launch.python) is None:
        message = f"there is no Python interpreter '{launch.python}'"
        remedy = "name that of the environment in which the engine is installed"
        findings.report((*place, "python"), message, remedy)
    if launch.script is not None and not Path(launch.script).is_file():
        findings.report((*place, "script"), f"there is no program '{launch.script}'", "correct the path")
    gpus = [int(gpu) for entry in launch.devices for gpu in entry.split(",")]
    num = sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia[0-9]*"))
    if gpus and max(gpus) >= num:
        message = f"GPU {max(gpus)} is named, and this machine has {num or 'none'}"
        findings.report((*place, "devices"), message, "name GPUs of this machine")
    for index in range(max(1, len(launch.devices)) if launch.port is not None else 0):
        port = (launch.port or 0) + index
        findings.attempt((*place, "port"), partial(check_port_is_free, port, ENGINE_TITLE[rollout.engine]))


def _context(launch: Launch, student: Path | None) -> int | None:
    try:
        return None if student is None else launch.length(ModelFacts.read(student).max_positions)
    except ModelError:  # reported with the student
        return None


def _facts(rollout: AnyServerRollout) -> Mapping[str, ServerFacts | ServingError]:
    assert rollout.url is not None
    api = api_of(rollout)
    pool = ServerPool(rollout.url, headers=headers_of(rollout))

    async def ask(server: Server) -> ServerFacts | ServingError:
        try:
            return await api.facts(pool, server)
        except ServingError as error:
            return error

    async def ask_all() -> list[ServerFacts | ServingError]:
        return list(await asyncio.gather(*map(ask, pool.servers)))

    try:
        return dict(zip(rollout.url, pool.run(ask_all()), strict=True))
    finally:
        pool.close()


def _other_model(told: ServerFacts, student: Path) -> str | None:
    """Compare the configurations, if the server's model folder can be read from here."""
    file = Path(told.model or "") / "config.json"
    if not file.is_file() or not (student / "config.json").is_file():
        return None
    own: dict[str, Any] = json.loads((student / "config.json").read_text(encoding="utf-8"))
    other: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    own, other = own.get("text_config", own), other.get("text_config", other)
    for key in _SHAPE:
        if own.get(key) != other.get(key):
            return f"{key} is {other.get(key)} in {file} and {own.get(key)} in the student's"
    return None
