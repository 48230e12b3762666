"""Responses turn by turn: ids, flags and log-probs of scripted turns, limits, failures; templates of families."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizers import byte_level
from pydantic import TypeAdapter

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.data.turns import ids_between
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.environment.episodes import Environments, Response
from mergeopd.errors import DataError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.environments import Environment
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.types import Message, Prompt

# As Qwen writes calls and replies.
HERMES = """
{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.role == 'assistant' and loop.last and not message.reasoning_content %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}{{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# As Llama 3 writes: nothing behind the end token, replies as JSON text.
HEADERS = """
{%- for message in messages %}
    {{- '<|start|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end|>\\n\\n' }}
    {%- if message.tool_calls %}{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' + message.tool_calls[0].function.arguments | tojson + '}' }}
    {%- elif message.role == 'tool' %}{{- message.content | tojson }}
    {%- else %}{{- message.content | trim }}{%- endif %}{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""
# As GLM writes: the reply begins with the token that ends the turn before it, and no other token does.
OBSERVING = """
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{- '<|obs|>\\n' + message.content }}
    {%- else %}{{- '<|start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}
"""
DEAF = "{%- for m in messages if m.role != 'tool' %}{{- m.role + m.content }}{%- endfor %}"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|obs|>", "<|endoftext|>")

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6 * 7"}}\n</tool_call>'
BAD_CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expres\n</tool_call>'
PROMPT = Prompt("s:0", "s", "d", (Message("user", "6 times 7?"),))


@pytest.fixture(scope="module")
def make_renderer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Renderer]:
    """Every byte a token."""
    folder = tmp_path_factory.mktemp("bytes")
    backend = byte_level()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.load(folder)

    def make(template: str = HERMES, ends: Sequence[str] = ("<|im_end|>", "<|endoftext|>")) -> Renderer:
        compiled = ChatTemplate(template, tokenizer.special_tokens, name="t.jinja")
        eos = tuple(tokenizer.encode(end)[0] for end in ends)
        return Renderer(tokenizer, compiled, tokenizer.vocab_size, eos, 8192)

    return make


class Script:
    """Generates given turns; the log-prob of the n-th token of a turn is -n - 100 x turn, its version 4 + turn."""

    def __init__(self, renderer: Renderer, turns: Sequence[str]) -> None:
        self.renderer, self.turns = renderer, turns
        self.requests: list[list[GenerationRequest]] = []

    def __call__(self, requests: Sequence[GenerationRequest], which: str) -> list[Completion]:
        text = self.turns[len(self.requests)]
        self.requests.append(list(requests))
        ids = self.renderer.tokenizer.encode(text)
        finish = "eos" if ids[-1] in self.renderer.eos_ids else "length"
        logprobs = -np.arange(len(ids), dtype=np.float64) - 100 * len(self.requests)
        version = 4 + len(self.requests)  # servers get new weights between turns
        return [Completion(ids, logprobs, finish, version) for _ in requests]  # type: ignore[arg-type]


def play(renderer: Renderer, *turns: str, **settings: Any) -> tuple[Response, Script]:
    spec = TypeAdapter(Environment).validate_python({"kind": "calculator", **settings})
    environments = Environments.of({"s": spec}, (), 1, SingleProcess())
    script = Script(renderer, turns)
    (response,) = environments.play([(PROMPT, 3)], renderer, script)
    environments.close()
    return response, script


def runs(renderer: Renderer, response: Response) -> list[tuple[bool, str]]:
    """Runs of equal flags, decoded."""
    pieces: list[tuple[bool, list[int]]] = []
    for i, own in zip(response.completion.response_ids.tolist(), response.trained.tolist(), strict=True):
        if not pieces or pieces[-1][0] != own:
            pieces.append((own, []))
        pieces[-1][1].append(i)
    return [(own, renderer.tokenizer.decode(ids, skip_special_tokens=False)) for own, ids in pieces]


def test_replies_of_tools_are_between_turns_and_not_trained(make_renderer: Callable[..., Renderer]) -> None:
    renderer = make_renderer()
    response, script = play(renderer, f"Let me see.{CALL}<|im_end|>", "It is 42.<|im_end|>")
    between = "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert runs(renderer, response) == [
        (True, f"Let me see.{CALL}<|im_end|>"),
        (False, between),
        (True, "It is 42.<|im_end|>"),
    ]
    logprobs, trained = response.completion.logprobs, response.trained
    num_first = len(renderer.tokenizer.encode(f"Let me see.{CALL}<|im_end|>"))
    assert logprobs[trained].tolist() == [
        *(-n - 100.0 for n in range(num_first)),
        *(-n - 200.0 for n in range(10)),
    ]
    assert response.completion.policy_version == 5
    assert renderer.tokenizer.decode(response.final_ids.tolist()) == "It is 42."
    episode = response.episode
    assert episode is not None
    assert (episode.num_turns, episode.num_calls, episode.num_failed_calls) == (2, 1, 0)
    assert [(m.role, m.content) for m in episode.messages] == [
        ("assistant", "Let me see."),
        ("tool", "42"),
        ("assistant", "It is 42."),
    ]
    # The second turn continues the ids of the first, under another random stream.
    first, second = (one[0] for one in script.requests)
    assert second.prompt_ids.tolist()[: len(first.prompt_ids)] == first.prompt_ids.tolist()
    assert (first.key, second.key, second.sample) == ("s:0", "s:0#turn2", 3)
    assert '"calculator"' in renderer.tokenizer.decode(first.prompt_ids.tolist())


def test_the_ids_are_those_of_the_whole_conversation(make_renderer: Callable[..., Renderer]) -> None:
    """Where the template does not change earlier turns, the text equals one rendering."""
    renderer = make_renderer(HEADERS)
    call = '{"name": "calculator", "parameters": {"expression": "6 * 7"}}'
    response, _ = play(renderer, f"{call}<|im_end|>", "42<|im_end|>")
    assert response.episode is not None
    ids = [*response.prompt_ids.tolist(), *response.completion.response_ids.tolist()]
    conversation = (*response.prompt.messages, *response.episode.messages)
    assert renderer.tokenizer.decode(ids, skip_special_tokens=False) == renderer.template.render(
        conversation, tools=response.prompt.tools, add_generation_prompt=False
    )


def test_a_turn_that_ends_with_the_first_token_of_the_reply(make_renderer: Callable[..., Renderer]) -> None:
    renderer = make_renderer(OBSERVING, ("<|obs|>", "<|endoftext|>"))
    call = '{"name": "calculator", "arguments": {"expression": "6 * 7"}}'
    response, _ = play(renderer, f"{call}<|obs|>", "42<|endoftext|>")
    assert runs(renderer, response)[1] == (False, "\n42<|start|>assistant\n")


def test_a_call_that_is_not_json_is_told_to_the_model(make_renderer: Callable[..., Renderer]) -> None:
    renderer = make_renderer()
    response, _ = play(renderer, f"{BAD_CALL}<|im_end|>", f"{CALL}<|im_end|>", "42<|im_end|>")
    assert response.episode is not None
    assert "Error: tool call 1 is not JSON" in runs(renderer, response)[1][1]
    assert (response.episode.num_calls, response.episode.num_failed_calls) == (2, 1)


@pytest.mark.parametrize(
    ("turns", "settings", "num_turns"),
    [
        ([f"{CALL}<|im_end|>"] * 2, {"max_turns": 2}, 2),
        ([f"{CALL}<|im_end|>"] * 3, {"max_tokens": 200}, 2),
        (["A long turn"], {}, 1),
    ],
    ids=["turns", "tokens", "a turn"],
)
def test_limits_truncate_behind_a_turn(
    make_renderer: Callable[..., Renderer], turns: list[str], settings: dict, num_turns: int
) -> None:
    renderer = make_renderer()
    response, script = play(renderer, *turns, **settings)
    assert response.completion.finish == "length"
    assert response.episode is not None
    assert response.episode.num_turns == len(script.requests) == num_turns
    assert response.trained[-1]
    assert len(response.completion.response_ids) <= settings.get("max_tokens", 4096)


def test_a_template_without_tools_is_an_error(make_renderer: Callable[..., Renderer]) -> None:
    calls = [{"function": {"name": "f", "arguments": {}}}]
    turn = Message("assistant", "", {"role": "assistant", "content": "", "tool_calls": calls})
    with pytest.raises(DataError, match=r"t\.jinja: leaves out replies of tools"):
        ids_between(PROMPT, [turn], [Message("tool", "1")], 0, make_renderer(DEAF))


def test_prompts_without_an_environment_have_one_turn(make_renderer: Callable[..., Renderer]) -> None:
    renderer = make_renderer()
    script = Script(renderer, [f"{CALL}<|im_end|>"])
    (response,) = Environments.of({}, (), 1, SingleProcess()).play([(PROMPT, 0)], renderer, script)
    assert response.episode is None
    assert response.trained is None


def test_a_failing_environment_ends_the_response(
    make_renderer: Callable[..., Renderer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_tools.py").write_text("import os\ndef end(a: int) -> str:\n    os._exit(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    renderer, path = make_renderer(), "bad_tools:end"
    spec = TypeAdapter(Environment).validate_python({"kind": "functions", "functions": [path]})
    environments = Environments.of({"s": spec}, (path,), 1, SingleProcess())
    script = Script(renderer, ['<tool_call>{"name": "end", "arguments": {"a": 1}}</tool_call><|im_end|>'])
    (response,) = environments.play([(PROMPT, 0)], renderer, script)
    environments.close()
    assert response.episode is not None
    assert response.episode.failure == "the environment ended its process"
    assert response.trained.all()


@pytest.mark.parametrize("gives_reward", [True, False])
def test_the_environment_of_the_documentation(
    make_renderer: Callable[..., Renderer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gives_reward: bool,
) -> None:
    """Its reward counts where the recipe says that there is one."""
    page = (Path(__file__).parents[3] / "docs" / "agents.md").read_text(encoding="utf-8")
    (code,) = (block.split("```")[0] for block in page.split("```python\n")[1:])
    (tmp_path / "games.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    guess = '<tool_call>{"name": "guess", "arguments": {"number": %d}}</tool_call><|im_end|>'
    path, renderer = "games:Guess", make_renderer()
    settings = {"kind": "user", "environment": path, "gives_reward": gives_reward}
    environments = Environments.of(
        {"s": TypeAdapter(Environment).validate_python(settings)}, (path,), 1, SingleProcess()
    )
    script = Script(renderer, [guess % 5, guess % 7, "It is 7.<|im_end|>"])
    (response,) = environments.play([(replace(PROMPT, reference="7"), 0)], renderer, script)
    environments.close()
    assert response.episode is not None
    assert [m.content for m in response.episode.messages if m.role == "tool"] == ["higher", "correct"]
    assert response.episode.reward == (1.0 if gives_reward else None)
