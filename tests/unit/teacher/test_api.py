"""Text of a chat API: what is sent, replies in the student's tokens, repeated requests, kept replies, cost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizers import byte_level
from chat_server import ChatServer, Reply, completion
from pydantic import TypeAdapter

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.environment.episodes import Environments
from mergeopd.errors import ServingError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.environments import EnvironmentOrKind
from mergeopd.recipe.text_api import TextApi
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.serving import transport
from mergeopd.serving.chat import wire_messages
from mergeopd.storage.chat_replies import read_use
from mergeopd.teacher.api import ApiTeacher
from mergeopd.types import Message, Prompt, Sampling, token_ids

KEY = "sk-test-0123456789"
SAMPLING = Sampling()
# As Qwen3 writes: reasoning in a block, calls behind the text.
QWEN = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
PLAIN = QWEN.replace("{%- if message.reasoning_content %}", "{%- if false %}")
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module")
def make_renderer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Renderer]:
    folder = tmp_path_factory.mktemp("bytes")
    backend = byte_level()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.load(folder)

    def make(template: str) -> Renderer:
        compiled = ChatTemplate(template, tokenizer.special_tokens, name="t.jinja")
        return Renderer(tokenizer, compiled, tokenizer.vocab_size, (tokenizer.eos_id,), 8192)

    return make


class Writer:
    """An `ApiTeacher` with its server, notes and files."""

    def __init__(self, server: ChatServer, renderer: Renderer, folder: Path) -> None:
        self.server, self.renderer, self.folder, self.notes = server, renderer, folder, list[str]()

    def teacher(self, **api: Any) -> ApiTeacher:
        settings = {"url": self.server.url, "model": "org/writer", "api_key_env": "WRITER_KEY", **api}
        return ApiTeacher(
            "w",
            TextApi.model_validate(settings),
            self.renderer,
            vocab_size=self.renderer.vocab_size,
            seed=3,
            text_cache=self.folder / "texts",
            use_file=self.folder / "run" / "api_use.jsonl",
            run_on_first=lambda work: work(),
            note=self.notes.append,
        )

    def ask(self, teacher: ApiTeacher, *texts: str, sampling: Sampling = SAMPLING) -> list[Completion]:
        requests = [
            GenerationRequest(f"s:{i}", 0, token_ids([]), (Message("user", text),))
            for i, text in enumerate(texts)
        ]
        return teacher.submit(requests, sampling).wait(lambda _: None)

    def decoded(self, completions: Sequence[Completion]) -> list[tuple[str, str]]:
        decode = self.renderer.tokenizer.decode
        return [(decode(c.response_ids.tolist(), skip_special_tokens=False), c.finish) for c in completions]


@pytest.fixture
def writer(
    make_renderer: Callable[[str], Renderer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Writer]:
    monkeypatch.setenv("WRITER_KEY", KEY)
    monkeypatch.setattr(transport, "_BACKOFF_S", 0.001)
    monkeypatch.setattr(transport, "_DOWN_S", 0.01)
    with ChatServer(lambda body, number: completion(f"echo {body['messages'][-1]['content']}")) as server:
        yield Writer(server, make_renderer(QWEN), tmp_path)


def everything_in(folder: Path) -> str:
    return "\n".join(f"{file}\n{file.read_text()}" for file in folder.rglob("*") if file.is_file())


def test_a_reply_is_paid_for_once(writer: Writer) -> None:
    teacher = writer.teacher(prices={"input": 2.0, "output": 10.0})
    first = writer.ask(teacher, "one", "two", "one")
    assert writer.decoded(first) == [(f"echo {text}<|im_end|>", "eos") for text in ("one", "two", "one")]
    assert len(writer.server.bodies) == 2  # equal requests are asked once
    assert set(writer.server.keys) == {f"Bearer {KEY}"}
    cost = 2 * (10 * 2.0 + 5 * 10.0) / 1e6
    assert writer.notes == ["w gave 2 responses, 20 tokens in and 10 out, $0.0001; 1 more were kept"]
    # A later run, with another student's renderer or the same: nothing is asked, and nothing is counted.
    assert writer.ask(writer.teacher(), "two") == first[1:2]
    assert len(writer.server.bodies) == 2
    (use,) = read_use(writer.folder / "run" / "api_use.jsonl")
    assert (use.teacher, use.num_replies, use.num_prompt, use.num_response) == ("w", 2, 20, 10)
    assert use.dollars == pytest.approx(cost)
    assert KEY not in everything_in(writer.folder) + repr(teacher)
    # Another address, model, sample or sampling is another request.
    writer.ask(writer.teacher(extra={"top_k": 5}), "two")
    assert len(writer.server.bodies) == 3


def test_what_is_sent(writer: Writer) -> None:
    extra = {"reasoning_effort": "low", "seed": None, "temperature": 0.6}
    teacher = writer.teacher(extra=extra, max_tokens_field="max_completion_tokens", max_tokens=900)
    sampling = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=64, stop=("###",))
    call = {"name": "add", "arguments": {"a": 1}}
    messages = (
        Message("user", "1 + 1?"),
        Message(
            "assistant", "", {"role": "assistant", "content": "", "tool_calls": [call], "thinking": "hm"}
        ),
        Message("tool", "2"),
    )
    request = GenerationRequest("s:0", 0, token_ids([]), messages, ({"name": "add", "parameters": {}},))
    teacher.submit([request], sampling).wait(lambda _: None)
    wire_call = {
        "id": "call_1_0",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }
    assert writer.server.bodies == [
        {
            "model": "org/writer",
            "messages": [
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "", "tool_calls": [wire_call]},
                {"role": "tool", "content": "2", "tool_call_id": "call_1_0"},
            ],
            "temperature": 0.6,
            "top_p": 0.9,
            "max_completion_tokens": 900,
            "n": 1,
            "stop": ["###"],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
            "reasoning_effort": "low",
        }
    ]
    # Ids that a conversation has are kept, and its replies keep to them.
    own = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    reply = {"role": "tool", "content": "2", "tool_call_id": "c1"}
    wired = wire_messages([Message("assistant", "", own), Message("tool", "2", reply)])
    assert wired == [{"role": "assistant", "content": "", "tool_calls": [CALL]}, reply]


def test_seeds_differ_by_sample_alone(writer: Writer) -> None:
    teacher = writer.teacher()
    for key, sample in (("s:0", 0), ("s:0", 1), ("renamed:7", 1)):
        request = GenerationRequest(key, sample, token_ids([]), (Message("user", "x"),))
        teacher.submit([request], Sampling()).wait(lambda _: None)
    seeds = [body["seed"] for body in writer.server.bodies]
    assert len(seeds) == len(set(seeds)) == 2  # a renamed source is the same request
    teacher = writer.teacher(extra={"seed": None})
    requests = [GenerationRequest("s:0", i, token_ids([]), (Message("user", "x"),)) for i in range(2)]
    assert teacher.num_missing(requests, Sampling()) == 2


@pytest.mark.parametrize(
    ("reply", "text", "finish"),
    [
        (completion("so"), "so<|im_end|>", "eos"),
        (completion("so", reasoning_content="hm"), "<think>\nhm\n</think>\n\nso<|im_end|>", "eos"),
        (completion("so", reasoning="hm"), "<think>\nhm\n</think>\n\nso<|im_end|>", "eos"),
        (
            completion(None, "tool_calls", tool_calls=[CALL]),
            '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
            "eos",
        ),
        (completion("so wh", "length"), "so wh", "length"),
        (completion("caf\ufffd", "length"), "caf", "length"),
        (completion("so", stop_reason="##"), "so##", "stop"),
        (completion("x" * 50), "x" * 40, "length"),
        (completion("a<|im_end|>b"), "a<|im_end|>", "eos"),
    ],
)
def test_replies_are_rendered_as_the_students(writer: Writer, reply: Reply, text: str, finish: str) -> None:
    writer.server.make_reply = lambda body, number: reply
    limit = Sampling(max_new_tokens=40 if "x" in text else 100)
    assert writer.decoded(writer.ask(writer.teacher(), "p", sampling=limit)) == [(text, finish)]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion("", "content_filter"), "ended with 'content_filter'"),
        (completion(None, refusal="I won't"), "refused by the model"),
        (completion(""), "empty"),
        (completion("", "length"), "cut before any text"),
        (completion("so", "length", reasoning="hm"), "cut in reasoning or calls"),
        (
            completion(None, "tool_calls", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "reply.tool_calls[0].function.arguments is not JSON",
        ),
    ],
)
def test_replies_that_cannot_be_used_are_counted(writer: Writer, reply: Reply, reason: str) -> None:
    writer.server.make_reply = lambda body, number: reply
    for _ in range(2):  # and not asked for again
        (one,) = writer.ask(writer.teacher(), "p")
        assert (len(one.response_ids), one.finish) == (0, "length")
        assert f"1 of 1 responses of w cannot be used: 1 {reason}" in writer.notes[-1]
    assert len(writer.server.bodies) == 1


def test_reasoning_that_the_template_leaves_out_is_told(
    writer: Writer, make_renderer: Callable[[str], Renderer]
) -> None:
    writer.renderer = make_renderer(PLAIN)
    writer.server.make_reply = lambda body, number: completion("so", reasoning="hm")
    assert writer.decoded(writer.ask(writer.teacher(), "p")) == [("so<|im_end|>", "eos")]
    assert "the student's chat template leaves out the reasoning of 1 responses of w" in writer.notes[-1]


def test_overloaded_servers_are_asked_again_when_they_say(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = list[float]()
    sleep = transport.asyncio.sleep

    async def record(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(transport.asyncio, "sleep", record)
    busy: list[Reply] = [(429, {"Retry-After": "7"}, {}), (500, {}, {}), (200, {}, {"error": "half"})]
    writer.server.make_reply = lambda body, number: busy[number - 1] if number <= 3 else completion("so")
    assert writer.decoded(writer.ask(writer.teacher(), "p")) == [("so<|im_end|>", "eos")]
    assert [round(seconds) for seconds in waited] == [7, 0, 0]


@pytest.mark.parametrize("status", [400, 302])
def test_a_refusal_keeps_what_has_arrived_and_does_not_show_the_key(writer: Writer, status: int) -> None:
    """The server repeats the key in its error, and a redirect is not followed."""

    def script(body: dict[str, Any], number: int) -> Reply:
        if body["messages"][-1]["content"] == "bad":
            return status, {"Location": f"{writer.server.url}/x"}, {"error": f"key {KEY} is not allowed"}
        return completion("so")

    writer.server.make_reply = script
    with pytest.raises(ServingError, match=rf"status {status}: .*key \[key\] is not allowed") as caught:
        writer.ask(writer.teacher(concurrency=1), "one", "two", "bad", "four")
    assert KEY not in str(caught.getrepr(showlocals=False, chain=True))
    assert len(writer.server.bodies) == 3  # nothing is asked after a refusal
    assert "w gave 2 responses" in writer.notes[-1]
    writer.server.make_reply = lambda body, number: completion("so")
    assert len(writer.ask(writer.teacher(), "one", "two", "bad", "four")) == 4
    assert len(writer.server.bodies) == 5
    assert KEY not in everything_in(writer.folder)


def test_a_request_to_stop_keeps_what_has_arrived(writer: Writer) -> None:
    released = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Reply:
        if number == 2:
            released.wait(30)
        return completion("so")

    def stop(num_done: int) -> None:
        if num_done:
            raise KeyboardInterrupt

    writer.server.make_reply = reply
    requests = [GenerationRequest("s:0", i, token_ids([]), (Message("user", "x"),)) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        writer.teacher(concurrency=1).submit(requests, SAMPLING).wait(stop)
    released.set()
    assert writer.teacher().num_missing(requests, SAMPLING) == 2
    assert len(writer.server.bodies) == 2


def test_damaged_replies_are_asked_for_again(writer: Writer) -> None:
    writer.ask(writer.teacher(), "one", "two")
    (file,) = (writer.folder / "texts").glob("*.jsonl")
    first, second = file.read_text().splitlines()
    file.write_text(first.replace("echo", "fake") + "\n" + second[:-9])  # and the last line is cut
    assert len(writer.ask(writer.teacher(), "one", "two")) == 2
    assert len(writer.server.bodies) == 4
    assert "discarded 2 damaged kept replies of w" in writer.notes[1]
    assert len(writer.ask(writer.teacher(), "one", "two")) == 2
    assert len(writer.server.bodies) == 4


def test_calls_and_replies_of_tools_are_sent_back(writer: Writer) -> None:
    function = {"name": "calculator", "arguments": '{"expression": "6 * 7"}'}
    call = {"id": "abc", "type": "function", "function": function}

    def reply(body: dict[str, Any], number: int) -> Reply:
        is_first = body["messages"][-1]["role"] == "user"
        return completion(None, "tool_calls", tool_calls=[call]) if is_first else completion("It is 42.")

    writer.server.make_reply = reply
    teacher = writer.teacher()
    settings = TypeAdapter(EnvironmentOrKind).validate_python("calculator")
    environments = Environments.of({"s": settings}, (), 1, SingleProcess())
    prompt = Prompt("s:0", "s", "d", (Message("user", "6 times 7?"),))
    (played,) = environments.play(
        [(prompt, 0)], writer.renderer, lambda r, _: teacher.submit(r, SAMPLING).wait(lambda _: None)
    )
    environments.close()
    assert played.episode is not None
    assert played.trained is not None
    (text, finish) = writer.decoded([played.completion])[0]
    between = "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    turn = '<tool_call>{"name": "calculator", "arguments": {"expression": "6 * 7"}}</tool_call><|im_end|>'
    assert (text, finish) == (f"{turn}{between}It is 42.<|im_end|>", "eos")
    untrained = played.completion.response_ids[~played.trained].tolist()
    assert writer.renderer.tokenizer.decode(untrained, skip_special_tokens=False) == between
    first, second = writer.server.bodies
    assert [tool["function"]["name"] for tool in first["tools"]] == ["calculator"]
    user, assistant, tool = second["messages"]
    assert (user["content"], assistant["tool_calls"][0]["function"]) == ("6 times 7?", function)
    assert (tool["content"], tool["tool_call_id"]) == ("42", assistant["tool_calls"][0]["id"])
