"""End tokens of published models: base students with chat teachers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published import LLAMA, QWEN, run_to_the_end, write_project
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mergeopd.data.renderer import Renderer, masked_in_teacher_term
from mergeopd.errors import RecipeError
from mergeopd.preflight.inputs import Inputs, preflight


def tokens(dialect: Renderer, ids: tuple[int, ...]) -> list[str]:
    return [dialect.tokenizer.decode([i], skip_special_tokens=False) for i in ids]


def checked(folder: Path, student: str, teacher: str, *overrides: str) -> Inputs:
    return preflight(write_project(folder, student, teacher), overrides)


@pytest.mark.parametrize(
    ("student", "teacher", "ends", "closing", "skipped"),
    [
        ("qwen3-base", "qwen3", ["<|endoftext|>", "<|im_end|>"], "<|im_end|>", ["<|endoftext|>"]),
        ("qwen2.5-base", "qwen2.5", ["<|endoftext|>", "<|im_end|>"], "<|im_end|>", ["<|endoftext|>"]),
        ("qwen3", "qwen3", ["<|im_end|>", "<|endoftext|>"], "<|im_end|>", ["<|endoftext|>"]),
        ("gemma-3", "gemma-3", ["<eos>", "<end_of_turn>"], "<end_of_turn>", ["<eos>"]),
        ("mistral", "mistral", ["</s>"], "</s>", []),
    ],
)
def test_responses_end_where_the_template_ends_turns(
    tmp_path: Path, student: str, teacher: str, ends: list[str], closing: str, skipped: list[str]
) -> None:
    inputs = checked(tmp_path, student, teacher)
    own, other = inputs.student, inputs.teachers["t"]
    assert tokens(own, own.eos_ids) == ends
    assert own.end_token == other.end_token == closing
    masked = masked_in_teacher_term(own.eos_ids, own, {"t": other}).get("t", ())
    assert [ends[position] for position in masked] == skipped
    only_template = student.endswith("-base")
    assert any("does not name" in note for note in inputs.notes) == only_template
    assert not any("teacher 't' ends turns" in note for note in inputs.notes)


def test_a_base_model_without_a_template_is_given_one_by_the_recipe(tmp_path: Path) -> None:
    recipe = write_project(tmp_path, "llama-3.1-base", "llama-3.1")
    with pytest.raises(RecipeError, match=r"name one in the recipe \(`student.template: FILE.jinja`\)"):
        preflight(recipe)
    (tmp_path / "chat.jinja").write_text(LLAMA)
    inputs = preflight(recipe, ["student.template=chat.jinja"])
    assert tokens(inputs.student, inputs.student.eos_ids) == ["<|end_of_text|>", "<|eot_id|>"]
    assert inputs.student.end_token == inputs.teachers["t"].end_token == "<|eot_id|>"
    assert str(tmp_path / "chat.jinja") in inputs.files
    with pytest.raises(
        RecipeError, match=r"student\.template\n.*unknown template 'chta.jinja'; did you mean"
    ):
        preflight(recipe, ["student.template=chta.jinja"])


def test_a_teacher_that_ends_otherwise_is_noted_and_skips_the_end(tmp_path: Path) -> None:
    recipe = write_project(tmp_path, "qwen3-base", "qwen3")
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    inputs = preflight(recipe, ["student.template=plain.jinja", 'student.end_tokens=["<|endoftext|>"]'])
    assert tokens(inputs.student, inputs.student.eos_ids) == ["<|endoftext|>"]
    ends, begins = inputs.notes
    assert begins.startswith(
        r"""teacher 't' begins responses behind "<|im_start|>assistant\n", the student"""
    )
    assert ends.startswith("teacher 't' ends turns with '<|im_end|>', the student with '<|endoftext|>': ")
    ids = (1, inputs.student.end_id)
    assert masked_in_teacher_term(ids, inputs.student, inputs.teachers) == {"t": (1,)}


def test_end_tokens_of_the_recipe_are_tokens(tmp_path: Path) -> None:
    recipe = write_project(tmp_path, "qwen3-base", "qwen3")
    inputs = preflight(recipe, ['student.end_tokens=["</think>", "<|im_end|>"]'])
    assert tokens(inputs.student, inputs.student.eos_ids) == ["</think>", "<|im_end|>"]
    assert inputs.student.end_token == "<|im_end|>"
    with pytest.raises(RecipeError, match=r"student\.end_tokens\[1\]\n.*'<\|stop\|>' is not one token"):
        preflight(recipe, ['student.end_tokens=["<|im_end|>", "<|stop|>"]'])


def test_the_export_ends_responses_as_it_was_trained_to(tmp_path: Path) -> None:
    recipe = write_project(tmp_path, "llama-3.1-base", "llama-3.1")
    (tmp_path / "chat.jinja").write_text(LLAMA)
    folder = run_to_the_end(recipe, "student.template=chat.jinja")
    inputs = preflight(recipe, ["student.template=chat.jinja"])
    found = GenerationConfig.from_pretrained(folder.export)
    assert found.eos_token_id == list(inputs.student.eos_ids)
    assert (folder.export / "chat_template.jinja").read_text() == LLAMA
    # Nothing to add: the file stays as it is.
    folder = run_to_the_end(write_project(tmp_path / "chat", "llama-3.1", "llama-3.1"))
    published = (tmp_path / "chat" / "student" / "generation_config.json").read_bytes()
    assert (folder.export / "generation_config.json").read_bytes() == published


@pytest.mark.parametrize(
    ("name", "teacher", "published"),
    [
        # As published: Qwen3 samples by default, Qwen2.5's base limits the length, Mistral names its beginning.
        ("qwen3", "qwen3", {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ("qwen2.5-base", "qwen2.5", {"do_sample": False, "max_new_tokens": 2048, "_from_model_config": True}),
        (
            "gemma-3",
            "gemma-3",
            {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
        ),
        ("mistral", "mistral", {"bos_token_id": 1, "_from_model_config": True}),
    ],
)
def test_an_export_generates_and_is_read_as_its_family(
    tmp_path: Path, name: str, teacher: str, published: dict[str, object]
) -> None:
    recipe = write_project(tmp_path / "project", name, teacher)
    student = tmp_path / "project" / "student"
    config = student / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **published}))
    files = ("tekken.json", "LICENSE.txt", "additional_chat_templates/tool_use.jinja")
    for file in files:
        (student / file).parent.mkdir(exist_ok=True)
        (student / file).write_text("{}")
    export = run_to_the_end(recipe).export
    written = json.loads((export / "generation_config.json").read_text())
    ends = written.pop("eos_token_id")
    model_ends = set(preflight(recipe).student.eos_ids)
    assert (set(ends) if isinstance(ends, list) else {ends}) == model_ends
    is_changed = name == "qwen2.5-base"  # its own file names <|endoftext|> alone
    assert written == {k: v for k, v in published.items() if not (is_changed and k.startswith("_"))}
    for file in (*files, "tokenizer.json", "tokenizer_config.json"):
        assert (export / file).read_bytes() == (student / file).read_bytes()
    # A served model stops where the student did: transformers reads the same ends.
    loaded = AutoModelForCausalLM.from_pretrained(export).generation_config.eos_token_id
    assert (set(loaded) if isinstance(loaded, list) else {loaded}) == model_ends


def test_the_recipes_template_is_where_older_programs_look(tmp_path: Path) -> None:
    recipe = write_project(tmp_path, "qwen3-base", "qwen3")
    (tmp_path / "chat.jinja").write_text(QWEN)
    export = run_to_the_end(recipe, "student.template=chat.jinja").export
    assert json.loads((export / "tokenizer_config.json").read_text())["chat_template"] == QWEN
    assert AutoTokenizer.from_pretrained(export).chat_template == QWEN
