"""SGLang's server: `/generate` with token ids in and out, and weights from a folder.

Facts by version: SGLang's `srt/managers/io_struct.py` and `srt/entrypoints/http_server.py`.
"""

from __future__ import annotations

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

GENERATE = "/generate"
_OLDEST = (0, 5, 9)
_FACTS_S = 20.0
# Tokens per nucleus: SGLang returns the log-probabilities of truncated distributions for a finite top k, up
# to its --sampling-mask-max-tokens.
NUCLEUS_TOP_K = 1024


@dataclass(frozen=True, slots=True)
class SglangApi:
    """Requests and replies of SGLang. `transfer`: how the server gets weights, if not from a folder."""

    transfer: Transfer | None = None

    async def facts(self, pool: ServerPool, server: Server) -> ServerFacts:
        with replies_of(server, "SGLang"):
            return await self._facts(pool, server)

    async def _facts(self, pool: ServerPool, server: Server) -> ServerFacts:
        info = await command(pool, server, "/server_info", None, timeout_s=_FACTS_S)
        version = str(info.get("version", ""))
        check_version(server, "SGLang", version, _OLDEST)
        document = await command(pool, server, "/openapi.json", None, timeout_s=_FACTS_S)
        models = await command(pool, server, "/v1/models", None, timeout_s=_FACTS_S)
        limit = models["data"][0].get("max_model_len")
        routes = frozenset(document.get("paths", ()))
        num_workers = int(info.get("tp_size") or 1)
        if self.transfer and (info.get("pp_size") or 1, info.get("dp_size") or 1) != (1, 1):
            raise ServingError(
                f"{server.url}: has pipeline or data parallelism, with which weights arrive through a folder "
                "only; start one server for each replica, or write `sync: {method: folder}`"
            )
        path = info.get("model_path")
        server.facts = facts = ServerFacts(version, routes, limit, path, num_workers=num_workers)
        return facts

    def generation(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        eos_ids: Collection[int],
        banned: Collection[int],
    ) -> tuple[str, dict[str, Any]]:
        is_cut = sampling.top_p < 1.0
        params = {
            **_NEUTRAL,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": NUCLEUS_TOP_K if is_cut else -1,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(eos_ids),
            "logit_bias": {str(i): BANNED for i in banned} or None,
            "no_stop_trim": True,
        }
        body: dict[str, Any] = {"input_ids": list(prompt_ids), "sampling_params": params, "stream": False}
        body |= {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 0}
        if is_cut:  # other log-probabilities are of the distribution before truncation
            body |= {"return_sampling_mask": True, "sampling_logprobs_mode": "selected"}
        return GENERATE, body

    def generated(self, reply: Any, sampling: Sampling, eos_ids: Collection[int]) -> Generated:
        ids, meta = _parts(reply)
        entries = meta.get("output_token_logprobs")
        if not isinstance(entries, list) or [entry[1] for entry in entries] != ids:
            raise BadReply(
                f"{len(entries or ())} log-probabilities for {len(ids)} tokens, or of other tokens"
            )
        values = [entry[0] for entry in entries]
        if sampling.top_p < 1.0:
            if "output_token_sampling_logprobs" not in meta:  # older servers ignore the request for them
                raise ServingError(
                    "the server returns no log-probabilities of truncated distributions; update it to SGLang "
                    "0.5.18 or newer, or sample with `top_p: 1`"
                )
            values = meta["output_token_sampling_logprobs"]
            if len(values) != len(ids):
                raise BadReply(f"{len(values)} truncated log-probabilities for {len(ids)} tokens")
        spans = meta.get("weight_versions")
        versions = [s["version"] for s in spans] if spans else [meta.get("weight_version")]
        return Generated(
            ids,
            [logprob_of(value) for value in values],
            _finish(meta.get("finish_reason"), ids, eos_ids),
            tuple(str(version) for version in versions if version is not None),
        )

    def scoring(self, ids: Sequence[int], start: int) -> tuple[str, dict[str, Any]]:
        params = {**_NEUTRAL, "max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0, "top_k": -1}
        body = {"input_ids": list(ids), "sampling_params": params, "stream": False, "return_logprob": True}
        return GENERATE, {**body, "logprob_start_len": max(start - 1, 0), "top_logprobs_num": 0}

    def scored(self, reply: Any, ids: Sequence[int], start: int) -> list[float]:
        meta = reply.get("meta_info") if isinstance(reply, dict) else None
        entries = (meta or {}).get("input_token_logprobs")
        wanted = list(ids[start:])
        own = entries[-len(wanted) :] if isinstance(entries, list) else []
        # SGLang shows the last id of a vocabulary as 0; its log-probability is right.
        if len(own) != len(wanted) or any(e[1] not in (i, 0) for e, i in zip(own, wanted, strict=True)):
            raise BadReply(f"{len(entries or ())} log-probabilities for {len(wanted)} tokens, or of others")
        return [logprob_of(entry[0]) for entry in own]

    async def checksum(self, pool: ServerPool, server: Server) -> str | None:
        if server.facts is None or "/weights_checker" not in server.facts.routes:
            return None
        reply = await command(pool, server, "/weights_checker", {"action": "checksum"})
        digest: str | None = reply.get("per_engine_checksum")
        return digest

    @asynccontextmanager
    async def updating(
        self, pool: ServerPool, server: Server, version: str, *, keep_running: bool
    ) -> AsyncIterator[None]:
        if not keep_running:  # the request that updates waits for those that run
            yield
        else:
            # They return to the queue, and their states are computed again with the new weights.
            await command(pool, server, "/pause_generation", {"mode": "retract"})
            async with restored(lambda: command(pool, server, "/continue_generation", {})):
                yield
        check_weight_version(server, await self.weight_version(pool, server), version)

    async def load_weights(
        self, pool: ServerPool, server: Server, folder: Path, version: str, *, keep_running: bool
    ) -> None:
        async with self.updating(pool, server, version, keep_running=keep_running):
            await self._read(pool, server, folder, version)

    async def _read(self, pool: ServerPool, server: Server, folder: Path, version: str) -> None:
        body = {"model_path": str(folder), "weight_version": version, "flush_cache": True}
        await confirmed(pool, server, "/update_weights_from_disk", body)

    async def weight_version(self, pool: ServerPool, server: Server) -> str | None:
        version: str | None = (await command(pool, server, "/model_info", None)).get("weight_version")
        return version


async def confirmed(pool: ServerPool, server: Server, path: str, body: object) -> None:
    """Send a command about weights. Raises ServingError unless the server says that it succeeded."""
    reply = await command(pool, server, path, body)
    if not isinstance(reply, dict) or reply.get("success") is not True:
        reason = reply.get("message") if isinstance(reply, dict) else reply
        raise ServingError(f"{server.url}{path}: refused the weights: {reason}")


# Sampling fields that change nothing; a server would fill in those that are not sent.
_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "ignore_eos": False,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": True,
    "stop": [],
    "stop_token_ids": [],
}


def _parts(reply: Any) -> tuple[list[int], dict[str, Any]]:
    if not isinstance(reply, dict) or not isinstance(reply.get("meta_info"), dict):
        raise BadReply("the reply has no response")
    return ids_of(reply.get("output_ids")), reply["meta_info"]


def _finish(reason: Any, ids: Sequence[int], eos_ids: Collection[int]) -> Finish:
    kind, matched = (
        (reason.get("type"), reason.get("matched")) if isinstance(reason, dict) else (reason, None)
    )
    if kind == "length":
        return "length"
    # First the end token: a stop text may be part of its text.
    if kind == "stop" and ids[-1] in eos_ids:
        return "eos"
    if kind == "stop" and isinstance(matched, str):
        return "stop"
    if kind == "stop":
        # SGLang has no way to end responses at the recipe's tokens only.
        raise ServingError(
            f"the server ends responses at token {ids[-1]}, an end token of its model but not of the recipe; "
            "add it to `student.end_tokens`, or use `engine: vllm`"
        )
    raise BadReply(f"the response ended with {reason!r}")
