"""Teachers behind a chat API: their text, in the student's tokens."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeopd.data.messages import RowError, read_message
from mergeopd.data.renderer import Renderer
from mergeopd.data.trajectory import dataset_response
from mergeopd.errors import DataError, MergeopdError
from mergeopd.messages import joined
from mergeopd.recipe.text_api import TextApi
from mergeopd.rollout.keyed import stream_key
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.serving.chat import COMPLETIONS, ChatEndpoint, ChatReply, chat_body, read_key, read_reply
from mergeopd.serving.transport import ServerPool
from mergeopd.storage.chat_replies import ApiUse, ReplyCache, add_use, total_use, use_text
from mergeopd.types import Finish, Prompt, Sampling, token_ids, token_logprobs

# Interval at which progress is reported.
_POLL_S = 0.2


def endpoint(api: TextApi) -> ChatEndpoint:
    """Return the address of an API, with the key from the environment. Raises ServingError."""
    key = "" if api.api_key_env is None else read_key(api.api_key_env)
    return ChatEndpoint(api.url, key, is_local=api.is_loopback)


@dataclass(frozen=True)
class ApiTeacher:
    """Generates text with a chat API. The first process sends the requests; all get the responses.

    Replies are kept in `text_cache` as they arrive, by the content of their requests, so that no request is
    paid for twice, whatever student learns from it. `renderer` encodes them in the student's tokens, of which
    the first `vocab_size` are valid. The tokens that the run's own requests used are added to `use_file`.
    """

    name: str
    api: TextApi
    renderer: Renderer
    vocab_size: int
    seed: int
    text_cache: Path
    use_file: Path
    run_on_first: Callable[[Callable[[], Any]], Any]
    note: Callable[[str], None]
    _caches: list[ReplyCache] = field(default_factory=list, init=False, repr=False)

    @property
    def fingerprint(self) -> str:
        """Digest of address and name: the weights behind them are not known."""
        return hashlib.sha256(f"{self.api.url}\0{self.api.model}".encode()).hexdigest()

    def num_missing(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> int:
        """Return how many requests `submit` would send, because their replies are not kept. Collective."""
        num: int = self.run_on_first(lambda: len(self._begin(requests, sampling).missing))
        return num

    def submit(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> ApiRollouts:
        """Start to ask for the responses that are not kept. Collective."""
        started: list[_Asked] = []
        self.run_on_first(lambda: started.append(self._begin(requests, sampling).start()))
        return ApiRollouts(started[0] if started else None, self.run_on_first)

    def _begin(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> _Asked:
        if not self._caches:
            slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.api.model).strip("-.")[:60]
            path = self.text_cache / f"api-{slug}-{self.fingerprint[:12]}.jsonl"
            cache = ReplyCache(path)
            if num_damaged := cache.load():
                self.note(f"discarded {num_damaged} damaged kept replies of {self.name} in {path}")
            self._caches.append(cache)
        return _Asked(self, self._caches[0], requests, sampling)

    def body(self, request: GenerationRequest, sampling: Sampling) -> dict[str, Any]:
        """Return the body of the request for a response."""
        return chat_body(
            self.api.model,
            request.messages,
            request.tools,
            sampling,
            seed=stream_key(self.seed, "", request.sample) % 2**31,
            max_tokens_field=self.api.max_tokens_field,
            max_tokens=self.api.max_tokens,
            extra=self.api.extra,
        )

    def completion(self, request: GenerationRequest, reply: ChatReply, limit: int) -> Completion:
        """Encode a reply as the student would have generated it, in at most `limit` tokens.

        Raises DataError for a reply that cannot be used.
        """
        if reply.fault is not None:
            raise DataError(reply.fault)
        try:
            message = read_message("reply", {**reply.message, "content": _text(reply)})
        except RowError as error:
            raise DataError(str(error)) from error
        response = (message,) if message.fields else message.content
        prompt = Prompt(request.key, "", "", request.messages, response=response, tools=request.tools)
        ids = dataset_response(prompt, self.renderer).ids
        finish: Finish = "stop" if reply.stop else "length" if reply.is_cut else "eos"
        if finish != "eos":
            ids = ids[:-1]  # the end token that an encoded text has
        ended = next((i for i, token in enumerate(ids, start=1) if token in self.renderer.eos_ids), None)
        if ended is not None:
            ids, finish = ids[:ended], "eos"
        if max(ids, default=0) >= self.vocab_size:
            raise DataError("with tokens that only some of the models have")
        if len(ids) > limit:
            ids, finish = ids[:limit], "length"
        return _completion(ids, finish)


@dataclass
class _Asked:
    """Requests, on the first process. `missing` are the bodies of those whose replies are not kept."""

    teacher: ApiTeacher
    cache: ReplyCache
    requests: Sequence[GenerationRequest]
    sampling: Sampling
    keys: list[str] = field(default_factory=list)
    missing: dict[str, dict[str, Any]] = field(default_factory=dict)
    used: list[ApiUse] = field(default_factory=list)
    pool: ServerPool | None = None
    future: Future[None] | None = None

    def __post_init__(self) -> None:
        for request in self.requests:
            body = self.teacher.body(request, self.sampling)
            content = json.dumps([self.teacher.api.url, body, request.sample], sort_keys=True)
            self.keys.append(hashlib.sha256(content.encode()).hexdigest()[:40])
            if self.keys[-1] not in self.cache.known:
                self.missing[self.keys[-1]] = body

    def start(self) -> _Asked:
        if self.missing:
            api = self.teacher.api
            self.pool = endpoint(api).pool(api.concurrency, api.timeout_s)
            self.future = self.pool.submit(self._ask_all(self.pool))
        return self

    async def _ask_all(self, pool: ServerPool) -> None:
        """Ask for the missing replies; after a failure, only those that are in progress are waited for."""
        rest, failures = iter(self.missing.items()), []

        async def work() -> None:
            for key, body in rest:
                try:
                    self._keep(key, await pool.request(COMPLETIONS, body, read_reply))
                except MergeopdError as error:
                    failures.append(error)
                if failures:
                    return

        num_workers = min(len(self.missing), self.teacher.api.concurrency)
        await asyncio.gather(*(work() for _ in range(num_workers)))
        if failures:
            raise failures[0]

    def _keep(self, key: str, reply: ChatReply) -> None:
        prices, tokens = self.teacher.api.prices, (reply.num_prompt, reply.num_response)
        dollars = None
        if prices is not None:
            dollars = (tokens[0] * prices.input + tokens[1] * prices.output) / 1e6
        use = ApiUse(self.teacher.name, *tokens, dollars)
        self.cache.add(key, reply)
        add_use(self.teacher.use_file, use)
        self.used.append(use)

    def wait(self, on_progress: Callable[[int], None]) -> list[Completion]:
        """Return all responses; what has arrived before an error is kept."""
        try:
            while self.future is not None:
                try:
                    self.future.result(_POLL_S)
                    break
                except TimeoutError:
                    if self.future.done():
                        raise
                on_progress(len(self.used))
        finally:
            self.close()
            for use in total_use(self.used):
                num_kept = len(self.requests) - use.num_replies
                kept = f"; {num_kept:,} more were kept" if num_kept else ""
                self.teacher.note(f"{use.teacher} gave {use_text(use)}{kept}")
        on_progress(len(self.missing))
        return self.completions()

    def close(self) -> None:
        """Cancel the requests in progress."""
        if self.future is not None and self.pool is not None:
            self.future.cancel()
            self.pool.close()
            self.future = None

    def completions(self) -> list[Completion]:
        """Encode the kept replies; one that cannot be used has no ids. They are counted in a note."""
        teacher, limit = self.teacher, self.sampling.max_new_tokens
        completions, faults, num_silent = [], Counter[str](), 0
        for request, key in zip(self.requests, self.keys, strict=True):
            reply = self.cache.known[key]
            try:
                completions.append(teacher.completion(request, reply, limit))
            except DataError as error:
                faults[str(error)] += 1
                completions.append(_completion([], "length"))
                continue
            num_silent += self._leaves_out_reasoning(reply, completions[-1])
        if faults:
            reasons = joined([f"{count} {reason}" for reason, count in faults.most_common(5)], "and")
            of = f"{faults.total()} of {len(completions)} responses of {teacher.name}"
            teacher.note(f"{of} cannot be used: {reasons}")
        if num_silent:
            teacher.note(
                f"the student's chat template leaves out the reasoning of {num_silent} responses of "
                f"{teacher.name}: they are learned without it"
            )
        return completions

    def _leaves_out_reasoning(self, reply: ChatReply, completion: Completion) -> bool:
        reasoning = str(reply.message.get("reasoning_content", "")).strip()
        if not reasoning or completion.finish == "length":
            return False
        ids = completion.response_ids.tolist()
        return reasoning not in self.teacher.renderer.tokenizer.decode(ids, skip_special_tokens=False)


def _completion(ids: Sequence[int], finish: Finish) -> Completion:
    return Completion(token_ids(ids), token_logprobs([]), finish)


def _text(reply: ChatReply) -> str:
    """The text of a reply, with the stop text that ended it, and without a character that was cut."""
    text = f"{reply.message['content']}{reply.stop or ''}"
    return text.rstrip("\ufffd") if reply.is_cut else text


@dataclass(frozen=True)
class ApiRollouts:
    """Submitted requests; `asked` is None on other processes than the first."""

    asked: _Asked | None
    run_on_first: Callable[[Callable[[], Any]], Any]

    def wait(self, on_progress: Callable[[int], None]) -> list[Completion]:
        """Return all responses; one that cannot be used has no ids. Collective.

        `on_progress` may raise, which cancels the requests.
        """
        completions: list[Completion] = self.run_on_first(lambda: self._first.wait(on_progress))
        return completions

    def cancel(self) -> None:
        """Cancel the requests in progress; replies that have arrived are kept."""
        if self.asked is not None:
            self.asked.close()

    @property
    def _first(self) -> _Asked:
        assert self.asked is not None
        return self.asked
