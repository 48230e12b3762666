"""What is result about student and teacher before a model runs, on folders as they are published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from byte_tokenizers import byte_level, sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from published import LLAMA, QWEN, QWEN3, write_project, write_published
from tokenizers.processors import TemplateProcessing

from mergeopd.inspection.compatibility import compatibility
from mergeopd.inspection.templates import diff
from mergeopd.preflight.inputs import preflight
from mergeopd.reporting.inspection import Compatibility, Finding

OPENS_THINKING = QWEN3.replace(
    "assistant\\n' }}{%- endif",
    "assistant\\n' }}{%- if enable_thinking is not false %}{{- '<think>\\n' }}{%- endif %}{%- endif",
)
NO_SYSTEM = QWEN.replace("You are a helpful assistant.", "Think step by step.")
ENDS_TEXT = QWEN3.replace("message.content + '<|im_end|>\\n'", "message.content + '<|endoftext|>'")
WITH_TOOLS = QWEN.replace("{%- for m", "{%- if tools %}{{- tools | tojson }}{%- endif %}{%- for m", 1)
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {}}}


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., Compatibility]:
    """Compatibility of published folders, with other templates, teacher settings, rows or card keys."""

    def call(
        student: str,
        teacher: str,
        *,
        template: str | None = None,
        student_template: str | None = None,
        card: Mapping[str, Any] = {},
        rows: list[dict[str, Any]] | None = None,
        recipe: Mapping[str, Any] = {},
        **ref: Any,
    ) -> Compatibility:
        folder = tmp_path / "project"
        folder.mkdir()
        for name, of in (("student", student), ("teacher", teacher)):
            write_published(folder / name, of)
        if student != teacher:  # the support writes the same weights for the same number of ids
            write_published(folder / "teacher", teacher, rows=300)
        own = {"model": "student"}
        for name, text in (("student", student_template), ("teacher", template)):
            if text is not None:
                (folder / f"{name}.jinja").write_text(text)
        if student_template is not None:
            own["template"] = "student.jinja"
        document = {"teachers": {"t": {"card": "teacher.yaml", **ref}}, "student": own, **recipe}
        path = write_project(folder, student, teacher, document)
        more = {} if template is None else {"template": "teacher.jinja"}
        (folder / "teacher.yaml").write_text(
            json.dumps({"card": 1, "name": "t", "model": "teacher", **more, **card})
        )
        if rows is not None:
            (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return compatibility(preflight(path), "t")

    return call


def of(result: Compatibility, topic: str, level: str | None = None) -> list[Finding]:
    return [f for f in result.findings if f.topic == topic and level in (None, f.level)]


def causes(result: Compatibility, case: str) -> tuple[str, ...]:
    [own] = [template.causes for template in result.templates if template.case == case]
    return own


def test_a_fine_tune_of_the_student_has_no_problem(compare: Callable[..., Compatibility]) -> None:
    result = compare("qwen2.5-base", "qwen2.5", card={"licence": "apache-2.0"})
    assert [f.text for f in result.findings if f.level == "problem"] == []
    [same] = of(result, "vocabulary", "ok")[:1]
    assert same.text == "the same tokenizer, 260 ids"
    padding = of(result, "vocabulary", "ok")[1].text
    assert padding == "padding rows of the heads, in no loss: 0 of the student, 40 of the teacher"
    # The base's generation_config names <|endoftext|>, its template writes <|im_end|> (QwenLM/Qwen3 927).
    [ends] = of(result, "end_tokens", "note")
    assert (
        "ends turns with '<|im_end|>' (258), its generation_config.json names '<|endoftext|>' (256)"
        in ends.text
    )
    assert all(template.is_equal and not template.causes for template in result.templates)
    assert result.alignment is None
    assert of(result, "licence") == [Finding("licence", "ok", "apache-2.0")]


def test_thinking_on_one_side(compare: Callable[..., Compatibility]) -> None:
    result = compare("qwen3", "qwen3-base", template=OPENS_THINKING)
    assert causes(result, "a prompt") == ("generation prompt", "thinking tags")
    [problem] = of(result, "template", "problem")
    assert r'behind "<|im_start|>assistant\n" for the student' in problem.text
    assert r'behind "<|im_start|>assistant\n<think>\n" for the teacher' in problem.text
    assert problem.remedy == (
        "make both the same, with `template_arguments: {enable_thinking: ...}` of the card or of `student`"
    )
    [prompt] = [t for t in result.templates if t.case == "a prompt"]
    assert [s.teacher for s in prompt.spans if not s.is_equal] == ["<think>\n"]


def test_defaults_of_the_system_message(compare: Callable[..., Compatibility]) -> None:
    result = compare("qwen2.5", "qwen2.5-base", template=NO_SYSTEM)
    assert causes(result, "a prompt") == ("system default",)
    assert causes(result, "a system message") == ()
    [note] = of(result, "template", "note")
    assert (
        '"You are a helpful assistant." for the student, "Think step by step." for the teacher' in note.text
    )
    [prompt] = [t for t in result.templates if t.case == "a prompt"]
    differing = [(s.student, s.teacher) for s in prompt.spans if not s.is_equal]
    assert "".join(a for a, _ in differing) == "You are a helpful assistant"
    assert "".join(b for _, b in differing) == "Think step by step"


def test_the_end_token_of_a_base_model_against_the_instruct_model(
    compare: Callable[..., Compatibility],
) -> None:
    result = compare("qwen3-base", "qwen3", student_template=ENDS_TEXT)
    [problem] = of(result, "end_tokens", "problem")
    assert (
        "the student ends turns with '<|endoftext|>' (256), the teacher with '<|im_end|>' (258)"
        in problem.text
    )
    assert "student.template" in problem.remedy


def test_the_template_of_another_model(compare: Callable[..., Compatibility]) -> None:
    result = compare("qwen3", "qwen3-base", template=LLAMA.replace("{{- bos_token }}", ""))
    [problem] = of(result, "template", "problem")
    # Three markers, of 19, 17 and 10 bytes.
    assert "'<|start_header_id|>' into 19, '<|end_header_id|>' into 17, '<|eot_id|>' into 10" in problem.text
    assert {"turn markers", "generation prompt"} <= set(causes(result, "a prompt"))


def test_tools_that_a_template_leaves_out(compare: Callable[..., Compatibility]) -> None:
    rows = [{"prompt": "ab", "answer": "a", "tools": [SEARCH]}]
    result = compare("qwen2.5", "qwen2.5-base", student_template=WITH_TOOLS, rows=rows)
    assert causes(result, "a prompt") == causes(result, "tools") == ("tools block",)
    assert causes(result, "a second turn") == ()
    [problem] = of(result, "template", "problem")
    assert problem.text == "the teacher's chat template leaves tools out, which prompts of the recipe have"


def test_begin_of_sequence(tmp_path: Path, compare: Callable[..., Compatibility]) -> None:
    # As Llama's and Gemma's tokenizers do, this one begins texts with BOS; the template forgets it.
    def with_bos(folder: Path) -> None:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        bos = "<|begin_of_text|>"
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
        backend.save(str(folder / "tokenizer.json"))

    project = tmp_path / "project"
    project.mkdir()
    recipe = write_project(project, "llama-3.1", "llama-3.1")
    for name in ("student", "teacher"):
        with_bos(project / name)
    config = project / "teacher" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{{- bos_token }}", ""))
    result = compatibility(preflight(recipe), "t")
    [problem] = of(result, "special_tokens", "problem")
    assert problem.text.startswith(
        "the teacher's tokenizer begins texts with '<|begin_of_text|>', but its chat"
    )
    assert causes(result, "a prompt") == ("BOS",)
    assert [f.text for f in of(result, "template", "problem")] == [
        "the student's prompts begin with '<|begin_of_text|>', the teacher's do not"
    ]


def test_a_teacher_of_another_family(compare: Callable[..., Compatibility]) -> None:
    result = compare("qwen2.5", "gemma-3", bridge="span")
    assert [f.text for f in result.findings if f.level == "problem"] == []
    assert of(result, "vocabulary", "ok")[0].text == (
        "another tokenizer, with the bridge 'span': 260 ids for the student, 261 for the teacher; 256 tokens "
        "have the same bytes"
    )
    assert [f.text for f in of(result, "end_tokens")][-1] == (
        "the student's '<|im_end|>' means the teacher's '<end_of_turn>'"
    )
    assert causes(result, "a prompt") == ("BOS", "system default", "turn markers", "generation prompt")
    assert causes(result, "a system message") == ("refused by the teacher's template",)


def test_alignment_and_context_of_another_tokenizer(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    ends = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    content = "{% for message in messages %}{{ message.content }}{% endfor %}"
    for name, backend, end in (
        ("student", byte_level(("Ġa", "bc"), (("Ġ", "a"), ("b", "c"))), "<end>"),
        ("teacher", sentencepiece("bpe"), "</s>"),
    ):
        ids = {"vocab": backend.get_vocab_size(), "eos": backend.token_to_id(end)}
        shutil.copytree(make_model(name, **ids), tmp_path / name)
        backend.save(str(tmp_path / name / "tokenizer.json"))
        config = {"eos_token": end, "chat_template": content + ends}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    teachers = {"t": {"card": "teacher.yaml", "bridge": "span"}}
    rollout = {"max_new_tokens": 110}
    recipe = write_project(tmp_path, "student", "teacher", {"teachers": teachers, "rollout": rollout})
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a bc a", "answer": "he"}))
    result = compatibility(preflight(recipe), "t")
    # Inside a text, the student's a| |bc| a and he are the teacher's a|▁|bc|▁a and <0x68>|<0x65>.
    [alignment] = of(result, "alignment")
    assert alignment.level == "ok"
    assert "100.0% of the student's tokens of 1 prompts" in alignment.text
    assert "80.0% one to one; 1.20 of its tokens for one of the student's" in alignment.text
    assert result.alignment is not None
    assert result.alignment.value == 1.0
    # 110 tokens of the student are about 132 of the teacher, whose context has 128.
    [context] = of(result, "context")
    assert context.level == "problem"
    assert "4 + 132 of 128 tokens for the teacher" in context.text
    assert "the teacher cannot read all of it" in context.text


def test_licences_and_fingerprints(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    cards = {"t": "t.yaml", "u": "u.yaml", "v": {"card": "u.yaml", "system": "Be brief."}}
    source = [{"source": "p.jsonl", "domain": "d", "teachers": ["t", "u", "v", "self"]}]
    recipe = write_project(
        project,
        "qwen2.5",
        "qwen2.5-base",
        {"teachers": {**cards, "self": {"student": "start", "system": "Be kind."}}, "prompts": source},
    )
    write_published(project / "expert", "qwen2.5", rows=280)
    (project / "expert" / "README.md").write_text("---\nlicense: other\nlicense_name: expert-1.0\n---\n")
    (project / "student" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    shutil.copytree(project / "expert", project / "copy")
    (project / "t.yaml").write_text(json.dumps({"card": 1, "name": "t", "model": "expert", "licence": "mit"}))
    (project / "u.yaml").write_text(json.dumps({"card": 1, "name": "u", "model": "copy"}))
    inputs = preflight(recipe)
    result = {name: compatibility(inputs, name) for name in ("t", "u", "v", "self")}
    assert [f.text for f in of(result["t"], "licence")] == [
        "the card says mit, the README.md of the model folder expert-1.0",
        "the teacher's licence is mit, the student's apache-2.0",
    ]
    assert "is expert-1.0, the student's apache-2.0" in of(result["u"], "licence")[0].text
    assert of(result["self"], "licence") == of(result["self"], "fingerprint") == []
    same = [f.text for f in of(result["t"], "fingerprint")][-2:]
    assert same[-1] == "the weights are those of 'u' and 'v'; with the same prompt, both are one teacher"
    assert [f.text for f in of(result["v"], "fingerprint")][-1] == (
        "the weights are those of 't' and 'u', with another prompt"
    )
    assert causes(result["self"], "a prompt") == ("the teacher's own prompt",)


def test_the_student_as_its_own_teacher(compare: Callable[..., Compatibility]) -> None:
    result = compare("qwen3", "qwen3")
    [problem] = of(result, "fingerprint", "problem")
    assert (
        problem.text
        == "the weights are the student's, and so is the prompt: there is nothing to learn from it"
    )


@given(st.text("ab <|im_start|>\n.", max_size=30), st.text("ab <|im_end|>\n.", max_size=30))
def test_spans_are_the_two_texts(one: str, other: str) -> None:
    spans = diff(one, other)
    assert "".join(span.student for span in spans) == one
    assert "".join(span.teacher for span in spans) == other
    assert not any(a.is_equal and b.is_equal for a, b in pairwise(spans))
    assert (one == other) == all(span.is_equal for span in spans)


def test_teachers_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "k")
    project = tmp_path / "project"
    project.mkdir()
    phases = [{"name": "p", "updates": 1, "text": "teacher", "loss": "nll", "prompts_per_round": 2}]
    recipe = write_project(project, "qwen3", "qwen3", {"phases": phases})
    api = {"url": "http://127.0.0.1:9/v1", "model": "writer", "api_key_env": "KEY", "probe": False}
    card = {"card": 1, "name": "t", "licence": "mit", "api": api}
    (project / "teacher.yaml").write_text(json.dumps(card))
    result = compatibility(preflight(recipe), "t")
    assert [(f.topic, f.level) for f in result.findings] == [("vocabulary", "ok"), ("licence", "ok")]
    assert result.templates == ()
