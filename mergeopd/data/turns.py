"""Turns of a response with tools: generated ids as messages, and the ids between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergeopd.data.renderer import Renderer
from mergeopd.data.trajectory import text_after
from mergeopd.errors import DataError
from mergeopd.tool_calls import ParsedTurn, ToolCall, parse_tool_calls
from mergeopd.types import Message, Prompt, TokenIds


def turn_text(ids: TokenIds, renderer: Renderer) -> str:
    """Decode a generated turn without its end token."""
    kept = ids.tolist()
    if kept and kept[-1] in renderer.eos_ids:
        kept.pop()
    # The tokens around calls are special in some vocabularies.
    return renderer.tokenizer.decode(kept, skip_special_tokens=False)


def parse_turn(text: str) -> ParsedTurn:
    """Parse a turn. Calls without an id get one that is unique in the turn."""
    turn = parse_tool_calls(text)
    return replace(turn, calls=tuple(_with_id(call, i) for i, call in enumerate(turn.calls)))


def _with_id(call: ToolCall, position: int) -> ToolCall:
    # Nine letters and digits, which Mistral's templates demand.
    return call if call.id is not None else replace(call, id=f"call{position:05d}")


def turn_message(turn: ParsedTurn, text: str) -> Message:
    """Return the assistant's message of a turn, as chat templates take it.

    It is the text alone if there are no calls, or some cannot be parsed.
    """
    if not turn.calls or turn.problems:
        return Message("assistant", text)
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": dict(call.arguments)},
        }
        for call in turn.calls
    ]
    fields = {"role": "assistant", "content": turn.content, "tool_calls": calls}
    return Message("assistant", turn.content, fields)


def ids_between(
    prompt: Prompt, turns: Sequence[Message], replies: Sequence[Message], end: int, renderer: Renderer
) -> list[int]:
    """Return the ids between the last of `turns`, which ended with the id `end`, and the next turn.

    They are the template's text behind the end token, the replies, and the generation prompt. Turns with
    calls are rendered without their texts, because templates change those of earlier turns; the ids do not
    depend on them.

    Raises DataError if the template rejects the conversation, leaves the replies out, or renders a turn
    otherwise once replies follow.
    """
    template = renderer.template
    messages = [*renderer.teacher_prompt.messages(prompt), *map(_bare, turns)]
    shown = template.render(messages, tools=prompt.tools, add_generation_prompt=False)
    whole = template.render([*messages, *replies], tools=prompt.tools)
    behind = text_after(shown, whole)
    if behind is None:
        raise DataError(
            f"{template.name}: renders the assistant's turn differently once a tool has replied; give the "
            "model a template that does not"
        )
    without_text = [
        Message(one.role, "", {**one.fields, "content": ""} if one.fields else {}) for one in replies
    ]
    if replies != without_text and template.render([*messages, *without_text], tools=prompt.tools) == whole:
        raise DataError(f"{template.name}: leaves out replies of tools; give the model one that renders them")
    before = template.render(messages[:-1], tools=prompt.tools, add_generation_prompt=False)
    text = _behind_end(before, shown, renderer) + behind
    # Some models end a turn with the token that begins a reply.
    ended = renderer.tokenizer.decode([end], skip_special_tokens=False)
    return renderer.tokenizer.encode(text.removeprefix(ended) if end in renderer.eos_ids else text)


def _bare(message: Message) -> Message:
    """Return an assistant's turn without the text beside its calls; others as they are."""
    if not message.tool_calls:
        return message
    return Message("assistant", "", {**message.fields, "content": ""})


def _behind_end(before: str, shown: str, renderer: Renderer) -> str:
    """Return the text behind the end token that rendering a turn has added; nothing without one."""
    ends = [renderer.tokenizer.decode([i], skip_special_tokens=False) for i in renderer.eos_ids]
    added = [end for end in ends if end and shown.count(end) > before.count(end)]
    cut = max((shown.rfind(end) + len(end) for end in added), default=len(shown))
    return shown[cut:]
