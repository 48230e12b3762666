"""Ask the servers of teachers whether they can be used: version, features, vocabulary, equal replicas.

Imported only where a recipe has served teachers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import httpx2
import numpy as np

from mergeopd.config.tree import Keys
from mergeopd.data.canary import sample_ids
from mergeopd.data.renderer import Renderer
from mergeopd.errors import ServingError
from mergeopd.models.facts import ModelFacts
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.recipe.served import Served
from mergeopd.serving.protocol import ServerFacts, command
from mergeopd.serving.scoring import (
    POOLING_FLAGS,
    Exchange,
    Floats,
    ScoringApi,
    scoring_api,
    send_to,
)
from mergeopd.serving.transport import BadReply, Refused, Server, ServerPool, described
from mergeopd.teacher.protocol import TargetSpec

T = TypeVar("T")

# Token ids that are decoded by one request.
_RANGE = 4096
# Times that one sequence is sent to each server.
_REPEATS = 3
# Largest differences between replies about one sequence: bfloat16 explains a few hundredths of a nat, and
# about 1% of the length of a hidden state.
_SPREAD_NATS, _SPREAD_HIDDEN = 0.1, 0.05
_TIMEOUT_S = 60.0
_ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}


@dataclass(frozen=True)
class Sample:
    """A sequence that servers score: the card's sample, or any text. `logprobs` are the card's, if any."""

    ids: Sequence[int]
    start: int
    logprobs: Sequence[float] | None


@dataclass
class ServerProbe:
    """The probe of one teacher's servers. Problems are added to `findings`, below `place` (its card)."""

    findings: Findings
    place: Keys
    teacher: TeacherPlan
    renderer: Renderer
    num_valid: int
    specs: Sequence[TargetSpec]
    _failed: bool = field(default=False, init=False)

    @property
    def served(self) -> Served:
        """The section of the card."""
        assert self.teacher.served is not None
        return self.teacher.served

    def run(self) -> Renderer:
        """Ask all servers; return the renderer with the servers' context, if that is shorter."""
        pool = ServerPool(self.served.url, max_running=_REPEATS, timeout_s=_TIMEOUT_S)
        try:
            return pool.run(self._run(pool))
        finally:
            pool.close()

    async def _run(self, pool: ServerPool) -> Renderer:
        facts = await asyncio.gather(*(self._facts(pool, server) for server in pool.servers))
        if self._failed:
            return self.renderer
        await asyncio.gather(*(self._vocabulary(pool, server) for server in pool.servers))
        if not self._failed:
            await self._scores(pool)
        # A generating server keeps a place for one more token.
        limits = [one.max_tokens - 1 for one in facts if one is not None and one.max_tokens is not None]
        shortest = min([self.renderer.max_positions, *limits])
        if shortest < self.renderer.max_positions:
            self.findings.notes.append(
                f"teacher '{self.teacher.name}' reads at most {shortest} tokens, because of its servers; its "
                f"model has a context of {self.renderer.max_positions}"
            )
        return replace(self.renderer, max_positions=shortest)

    def _api(self, engine: str) -> ScoringApi:
        return scoring_api(engine, hidden_states=self.served.hidden_states)

    async def _facts(self, pool: ServerPool, server: Server) -> ServerFacts | None:
        try:
            return await self._api(self.served.engine).facts(pool, server)
        except ServingError as error:
            other = next(engine for engine in _ENGINES if engine != self.served.engine)
            if await self._is(other, pool, server):
                message = f"{server.url}: the server is {_ENGINES[other]}, not {_ENGINES[self.served.engine]}"
                self._report("engine", message, f"write `engine: {other}`")
            else:
                self._report("url", str(error))
            return None

    async def _is(self, engine: str, pool: ServerPool, server: Server) -> bool:
        path = "/version" if engine == "vllm" else "/server_info"
        try:
            return "version" in (await command(pool, server, path, None, timeout_s=_TIMEOUT_S) or {})
        except ServingError:
            return False

    async def _vocabulary(self, pool: ServerPool, server: Server) -> None:
        """Compare the texts of all ids: a server that scores ids does not show what they mean to it."""
        path, key = self._api(self.served.engine).detokenize

        async def differs(ids: range) -> bool:
            reply = await pool.call(server, path, {"tokens": list(ids), "skip_special_tokens": False})
            text = reply.get(key) if isinstance(reply, dict) else None
            if not isinstance(text, str):
                raise BadReply(f"{path} returns no text")
            return _letters(text) != _letters(self.renderer.tokenizer.decode(ids, skip_special_tokens=False))

        async def first_difference() -> int | None:
            starts = range(0, self.num_valid, _RANGE)
            ranges = [range(start, min(start + _RANGE, self.num_valid)) for start in starts]
            outcomes = await asyncio.gather(*(differs(ids) for ids in ranges))
            ids = next((ids for ids, bad in zip(ranges, outcomes, strict=True) if bad), None)
            while ids is not None and len(ids) > 1:
                half = len(ids) // 2
                ids = ids[:half] if await differs(ids[:half]) else ids[half:]
            return None if ids is None else ids[0]

        first = await self._attempt("url", server, first_difference)
        if first is not None:
            text = self.renderer.tokenizer.decode([first], skip_special_tokens=False)
            self._report(
                "url",
                f"{server.url}: the server has another vocabulary: token {first} is not {text!r} there",
                "serve the model of the card",
            )

    async def _scores(self, pool: ServerPool) -> None:
        """Ask for every kind of score that a phase needs, and compare the replicas."""
        api, sample = self._api(self.served.engine), self._sample()
        if self.served.hidden_states:
            width = ModelFacts.read(self.teacher.folder, "any").hidden_size
            states = await self._replies(pool, lambda: api.hidden(sample.ids, width), _hidden_flags(api))
            self._check_spread(states, "hidden states", "of their length", _SPREAD_HIDDEN, relative=True)
            return
        num_more = ModelFacts.read(self.teacher.folder, "any").vocab_rows - self.num_valid
        if num_more > 0:
            self.findings.notes.append(
                f"the servers of teacher '{self.teacher.name}' return log-probabilities over {num_more} rows "
                "more than the ids that are compared; their probability counts to the tail of a support"
            )
        given = await self._replies(pool, lambda: api.given(sample.ids, sample.start), "")
        self._check_spread(given, "log-probabilities", "nats per token", _SPREAD_NATS, relative=False)
        for kind, k in sorted({(spec.kind, spec.k) for spec in self.specs if spec.k is not None}):
            if kind == "top_k":
                await self._replies(
                    pool,
                    lambda k=k: api.likely(sample.ids, sample.start, min(k, self.num_valid)),  # type: ignore[misc]
                    f"start it with --max-logprobs {k} or more",
                    repeats=1,
                )
            elif kind == "student_top_k":
                rows = [list(range(min(k, self.num_valid - 1) + 1))] * (len(sample.ids) - sample.start)
                await self._replies(
                    pool,
                    lambda rows=rows: api.chosen(sample.ids, sample.start, rows),  # type: ignore[misc]
                    f"log-probabilities at the student's top k need vLLM 0.32 or newer, started with the "
                    f"environment variable VLLM_USE_V2_MODEL_RUNNER=1 and --max-logprobs {k + 1} or more",
                    repeats=1,
                )
        if sample.logprobs is not None and given and not self._failed:
            self._check_canary(given[0], sample.logprobs)

    async def _replies(
        self, pool: ServerPool, make: Callable[[], Exchange[T]], remedy: str, repeats: int = _REPEATS
    ) -> list[T]:
        """Send a request several times to each server; report the failure of any."""
        asked = [
            self._attempt("url", server, lambda server=server: send_to(pool, server, make()), remedy)  # type: ignore[misc]
            for server in pool.servers
            for _ in range(repeats)
        ]
        return [reply for reply in await asyncio.gather(*asked) if reply is not None]

    async def _attempt(
        self, key: str, server: Server, work: Callable[[], Awaitable[T]], remedy: str = ""
    ) -> T | None:
        try:
            return await work()
        except (httpx2.HTTPError, BadReply, Refused) as error:
            self._report(key, f"{server.url}: {described(error)}", remedy)
            return None

    def _check_spread(
        self, replies: Sequence[Floats], what: str, unit: str, bound: float, *, relative: bool
    ) -> None:
        if self._failed or not replies:
            return
        first = replies[0].astype(np.float64)
        gaps = [
            float(np.linalg.norm(other - first) / np.linalg.norm(first))
            if relative
            else float(np.abs(other - first).mean())
            for other in replies
        ]
        if max(gaps) > bound:
            self._report(
                "url",
                f"the same sequence gets {what} that differ by {max(gaps):.2g} {unit} between requests "
                f"(at most {bound:g}): the servers do not have equal weights, or one does not compute well",
                "serve the same weights at every url",
            )

    def _check_canary(self, given: Floats, logprobs: Sequence[float]) -> None:
        gap = float(np.abs(given - np.array(logprobs)).mean()) if len(given) == len(logprobs) else np.inf
        if not gap <= _SPREAD_NATS:
            self._report(
                "url",
                "the servers do not have the model that the card describes: the log-probabilities of the "
                f"card's sample are off by {gap:.2f} nats per token (rounding: at most {_SPREAD_NATS})",
                "serve the model of the card, or write the card again with mergeopd new teacher",
            )

    def _sample(self) -> Sample:
        canary = self.teacher.canary
        if canary is not None:
            prompt, response = sample_ids(self.renderer, canary.prompt, canary.response)
            return Sample([*prompt, *response], len(prompt), canary.logprobs)
        prompt, response = sample_ids(self.renderer, "What is 12 x 12?", "12 x 12 = 144.")
        return Sample([*prompt, *response], len(prompt), None)

    def _report(self, key: str, message: str, remedy: str = "") -> None:
        self._failed = True
        self.findings.report((*self.place, "served", key), message, remedy)


def _letters(text: str) -> str:
    """Return the text without whitespace, which some decoders clean up."""
    return "".join(text.split())


def _hidden_flags(api: ScoringApi) -> str:
    flags = POOLING_FLAGS if api.name == "vllm" else "--enable-return-hidden-states"
    return f"start it with {flags}"
