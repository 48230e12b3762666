"""The tokenizer and the chat template of models that call tools, and their conversations as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer

from tiny_experts.tokens import ASSISTANT, END, USER, Encoded

TOOLS, TOOL, CALL, CALL_END = SPECIALS = ("<|tools|>", "<|tool|>", "<tool_call>", "</tool_call>")
# Without the space before it, so that a number is the same wherever it is copied to.
WORDS = Regex(r" ?\p{L}+|\p{N}|[^\p{L}\p{N}]+")

# Of a tool, its name and the names of its parameters: a whole schema is longer than these conversations.
TEMPLATE = (
    "{%- for tool in tools or [] -%}"
    "<|tools|>{{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }})"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{%- for call in message.tool_calls or [] -%}"
    """<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}"""
    "</tool_call>"
    "{%- endfor -%}"
    "{%- if message.role == 'assistant' -%}<|end|>{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

Tool = Mapping[str, Any]
"""A tool's JSON schema."""


def call_text(tool: str, arguments: Mapping[str, str]) -> str:
    """Return a call as the template writes it: the format of Hermes and Qwen."""
    return f'{CALL}{{"name": "{tool}", "arguments": {json.dumps(arguments)}}}{CALL_END}'


def prompt_text(prompt: str, tool: Tool | None) -> str:
    """Return a prompt as the template writes it, with the generation prompt."""
    before = ""
    if tool is not None:
        name, parameters = tool["function"]["name"], tool["function"]["parameters"]["properties"]
        before = f"{TOOLS}{name}({', '.join(parameters)})"
    return f"{before}{USER}{prompt}{ASSISTANT}"


def encode(tokenizer: Tokenizer, prompts: Sequence[str], turns: Sequence[Sequence[str]]) -> list[Encoded]:
    """Encode what the chat template gives (tests compare the two): `turns` alternate with replies of a tool.

    Replies are not trained. Every text ends at a special token, so each is encoded by itself.
    """
    encoded = []
    for prompt, texts in zip(tokenizer.encode_batch(list(prompts)), turns, strict=True):
        ids, trained = list[int](), list[bool]()
        for i, text in enumerate(texts):
            own = i % 2 == 0
            piece = tokenizer.encode(f"{text}{END}" if own else f"{TOOL}{text}{ASSISTANT}").ids
            ids += piece
            trained += [own] * len(piece)
        encoded.append(Encoded(prompt.ids, ids, trained))
    return encoded
