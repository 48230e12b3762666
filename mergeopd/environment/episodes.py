"""Generate responses turn by turn, with the tools of an environment between the turns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mergeopd.data.renderer import Renderer
from mergeopd.data.turns import ids_between, parse_turn, turn_message, turn_text
from mergeopd.distributed.communicator import Communicator
from mergeopd.environment.pool import EnvironmentPool, Request
from mergeopd.errors import DataError
from mergeopd.recipe.environments import Environment, gives_reward
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.tool_calls import ParsedTurn
from mergeopd.types import Episode, Finish, Flags, Message, Prompt, Routes, TokenIds, token_flags, token_ids

Generate = Callable[[Sequence[GenerationRequest], str], list[Completion]]
"""Generates one turn of every request; the text describes the turn for the display."""


@dataclass(frozen=True, slots=True)
class Response:
    """A finished response: what `Rollout` has of it. `prompt` contains what the environment has added."""

    prompt: Prompt
    prompt_ids: TokenIds
    completion: Completion
    trained: Flags | None = None
    episode: Episode | None = None

    @property
    def final_ids(self) -> TokenIds:
        """The ids that a verifier grades."""
        return self.completion.response_ids if self.episode is None else self.episode.final_ids


@dataclass
class Environments:
    """The environments of sources, by source. The first process runs them for all."""

    settings: Mapping[str, Environment]
    pool: EnvironmentPool
    ranks: Communicator

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Environment],
        allow_code: Collection[str],
        num_workers: int,
        ranks: Communicator,
    ) -> Environments:
        return cls(settings, EnvironmentPool(settings, allow_code, num_workers), ranks)

    def play(
        self,
        prompts: Sequence[tuple[Prompt, int]],
        renderer: Renderer,
        generate: Generate,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> list[Response]:
        """Generate responses to prompts, each with its sample number, in order. Collective.

        Prompts of sources without an environment have one turn. `on_progress` may raise to leave.
        """
        played = [_Played(prompt, sample, renderer) for prompt, sample in prompts]
        self._begin([one for one in played if one.prompt.source in self.settings], on_progress)
        turn = 1
        while going := [one for one in played if one.is_open]:
            completions = generate([one.request for one in going], "" if turn == 1 else f", turn {turn}")
            for one, completion in zip(going, completions, strict=True):
                one.add_turn(completion)
            self._step([one for one in going if one.is_waiting], on_progress)
            turn += 1
        ended = [one.number for one in played if one.number is not None]
        if ended:
            self.ranks.run_on_first(lambda: self.pool.end(ended))
        return [one.response for one in played]

    def close(self) -> None:
        """End the processes. They start again when needed."""
        self.pool.close()

    def _begin(self, played: Sequence[_Played], on_progress: Callable[[int], None]) -> None:
        if not played:
            return
        for one, number in zip(played, self.pool.new_episodes(len(played)), strict=True):
            one.begin(number, self.settings[one.prompt.source])
        requests = [
            one.ask(op="reset", source=one.prompt.source, row=prompt_row(one.prompt)) for one in played
        ]
        for one, answer in zip(played, self._run(requests, on_progress), strict=True):
            one.open_with(answer)

    def _step(self, played: Sequence[_Played], on_progress: Callable[[int], None]) -> None:
        if played:
            requests = [
                one.ask(op="step", calls=[asdict(call) for call in one.turn.calls], content=one.turn.content)
                for one in played
            ]
            for one, answer in zip(played, self._run(requests, on_progress), strict=True):
                one.add_replies(answer)

    def _run(self, requests: Sequence[Request], on_progress: Callable[[int], None]) -> list[dict[str, Any]]:
        return self.ranks.run_on_first(lambda: self.pool.run(requests, on_progress))


def opened(prompt: Prompt, opening: Mapping[str, Any]) -> Prompt:
    """Add the messages and tools with which an environment begins, except for tools that the prompt has."""
    tools = [*prompt.tools, *(tool for tool in opening["tools"] if tool not in prompt.tools)]
    messages = (*prompt.messages, *map(_message, opening["messages"]))
    return replace(prompt, messages=messages, tools=tuple(tools))


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as environments get it."""
    return {
        "key": prompt.key,
        "domain": prompt.domain,
        "messages": [dict(m.fields) or {"role": m.role, "content": m.content} for m in prompt.messages],
        "reference": prompt.reference,
        "tools": list(prompt.tools),
    }


@dataclass
class _Played:
    """A response in progress."""

    prompt: Prompt
    sample: int
    renderer: Renderer
    number: int | None = None
    is_open: bool = True
    is_waiting: bool = False
    turn: ParsedTurn = field(default_factory=lambda: ParsedTurn("", ()))
    _settings: Environment | None = None
    # The tokens of turns, and those between them.
    _ids: list[TokenIds] = field(default_factory=list)
    _trained: list[Flags] = field(default_factory=list)
    _logprobs: list[Any] = field(default_factory=list)
    _messages: list[Message] = field(default_factory=list)
    _final_ids: TokenIds = field(default_factory=lambda: token_ids([]))
    _finish: Finish = "length"
    _version: int = 0
    _routes: Routes | None = None  # the last turn was generated from the whole text before
    _counts: dict[str, int] = field(
        default_factory=lambda: {"num_turns": 0, "num_calls": 0, "num_failed_calls": 0}
    )
    _reward: float | None = None
    _failure: str | None = None

    @property
    def request(self) -> GenerationRequest:
        num = self._counts["num_turns"]
        key = self.prompt.key if not num else f"{self.prompt.key}#turn{num + 1}"
        ids = self._prompt_ids if not self._ids else np.concatenate([self._prompt_ids, *self._ids])
        messages = (*self.renderer.teacher_prompt.messages(self.prompt), *self._messages)
        return GenerationRequest(key, self.sample, ids, messages, self.prompt.tools)

    @property
    def response(self) -> Response:
        """The finished response."""
        logprobs = _joined(self._logprobs) if self._logprobs else np.zeros(0, np.float32)
        ids = _joined(self._ids) if self._ids else token_ids([])
        completion = Completion(ids, logprobs, self._finish, self._version, self._routes)
        if self._settings is None:
            return Response(self.prompt, self._prompt_ids, completion)
        episode = Episode(
            tuple(self._messages), self._final_ids, **self._counts, reward=self._reward, failure=self._failure
        )
        trained = _joined(self._trained) if self._trained else token_flags([])
        return Response(self.prompt, self._prompt_ids, completion, trained, episode)

    @property
    def _prompt_ids(self) -> TokenIds:
        return self.renderer.render(self.prompt)

    @property
    def _last_id(self) -> int:
        return next(int(part[-1]) for part in reversed(self._ids) if len(part))

    @property
    def _num_ids(self) -> int:
        return sum(map(len, self._ids))

    def begin(self, number: int, settings: Environment) -> None:
        self.number, self._settings = number, settings

    def ask(self, **content: Any) -> Request:
        assert self.number is not None
        return Request(self.number, self.prompt.source, content)

    def open_with(self, answer: Mapping[str, Any]) -> None:
        """Add the environment's messages and tools to the prompt."""
        if "failure" in answer:
            self._fail(answer["failure"])
            return
        self.prompt = opened(self.prompt, answer)

    def add_turn(self, completion: Completion) -> None:
        """Add a turn that was generated; `is_waiting` where the environment has to reply."""
        room = len(completion.response_ids)
        if self._settings is not None:
            room = self._settings.max_tokens - self._num_ids
        ids = completion.response_ids[:room]
        self._ids.append(ids)
        self._trained.append(np.ones(len(ids), bool))
        if len(completion.logprobs):
            self._logprobs.append(completion.logprobs[:room])
        self._final_ids = ids
        self._finish = completion.finish if len(ids) == len(completion.response_ids) else "length"
        first = not self._counts["num_turns"]
        version = completion.policy_version
        self._routes = completion.routes
        self._version = version if first else min(self._version, version)  # of the oldest tokens
        self._counts["num_turns"] += 1
        if self._settings is None or self._finish == "length":
            self.is_open = self.is_waiting = False
            return
        text = turn_text(ids, self.renderer)
        self.turn = parse_turn(text)
        self._counts["num_calls"] += len(self.turn.calls) + len(self.turn.problems)
        self._counts["num_failed_calls"] += len(self.turn.problems)
        self._messages.append(turn_message(self.turn, text))
        self.is_waiting = True

    def add_replies(self, answer: Mapping[str, Any]) -> None:
        """Add the environment's replies to the last turn, or end the response."""
        self.is_waiting = False
        if "failure" in answer:
            self._fail(answer["failure"])
            return
        self._counts["num_failed_calls"] += answer["num_failed"]
        if gives_reward(self._settings) and answer["reward"] is not None:
            self._reward = answer["reward"]
        problems = [{"role": "tool", "content": f"Error: {problem}"} for problem in self.turn.problems]
        replies = [_message(one) for one in (*problems, *answer["messages"])]
        if answer["done"] or not replies:
            self.is_open = False
            return
        assert self._settings is not None
        try:
            between = ids_between(self.prompt, self._messages, replies, self._last_id, self.renderer)
        except DataError as error:
            self._fail(str(error))
            return
        is_full = self._num_ids + len(between) >= self._settings.max_tokens
        if is_full or self._counts["num_turns"] >= self._settings.max_turns:
            self.is_open, self._finish = False, "length"
            return
        self._messages += replies
        self._ids.append(token_ids(between))
        self._trained.append(np.zeros(len(between), bool))
        if self._logprobs:
            self._logprobs.append(np.zeros(len(between), self._logprobs[0].dtype))

    def _fail(self, reason: str) -> None:
        self.is_open, self._failure = False, reason


def _joined(parts: Sequence[Any]) -> Any:
    """Concatenate arrays; one alone is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _message(fields: Mapping[str, Any]) -> Message:
    is_plain = fields.keys() == {"role", "content"}
    return Message(fields["role"], fields.get("content") or "", {} if is_plain else fields)
