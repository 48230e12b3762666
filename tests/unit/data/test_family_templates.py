"""Chat templates of current model families render and split conversations with tools as transformers does.

The templates are those of the models, which the package trl carries; it is not imported.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from byte_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.prompts import read_prompts
from mergeopd.data.renderer import Renderer
from mergeopd.data.trajectory import dataset_response
from mergeopd.data.turns import ids_between
from mergeopd.errors import DataError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.plan import SourcePlan
from mergeopd.types import Prompt

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
EMPTY = "<think>\n\n</think>\n\n"


class Family(NamedTuple):
    """A template, its end tokens, and a trajectory as its model generates it.

    `turn` is an assistant's turn with a call, or the last one, where `{}` is the reasoning; `between` is what
    follows a call, up to the next turn.
    """

    file: str
    ends: tuple[str, ...]
    call: str
    between: str
    last: str
    reasons: bool = False
    arguments: Mapping[str, Any] = {}


def _chatml(result: str, opening: str = "", role: str = "user") -> str:
    return f"\n<|im_start|>{role}\n{result}<|im_end|>\n<|im_start|>assistant\n{opening}"


_JSON_CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": [1, 2]}}\n</tool_call><|im_end|>'
)
_RESULT = "<tool_response>\n12 <b>\n</tool_response>"
_XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n[1, 2]\n</parameter>\n"
    "</function>\n</tool_call>"
)
FAMILIES = {
    "Qwen2.5": Family("qwen2_5", ("<|im_end|>",), _JSON_CALL, _chatml(_RESULT), "12.<|im_end|>"),
    "Qwen3-2507": Family(
        "qwen3_instruct_2507", ("<|im_end|>",), _JSON_CALL, _chatml(_RESULT), "12.<|im_end|>"
    ),
    "Qwen3": Family(
        "qwen3",
        ("<|im_end|>",),
        "<think>\n{}\n</think>\n\n" + _JSON_CALL,
        _chatml(_RESULT),
        "<think>\n{}\n</think>\n\n12.<|im_end|>",
        reasons=True,
    ),
    "Qwen3 without reasoning": Family(
        "qwen3",
        ("<|im_end|>",),
        _JSON_CALL,
        _chatml(_RESULT, EMPTY),
        "12.<|im_end|>",
        arguments={"enable_thinking": False},
    ),
    "Qwen3.6": Family(
        "qwen3_6",
        ("<|im_end|>",),
        "{}\n</think>\n\n" + _XML_CALL + "<|im_end|>",
        _chatml(_RESULT, "<think>\n"),
        "{}\n</think>\n\n12.<|im_end|>",
        reasons=True,
    ),
    "Nemotron 3": Family(
        "nemotron_3_nano",
        ("<|im_end|>",),
        "{}\n</think>\n" + _XML_CALL + "\n<|im_end|>",
        _chatml(_RESULT + "\n", "<think>\n"),
        "{}\n</think>\n12.<|im_end|>",
        reasons=True,
    ),
    "Llama 3.1": Family(
        "llama3_1",
        ("<|eot_id|>", "<|eom_id|>"),
        '{"name": "weather", "parameters": {"city": "Bern", "days": [1, 2]}}<|eot_id|>',
        '<|start_header_id|>ipython<|end_header_id|>\n\n"12 <b>"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "12.<|eot_id|>",
        arguments={"date_string": "26 Jul 2024"},
    ),
    "Llama 3.1 with code": Family(
        "llama3_1",
        ("<|eot_id|>", "<|eom_id|>"),
        '{"name": "weather", "parameters": {"city": "Bern", "days": [1, 2]}}<|eom_id|>',
        '<|start_header_id|>ipython<|end_header_id|>\n\n"12 <b>"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "12.<|eot_id|>",
        arguments={"builtin_tools": ["code_interpreter"], "tools_in_user_message": False},
    ),
    "GLM-4.5": Family(
        "glm4moe",
        ("<|observation|>", "<|user|>"),
        "\n<think>{}</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>[1, 2]</arg_value>\n</tool_call><|observation|>",
        f"\n{_RESULT}<|assistant|>",
        "\n<think>{}</think>\n12.<|observation|>",
        reasons=True,
    ),
    "gpt-oss": Family(
        "gptoss",
        ("<|return|>", "<|call|>"),
        "<|channel|>analysis<|message|>{}<|end|><|start|>assistant to=functions.weather<|channel|>commentary json"
        '<|message|>{"city": "Bern", "days": [1, 2]}<|call|>',
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"12 <b>"<|end|><|start|>assistant',
        "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>12.<|return|>",
        reasons=True,
        arguments={"reasoning_effort": "low"},
    ),
    "Gemma 4": Family(
        "gemma4",
        ("<turn|>", "<|tool_response>"),
        '<|tool_call>call:weather{city:<|"|>Bern<|"|>,days:[1,2]}<tool_call|><|tool_response>',
        'response:weather{value:<|"|>12 <b><|"|>}<tool_response|>',
        "12.<turn|>",
    ),
    "LFM2": Family(
        "lfm2_v2",
        ("<|im_end|>",),
        "<|tool_call_start|>[weather(city='Bern', days=[1, 2])]<|tool_call_end|><|im_end|>",
        _chatml("<|tool_response_start|>12 <b><|tool_response_end|>", role="tool"),
        "12.<|im_end|>",
    ),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Tell the weather <in> a "city" & when, é.',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "days": {"type": "array", "items": {"type": "integer"}, "description": "Which"},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "description": "Stop.", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip


def call(
    number: int, name: str = "weather", reasoning: str | None = None, **arguments: Any
) -> dict[str, Any]:
    one = {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [one], "reasoning_content": reasoning}


def result(number: int, text: str = "12 <b>") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "weather", "content": text}


USER, SYSTEM = (
    {"role": "user", "content": " How cold is Bern? "},
    {"role": "system", "content": "Be <b>brief</b>."},
)
CALL = call(1, city='Zürich "x" <&>', days=[1, 2], deep={"a": [True, None, 1.5]})
LAST = {"role": "assistant", "content": "It is cold.", "reasoning_content": "\n12 is cold.\n"}
CONVERSATIONS = {
    "user": [USER],
    "turns": [SYSTEM, USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nCold."}, USER],
    "call": [USER, CALL, result(1)],
    "call without arguments": [SYSTEM, USER, call(1, "stop"), result(1, '{"ok": true}')],
    "call with text": [SYSTEM, USER, CALL | {"content": "Let me look."}, result(1)],
    "calls in turn": [USER, CALL, result(1), call(2, city="Bern"), result(2), LAST, USER, CALL, result(1)],
    "two calls": [USER, CALL | {"tool_calls": [*CALL["tool_calls"], *call(2, "stop")["tool_calls"]]}, result(1), result(2)],
    "reasoning": [SYSTEM, USER, CALL | {"reasoning_content": "I look."}, result(1), LAST, USER],
    "thinking": [USER, CALL | {"reasoning_content": None, "thinking": "I look."}, result(1)],
}  # fmt: skip
ARGUMENTS: tuple[Mapping[str, Any], ...] = ({}, {"enable_thinking": False, "date_string": "1 May 2025"})


def source(name: str) -> str:
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("trl ships this template and is not installed: pip install trl")
    path = Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


def read(folder: Path, *rows: Mapping[str, Any]) -> tuple[Prompt, ...]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    fields = {"prompt_field": "prompt", "reference_field": "answer", "response_field": "response"}
    more: dict[str, Any] = {"verifier": None, "teachers": {"t": 1.0}, "share": 1.0, "limit": None}
    plan = {"name": "s", "source": str(path), "domain": "d", **fields, **more}
    return read_prompts(SourcePlan.model_validate(plan))


@cache
def reference() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIAL)


def outcomes(template: ChatTemplate, row: Mapping[str, Any], prompt: Prompt) -> Iterator[tuple[Any, Any]]:
    """Renderings by transformers and here, with and without generation prompt; None: it was refused."""
    for prompted in (True, False):
        try:
            expected = reference().apply_chat_template(
                row["prompt"],
                tools=row.get("tools"),
                chat_template=template.source,
                add_generation_prompt=prompted,
                tokenize=False,
                **template.arguments,
            )
        except Exception:  # noqa: BLE001  templates may raise anything
            expected = None
        try:
            found = template.render(prompt.messages, tools=prompt.tools, add_generation_prompt=prompted)
        except DataError:
            found = None
        yield expected, found


@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_are_rendered_as_by_transformers(name: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": conversation} | ({"tools": TOOLS} if has_tools else {})
        for conversation in CONVERSATIONS.values()
        for has_tools in (True, False)
    ]
    # As OpenAI's format has it: the same rows with arguments as text.
    texts = json.loads(json.dumps(rows))
    for message in (message for row in texts for message in row["prompt"]):
        for one in message.get("tool_calls") or ():
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    prompts, same = read(tmp_path, *rows), read(tmp_path, *texts)
    assert [one.messages for one in prompts] == [one.messages for one in same]
    num_rendered = 0
    for arguments in ({**FAMILIES[name].arguments, **more} for more in ARGUMENTS):
        template = ChatTemplate(source(FAMILIES[name].file), SPECIAL, name=name, arguments=arguments)
        for row, prompt in zip(rows, prompts, strict=True):
            for expected, found in outcomes(template, row, prompt):
                assert found == expected
                num_rendered += found is not None
    # Llama 3.1 refuses two calls in a turn.
    assert num_rendered >= 4 * len(rows) - (8 if name.startswith("Llama") else 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_trajectories_train_what_the_model_generates(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    thoughts: Any = ["I look.", "Again.", "Done."] if family.reasons else [None] * 3
    row = {
        "prompt": [SYSTEM, USER],
        "tools": TOOLS,
        "response": [
            call(1, reasoning=thoughts[0], city="Bern", days=[1, 2]),
            result(1),
            call(2, reasoning=thoughts[1], city="Bern", days=[1, 2]),
            result(2),
            {"role": "assistant", "content": "12.", "reasoning_content": thoughts[2]},
        ],
    }
    backend = byte_level()
    backend.add_special_tokens(list(family.ends))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": family.ends[0]}))
    tokenizer = Tokenizer.load(tmp_path)
    template = ChatTemplate(source(family.file), SPECIAL, name=name, arguments=family.arguments)
    ends = tuple(backend.token_to_id(end) for end in family.ends)
    student = Renderer(tokenizer, template, tokenizer.vocab_size, ends, 1 << 20)
    (prompt,) = read(tmp_path, row)

    response = dataset_response(prompt, student)
    assert response.trained is not None
    runs: list[tuple[bool, list[int]]] = []
    for i, own in zip(response.ids, response.trained, strict=True):
        if not runs or runs[-1][0] != own:
            runs.append((own, []))
        runs[-1][1].append(i)
    texts = [(own, tokenizer.decode(ids, skip_special_tokens=False)) for own, ids in runs]
    first, second, last = (
        turn.replace("{}", str(thought))
        for turn, thought in zip((family.call, family.call, family.last), thoughts, strict=True)
    )
    assert texts == [
        (True, first), (False, family.between), (True, second), (False, family.between), (True, last)
    ]  # fmt: skip
    # What a model reads before its second turn is what transformers renders, but for empty reasoning.
    messages = [*row["prompt"], *row["response"][:4]]
    context = reference().apply_chat_template(
        messages, tools=TOOLS, chat_template=template.source, add_generation_prompt=True, tokenize=False, **family.arguments
    )  # fmt: skip
    generated = student.text(prompt) + "".join(text for _, text in texts[:4])
    assert generated.replace(EMPTY, "") == context.replace(EMPTY, "")
    # A rollout adds the same text between two turns.
    assert isinstance(prompt.response, tuple)
    for num, turn in ((1, first), (3, second)):
        ids = ids_between(
            prompt, prompt.response[:num], prompt.response[num : num + 1], tokenizer.encode(turn)[-1], student
        )
        assert tokenizer.decode(ids, skip_special_tokens=False) == family.between
