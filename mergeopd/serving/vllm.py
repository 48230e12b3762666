"""vLLM's server: `/inference/v1/generate` (token ids in and out), and weights from a folder.

Facts by version: vLLM's `entrypoints/scale_out` and `entrypoints/rl`. The server must be started with
`--enable-scale-out` and, for weights, with `VLLM_SERVER_DEV_MODE=1`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeopd.errors import ServingError
from mergeopd.serving.protocol import (
    BANNED,
    Generated,
    ServerFacts,
    Transfer,
    check_version,
    check_weight_version,
    command,
    ids_of,
    logprob_of,
    replies_of,
    restored,
)
from mergeopd.serving.transport import BadReply, Server, ServerPool
from mergeopd.types import Finish, Sampling

GENERATE = "/inference/v1/generate"
WORKER_EXTENSION = "mergeopd_vllm_worker.CpuWeights"
EXTENSION_FOLDER = Path(__file__).with_name("worker_extension")
OLDEST = (0, 24)
_FACTS_S = 20.0
# Routes that weights need, and where they come from.
_WEIGHT_ROUTES = ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/server_info")
_TRANSFER_ROUTES = (
    *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
    "/get_world_size",
)


@dataclass(frozen=True, slots=True)
class VllmApi:
    """Requests and replies of vLLM.

    `takes_weights`: the server must have the routes that load weights; `transfer`: how it gets them, if not
    from a folder.
    """

    takes_weights: bool = True
    transfer: Transfer | None = None

    async def facts(self, pool: ServerPool, server: Server) -> ServerFacts:
        with replies_of(server, "vLLM"):
            return await self._facts(pool, server)

    async def _facts(self, pool: ServerPool, server: Server) -> ServerFacts:
        version = (await command(pool, server, "/version", None, timeout_s=_FACTS_S) or {}).get("version", "")
        check_version(server, "vLLM", version, OLDEST)
        document = await command(pool, server, "/openapi.json", None, timeout_s=_FACTS_S)
        routes = frozenset(document.get("paths", ()))
        if GENERATE not in routes:
            raise ServingError(
                f"{server.url}: the server has no {GENERATE}; start it with --enable-scale-out"
            )
        if self.takes_weights and (missing := [route for route in _WEIGHT_ROUTES if route not in routes]):
            raise ServingError(
                f"{server.url}: the server has no {missing[0]}, which weight updates need; start it with "
                "the environment variable VLLM_SERVER_DEV_MODE=1"
            )
        if self.transfer and (missing := [route for route in _TRANSFER_ROUTES if route not in routes]):
            raise ServingError(
                f"{server.url}: vLLM {version} has no {missing[0]}, which `sync: {{method: "
                f"{self.transfer}}}` needs; update it, or write `method: folder`"
            )
        on_cpu, num_workers = False, 1
        if self.transfer:
            told = await command(pool, server, "/get_world_size", None, timeout_s=_FACTS_S)
            num_workers = int(told["world_size"])
        if self.takes_weights:
            on_cpu = await self._check_settings(pool, server)
        models = await command(pool, server, "/v1/models", None, timeout_s=_FACTS_S)
        card = models["data"][0]
        length, model = card.get("max_model_len"), card.get("root")
        server.facts = facts = ServerFacts(version, routes, length, model, on_cpu, num_workers)
        return facts

    async def _check_settings(self, pool: ServerPool, server: Server) -> bool:
        """Return whether the server runs on a CPU.

        Raises ServingError if log-probabilities are not those of the distribution that is sampled from, or
        weights would be updated in part only.
        """
        info = await command(pool, server, "/server_info?config_format=json", None, timeout_s=_FACTS_S)
        config = info.get("vllm_config") or {}
        mode = str((config.get("model_config") or {}).get("logprobs_mode"))
        if "processed_logprobs" not in mode.lower():
            raise ServingError(
                f"{server.url}: returns log-probabilities before temperature and top_p (--logprobs-mode "
                f"{mode}); start it with --logprobs-mode processed_logprobs"
            )
        backend = (config.get("weight_transfer_config") or {}).get("backend")
        if self.transfer and backend != self.transfer:
            flag = f"""--weight-transfer-config '{{"backend": "{self.transfer}"}}'"""
            raise ServingError(f"{server.url}: takes no weights over {self.transfer}; start it with {flag}")
        if str((config.get("device_config") or {}).get("device")) != "cpu":
            return False
        if (config.get("parallel_config") or {}).get("worker_extension_cls") != WORKER_EXTENSION:
            raise ServingError(
                f"{server.url}: on a CPU, vLLM does not update a tied head; start it with "
                f"--worker-extension-cls {WORKER_EXTENSION} and PYTHONPATH={EXTENSION_FOLDER}"
            )
        return True

    def generation(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        eos_ids: Collection[int],
        banned: Collection[int],
    ) -> tuple[str, dict[str, Any]]:
        stops = list(sampling.stop)
        params = {
            **_NEUTRAL,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "stop": stops,
            "stop_token_ids": sorted(eos_ids),
            "logit_bias": {str(i): BANNED for i in banned} or None,
            "ignore_eos": True,  # of the server's model: `stop_token_ids` has those of the recipe
            "logprobs": 0,  # of the sampled token only
            # Stop texts may contain special tokens, and are searched in the text.
            "detokenize": bool(stops),
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
        }
        return GENERATE, {"token_ids": list(prompt_ids), "sampling_params": params, "stream": False}

    def generated(self, reply: Any, sampling: Sampling, eos_ids: Collection[int]) -> Generated:
        choice = _choice(reply)
        ids = ids_of(choice.get("token_ids"))
        content = (choice.get("logprobs") or {}).get("content") or []
        if [entry.get("token_id") for entry in content] != ids:
            raise BadReply(f"{len(content)} log-probabilities for {len(ids)} tokens, or of other tokens")
        return Generated(
            ids,
            [logprob_of(entry.get("logprob")) for entry in content],
            _finish(choice, ids, eos_ids),
            tuple(str(span["version"]) for span in choice.get("weight_versions") or ()),
        )

    def scoring(self, ids: Sequence[int], start: int) -> tuple[str, dict[str, Any]]:
        params = {**_NEUTRAL, "temperature": 1.0, "top_p": 1.0, "max_tokens": 1, "ignore_eos": True}
        params |= {"prompt_logprobs": 0, "detokenize": False}
        return GENERATE, {"token_ids": list(ids), "sampling_params": params, "stream": False}

    def scored(self, reply: Any, ids: Sequence[int], start: int) -> list[float]:
        rows = reply.get("prompt_logprobs") if isinstance(reply, dict) else None
        if not isinstance(rows, list) or len(rows) != len(ids):
            raise BadReply(f"log-probabilities of {len(rows or ())} of {len(ids)} tokens")
        try:
            return [logprob_of(rows[i][str(ids[i])]["logprob"]) for i in range(start, len(ids))]
        except (KeyError, TypeError) as error:
            raise BadReply(f"a token has no log-probability ({error!r})") from error

    async def checksum(self, pool: ServerPool, server: Server) -> str | None:
        if server.facts is None or "/weight_checker" not in server.facts.routes:
            return None
        reply = await command(pool, server, "/weight_checker", {"action": "checksum"})
        return hashlib.sha256(json.dumps(reply.get("checksums"), sort_keys=True).encode()).hexdigest()

    @asynccontextmanager
    async def updating(
        self, pool: ServerPool, server: Server, version: str, *, keep_running: bool
    ) -> AsyncIterator[None]:
        await command(pool, server, f"/pause?mode={'keep' if keep_running else 'wait'}", {})
        async with restored(lambda: command(pool, server, "/resume", {})):
            yield
            # States of the old weights would be continued by the new ones: those of running requests, too.
            reset = f"/reset_prefix_cache?reset_running_requests={str(keep_running).lower()}"
            reply = await command(pool, server, reset, {})
            if isinstance(reply, dict) and reply.get("success") is False:
                raise ServingError(f"{server.url}: has kept its prefix cache of older weights")
            if server.facts is not None and "/update_weight_version" in server.facts.routes:
                await command(pool, server, "/update_weight_version", {"new_version": version})
                check_weight_version(server, await self.weight_version(pool, server), version)

    async def load_weights(
        self, pool: ServerPool, server: Server, folder: Path, version: str, *, keep_running: bool
    ) -> None:
        async with self.updating(pool, server, version, keep_running=keep_running):
            await self._read(pool, server, folder)

    async def _read(self, pool: ServerPool, server: Server, folder: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await command(pool, server, "/collective_rpc", body)
        if server.facts is not None and server.facts.on_cpu:
            await command(pool, server, "/collective_rpc", {"method": "pack_tied_head"})

    async def weight_version(self, pool: ServerPool, server: Server) -> str | None:
        if server.facts is None or "/weight_info" not in server.facts.routes:
            return None
        version: str | None = (await command(pool, server, "/weight_info", None)).get("weight_version")
        return version


# Sampling fields that change nothing; a server would fill in those that are not sent.
_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "bad_words": [],
    "logit_bias": None,
    "allowed_token_ids": None,
}


def _choice(reply: Any) -> dict[str, Any]:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadReply("the reply has no response")
    choice: dict[str, Any] = choices[0]
    return choice


def _finish(choice: dict[str, Any], ids: Sequence[int], eos_ids: Collection[int]) -> Finish:
    reason, stop = choice.get("finish_reason"), choice.get("stop_reason")
    if reason == "length":
        return "length"
    # First the end token: a stop text may be part of its text.
    if reason == "stop" and ids[-1] in eos_ids:
        return "eos"
    if reason == "stop" and isinstance(stop, str):
        return "stop"
    raise BadReply(f"the response ended with {reason!r} ({stop!r})")
