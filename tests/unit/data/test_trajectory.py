"""Logged trajectories and multi-turn prompts as token ids: trained tokens, and ends of turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer, masked_in_teacher_term
from mergeopd.data.trajectory import dataset_response, length_bound, segments, text_after
from mergeopd.errors import DataError
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.types import Message, Prompt

# As ChatML writes: an end token, then a line break that nobody learns. Tools speak inside a user's turn.
CHATML = """
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# As Llama 3 writes: contents trimmed, nothing after the end token; tools have a role of their own.
TRIMMING = """{{- bos_token }}
{% for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""
# As thinking models write: what was thought is left out as soon as a user goes on.
FORGETFUL = """
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and not loop.last %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Tools do not exist for it, and no token ends an answer.
BARE = """
{%- for message in messages if message.role != 'tool' %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}
"""
# Calls and reasoning. As Qwen3 writes: a turn without reasoning has an empty block while it is the last.
CALLING = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == "assistant" and (loop.last or message.reasoning_content) %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}{{- '<call>' + call | tojson + '</call>' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# As gpt-oss writes: reasoning is left out as soon as the last message is an assistant's without calls.
CONCLUDING = CALLING.replace(
    '"assistant" and (loop.last or message.reasoning_content)',
    '"assistant" and message.reasoning_content and (loop.last or messages[-1].role == "tool" or messages[-1].tool_calls)',
)
# As GLM writes: no token ends a turn; a model generates the first token of the next header.
OBSERVING = CHATML.replace("<|im_end|>\\n", "").replace(
    "<|im_start|>user' }}{%- endif", "<|start|>' }}{%- endif"
)
SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|endoftext|>")

PROMPT = (Message("system", "Be brief."), Message("user", "What is in the box?"))
CALL = {"name": "open", "arguments": {"what": "box"}}
TRAJECTORY = (
    Message("assistant", '<call>{"open": "box"}</call>'),
    Message("tool", "a ball\r\nand  a bat"),
    Message("tool", ""),
    Message("assistant", "A ball.\nAnd a bat. "),
    Message("user", "Sure?"),
    Message("assistant", "Yes."),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every byte a token, as in byte-level BPE before any merge."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def speak(folder: Path) -> Callable[..., Renderer]:
    tokenizer = Tokenizer.load(folder)

    def make(template: str, eos: Sequence[str] = ("<|im_end|>",)) -> Renderer:
        compiled = ChatTemplate(template, tokenizer.special_tokens, name="t.jinja")
        ends = tuple(tokenizer.encode(e)[0] for e in eos)
        return Renderer(tokenizer, compiled, tokenizer.vocab_size, ends, 4096)

    return make


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>")


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def prompt(response: Any = None, messages: tuple[Message, ...] = PROMPT) -> Prompt:
    return Prompt("s:0", "s", "d", messages, response=response)


def shown(dialect: Renderer, answer: Any) -> list[tuple[bool, str]]:
    """Runs of equal flags, decoded."""
    runs: list[tuple[bool, list[int]]] = []
    for i, own in zip(answer.ids, answer.trained, strict=True):
        if not runs or runs[-1][0] != own:
            runs.append((own, []))
        runs[-1][1].append(i)
    return [(own, dialect.tokenizer.decode(ids, skip_special_tokens=False)) for own, ids in runs]


def test_only_assistant_turns_are_trained(speak: Callable[..., Renderer]) -> None:
    dialect = speak(CHATML)
    assert shown(dialect, dataset_response(prompt(TRAJECTORY), dialect)) == [
        (True, '<call>{"open": "box"}</call><|im_end|>'),
        (
            False,
            "\n<|im_start|>user\n<tool_response>\na ball\r\nand  a bat\n</tool_response>"
            "\n<tool_response>\n\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "A ball.\nAnd a bat. <|im_end|>"),
        (False, "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Yes.<|im_end|>"),
    ]


def test_a_template_that_trims_turns_trims_trained_tokens(speak: Callable[..., Renderer]) -> None:
    dialect = speak(TRIMMING)
    header = "<|start|>assistant<|end|>\n\n"
    assert shown(dialect, dataset_response(prompt(TRAJECTORY), dialect)) == [
        (True, '<call>{"open": "box"}</call><|im_end|>'),
        (
            False,
            "<|start|>tool<|end|>\n\na ball\r\nand  a bat<|im_end|><|start|>tool<|end|>\n\n<|im_end|>"
            + header,
        ),
        (True, "A ball.\nAnd a bat.<|im_end|>"),
        (False, "<|start|>user<|end|>\n\nSure?<|im_end|>" + header),
        (True, "Yes.<|im_end|>"),
    ]


@pytest.mark.parametrize("template", [CHATML, TRIMMING], ids=["chatml", "trimming"])
def test_ids_are_those_of_transformers(speak: Callable[..., Renderer], reference: Any, template: str) -> None:
    dialect = speak(template)
    example = prompt(TRAJECTORY)
    whole = reference.apply_chat_template(
        as_dicts((*PROMPT, *TRAJECTORY)), chat_template=template, tokenize=True, return_dict=False
    )
    found = [*dialect.render(example), *dataset_response(example, dialect).ids]
    end = len(whole) - whole[::-1].index(dialect.end_id)  # the template's last line break answers nothing
    assert found == whole[:end]


CONVERSATIONS = {
    "turns": (*PROMPT, Message("assistant", "A ball. "), Message("user", "Sure?")),
    "tools": (*PROMPT, *TRAJECTORY[:3]),
    "tool between": (*PROMPT, *TRAJECTORY[:5]),
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, TRIMMING], ids=["chatml", "trimming"])
def test_multi_turn_prompts_are_those_of_transformers(
    speak: Callable[..., Renderer], reference: Any, template: str, messages: tuple[Message, ...]
) -> None:
    expected = reference.apply_chat_template(
        as_dicts(messages),
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert list(speak(template).render(prompt(messages=messages))) == expected


turns = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["tool", "user", "assistant"]), max_size=3),
        st.text(max_size=8),
    ),
    max_size=4,
)


@given(turns=turns, template=st.sampled_from([CHATML, TRIMMING]), first=st.text(max_size=8))
@settings(max_examples=150, deadline=None)
def test_segments_concatenate_to_the_rendering(
    speak: Callable[..., Renderer], turns: list[tuple[list[str], str]], template: str, first: str
) -> None:
    trajectory = [Message("assistant", first)]
    for roles, text in turns:
        trajectory += [Message(role, text) for role in roles]  # type: ignore[arg-type]
        trajectory.append(Message("assistant", text[::-1]))
    dialect = speak(template)
    pieces = segments(prompt(), trajectory, dialect.template)
    whole = dialect.template.render((*PROMPT, *trajectory), add_generation_prompt=False)
    assert dialect.template.render(PROMPT) + "".join(piece.text for piece in pieces) == whole
    assert sum(piece.is_own for piece in pieces) == sum(turn.role == "assistant" for turn in trajectory)
    example = prompt(tuple(trajectory))
    answer = dataset_response(example, dialect)
    text = dialect.tokenizer.decode([*dialect.render(example), *answer.ids], skip_special_tokens=False)
    assert text == whole.removesuffix("\n")
    assert answer.ids[-1] == dialect.end_id
    assert len(answer.ids) <= length_bound(example, dialect)
    assert answer.trained is not None
    ends = [i for i, own in zip(answer.ids, answer.trained, strict=True) if own and i == dialect.end_id]
    assert len(ends) == sum(turn.role == "assistant" for turn in trajectory)


def test_a_turn_without_text_is_its_end_token(speak: Callable[..., Renderer]) -> None:
    dialect = speak(CHATML)
    turns = (Message("assistant", ""), Message("tool", ""), Message("assistant", ""))
    runs = shown(dialect, dataset_response(prompt(turns), dialect))
    assert [text for own, text in runs if own] == ["<|im_end|>", "<|im_end|>"]


def test_a_template_without_turn_ends_gets_the_end_token_once(speak: Callable[..., Renderer]) -> None:
    dialect = speak(BARE)
    turns = (Message("assistant", "a"), Message("user", "b"), Message("assistant", "c"))
    assert shown(dialect, dataset_response(prompt(turns), dialect)) == [
        (True, "a\n"),
        (False, "user: b\nassistant: "),
        (True, "c\n<|im_end|>"),
    ]


def test_a_response_ends_at_the_first_end_token(speak: Callable[..., Renderer]) -> None:
    dialect = speak(
        CHATML.replace("<|im_end|>\\n", "<|endoftext|><|im_end|>\\n"), ("<|im_end|>", "<|endoftext|>")
    )
    runs = shown(dialect, dataset_response(prompt(TRAJECTORY[-1:]), dialect))
    assert runs == [(True, "Yes.<|endoftext|>")]


def test_a_text_is_all_trained_and_closed(speak: Callable[..., Renderer]) -> None:
    dialect = speak(CHATML)
    answer = dataset_response(prompt("Yes."), dialect)
    assert (answer.ids, answer.trained) == ((*dialect.tokenizer.encode("Yes."), dialect.end_id), None)
    assert length_bound(prompt("Yes."), dialect) == 5
    assert length_bound(prompt(), dialect) == 0


def test_a_template_that_rewrites_earlier_turns_is_refused(speak: Callable[..., Renderer]) -> None:
    turns = (Message("assistant", "<think>hm</think>A"), Message("user", "?"), Message("assistant", "B"))
    with pytest.raises(DataError) as caught:
        dataset_response(prompt(turns), speak(FORGETFUL))
    assert str(caught.value) == (
        "t.jinja: response[0] is rendered differently once response[1] follows: "
        '"<think>hm</think>A<|im_end|>\\n" becomes "A<|im_end|>\\n<|im_start|>user\\n?"; '
        "make a row of each of the assistant's turns, with the turns before it in the prompt and its text as the "
        "response, or give the student a template that does not change earlier turns"
    )
    assert shown(speak(FORGETFUL), dataset_response(prompt(turns[:1]), speak(FORGETFUL)))


def calling(content: str | None = None, reasoning: str | None = None) -> Message:
    fields = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    return Message(
        "assistant", content or "", fields | ({"reasoning_content": reasoning} if reasoning else {})
    )


def concluding(content: str, reasoning: str) -> Message:
    return Message("assistant", content, {"content": content, "role": "assistant", "thinking": reasoning})


def test_empty_reasoning_of_earlier_turns_stays_as_generated(speak: Callable[..., Renderer]) -> None:
    dialect = speak(CALLING)
    turns = (calling(), Message("tool", "a ball"), Message("assistant", "A ball."))
    empty = "<think>\n\n</think>\n\n"
    assert empty not in dialect.template.render((*PROMPT, *turns, Message("user", "?")))
    assert shown(dialect, dataset_response(prompt(turns), dialect)) == [
        (True, empty + '<call>{"name": "open", "arguments": {"what": "box"}}</call><|im_end|>'),
        (False, "\n<|im_start|>tool\na ball<|im_end|>\n<|im_start|>assistant\n"),
        (True, empty + "A ball.<|im_end|>"),
    ]


def test_reasoning_that_the_complete_conversation_drops_stays(speak: Callable[..., Renderer]) -> None:
    dialect = speak(CONCLUDING)
    turns = (calling(reasoning="Look."), Message("tool", "a ball"), concluding("A ball.", "I see."))
    assert "Look." not in dialect.template.render((*PROMPT, *turns), add_generation_prompt=False)
    runs = shown(dialect, dataset_response(prompt(turns), dialect))
    assert [text for own, text in runs if own] == [
        '<think>\nLook.\n</think>\n\n<call>{"name": "open", "arguments": {"what": "box"}}</call><|im_end|>',
        "<think>\nI see.\n</think>\n\nA ball.<|im_end|>",
    ]
    after = (*turns, Message("user", "Sure?"), Message("assistant", "Yes."))
    with pytest.raises(DataError, match=r"response\[2\] is rendered differently once response\[3\] follows"):
        dataset_response(prompt(after), dialect)


def test_the_next_header_is_learned_where_it_ends_turns(speak: Callable[..., Renderer]) -> None:
    dialect = speak(OBSERVING, ("<|start|>",))
    turns = (TRAJECTORY[0], Message("tool", "a ball"), Message("assistant", "A ball."))
    assert shown(dialect, dataset_response(prompt(turns), dialect)) == [
        (True, '<call>{"open": "box"}</call><|start|>'),
        (False, "\n<tool_response>\na ball\n</tool_response><|im_start|>assistant\n"),
        (True, "A ball.<|start|>"),
    ]


def test_calls_must_not_be_left_out(speak: Callable[..., Renderer]) -> None:
    turns = (calling("I open it."), Message("tool", "a ball"), Message("assistant", "A ball."))
    with pytest.raises(
        DataError, match=r"^t\.jinja: leaves out the calls of tools in response\[0\]; choose a "
    ):
        dataset_response(prompt(turns), speak(CHATML))


@pytest.mark.parametrize(
    ("start", "whole", "rest"),
    [
        ("ab", "abc", "c"),
        ("a b\n", "a  b\n\nc", "\nc"),
        ("a<think>\n</think>b\n", "ab\n c", " c"),
        ("ab", "a\n<think>\n\n</think>\n\nb<think>x</think>", "<think>x</think>"),
        ("</think>a", "a b", " b"),
        ("a\n", "a<think></think>b", "<think></think>b"),
        ("a<think></think>", "a<think>b</think>", None),
        ("a<think>b</think>c", "ac", None),
        ("ab", "a c", None),
        ("x <think>a</think>", "x <think>\n</think>a", None),
        ("x.<think>\n</think>a\n", "x.<think>\n\n</think>a\n", ""),
    ],
)
def test_text_after_ignores_white_space_and_empty_reasoning(start: str, whole: str, rest: str | None) -> None:
    assert text_after(start, whole) == rest


def test_a_response_must_begin_with_the_generation_prompt(speak: Callable[..., Renderer]) -> None:
    dialect = speak(CHATML.replace("assistant\\n' }}{%- endif %}", "assistant\\n<think>' }}{%- endif %}"))
    with pytest.raises(DataError, match=r"response\[0\] does not begin with the generation prompt"):
        dataset_response(prompt(TRAJECTORY), dialect)


def test_a_message_must_not_be_left_out(speak: Callable[..., Renderer]) -> None:
    with pytest.raises(
        DataError, match=r"^t\.jinja: leaves out response\[1\], a message of role 'tool'; choose a "
    ):
        dataset_response(prompt(TRAJECTORY), speak(BARE))


def test_end_tokens_are_masked_for_teachers_with_other_ones(speak: Callable[..., Renderer]) -> None:
    student = speak(CHATML, ("<|im_end|>", "<|endoftext|>"))
    same, one, none = student, speak(CHATML, ("<|endoftext|>",)), speak(CHATML, ("<s>",))
    end, other = student.eos_ids
    ids = (1, end, 2, other, 3, end)
    teachers = {"same": same, "one": one, "none": none}
    assert masked_in_teacher_term(ids, student, teachers) == {
        "same": (3,),  # a token that it may stop at, and never expects
        "one": (1, 5),
        "none": (1, 3, 5),
    }
    assert masked_in_teacher_term((1, 2), student, teachers) == {}
