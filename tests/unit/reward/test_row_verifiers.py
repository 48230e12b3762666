"""Verifiers whose references are more than one text: choices, instructions, tool calls, combinations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from mergeopd.data.prompts import read_prompts
from mergeopd.errors import DataError, VerifierError
from mergeopd.recipe.plan import SourcePlan
from mergeopd.recipe.verifiers import Verifier
from mergeopd.reward.grading import Submission, Verifiers
from mergeopd.reward.instructions import CHECKS
from mergeopd.reward.protocol import Verify
from mergeopd.reward.verifiers import BUILDERS, build_verifier, reference_problem
from mergeopd.sandbox.client import sandbox_problem


def spec(kind: str, **fields: Any) -> Verifier:
    return TypeAdapter(Verifier).validate_python({"kind": kind, **fields})


def build(kind: str, **fields: Any) -> Verify:
    return build_verifier(spec(kind, **fields), ())


def prompts(
    tmp_path: Path, verifier: Verifier, *rows: dict[str, Any], parquet: bool = False
) -> list[str | None]:
    """The references of rows, as a run reads them."""
    path = tmp_path / ("rows.parquet" if parquet else "rows.jsonl")
    rows = tuple({"prompt": "p", **row} for row in rows)
    if parquet:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = SourcePlan(
        name="rows", source=str(path), domain="d", verifier=verifier, prompt_field="prompt",
        reference_field="answer", response_field=None, teachers={}, share=1.0, limit=None,
    )  # fmt: skip
    return [prompt.reference for prompt in read_prompts(plan)]


# ----------------------------------------------------------------------------------------------- choice

CHOICES = [
    ("B", "B", 1.0),
    ("b", "(B)", 1.0),
    ("B", "B) because water boils", 1.0),
    ("B", "The answer is (B).", 1.0),
    ("B", "First A seems right. **Answer: B**", 1.0),
    ("B", "The correct option is B, not C", 1.0),
    ("B", r"so \boxed{\text{B}}", 1.0),
    ("B", "The answer is A. Wait, the answer is B.", 1.0),
    ("B", "The answer is B. Wait, the answer is A.", 0.0),
    ("B", "Because water boils", 0.0),
    ("A", "A or B, I cannot tell", 0.0),
    ("B", "", 0.0),
    ("1", "B", 1.0),
]


@pytest.mark.parametrize(("reference", "response", "reward"), CHOICES)
def test_choices(reference: str, response: str, reward: float) -> None:
    assert build("choice")(response, reference) == reward


def test_choices_by_the_options_text(tmp_path: Path) -> None:
    verifier = spec("choice", options_field="choices", first_index=1)
    row = {"answer": 2, "choices": ["12", "Paris", "Rome (Italy)"]}
    (reference,) = prompts(tmp_path, verifier, row, parquet=True)
    verify = build_verifier(verifier, ())
    responses = [
        "B",
        "Paris",
        "The answer is **Paris**.",
        r"\boxed{paris}",
        "It is 12, so the answer is Paris",
    ]
    assert [verify(response, reference) for response in responses] == [1.0] * 5
    assert [verify(response, reference) for response in ("2", "A", "12", "Rome")] == [0.0] * 4
    (by_text,) = prompts(tmp_path, verifier, {**row, "answer": "Rome (Italy)"})
    assert verify("C", by_text) == 1.0
    (outside,) = prompts(tmp_path, verifier, {**row, "answer": 4})
    assert outside is not None
    assert reference_problem(verifier, outside) == "the reference '4' names none of the options"
    assert reference_problem(spec("choice"), "Paris") == "the reference 'Paris' names none of the options"


# ---------------------------------------------------------------------------------------- instructions

WORDS = "One two three. Dr. Who sleeps! Really?"
FOLLOWED: dict[str, list[tuple[dict[str, Any], str, bool]]] = {
    "change_case:capital_word_frequency": [
        ({"capital_frequency": 2, "capital_relation": "at least"}, "GO and RUN", True),
        ({"capital_frequency": 2, "capital_relation": "less than"}, "GO and RUN", False),
    ],
    "change_case:english_capital": [({}, "ALL CAPS, 1!", True), ({}, "Not all", False)],
    "change_case:english_lowercase": [({}, "all low, 1!", True), ({}, "not All", False)],
    "combination:repeat_prompt": [
        ({"prompt_to_repeat": "Say hi."}, "say hi.\nHi", True),
        ({"prompt_to_repeat": "Say hi."}, "Hi", False),
    ],
    "combination:two_responses": [({}, "a\n******\nb", True), ({}, "a******a", False), ({}, "a", False)],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, "[name] of [town]", True),
        ({"num_placeholders": 2}, "[name" * 20_000, False),
    ],
    "detectable_content:postscript": [
        ({"postscript_marker": "P.P.S"}, "Bye.\nP.P.S I forgot", True),
        ({"postscript_marker": "P.P.S"}, "Bye.\nP.S. I forgot", False),
    ],
    "detectable_format:constrained_response": [({}, "My answer is maybe.", True), ({}, "maybe", False)],
    "detectable_format:json_format": [({}, '```json\n{"a": 1}\n```', True), ({}, "{a: 1}", False)],
    "detectable_format:multiple_sections": [
        ({"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2\nb", True),
        ({"section_spliter": "Section", "num_sections": 3}, "Section 1\na\nSection 2\nb", False),
    ],
    "detectable_format:number_bullet_lists": [
        ({"num_bullets": 2}, "* a\n- b\n**bold**", True),
        ({"num_bullets": 2}, "* a\n* b\n* c", False),
    ],
    "detectable_format:number_highlighted_sections": [
        ({"num_highlights": 2}, "*one* and **two**", True),
        ({"num_highlights": 2}, "*one* and **  **", False),
    ],
    "detectable_format:title": [({}, "<<A song>>\nla", True), ({}, "<< >>\nla", False)],
    "keywords:existence": [
        ({"keywords": ["sun", "moon"]}, "The Sun. The moon.", True),
        ({"keywords": ["sun", "moon"]}, "The Sun.", False),
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["sun"]}, "Sunday", True),
        ({"forbidden_words": ["sun"]}, "The Sun.", False),
    ],
    "keywords:frequency": [
        ({"keyword": "la", "frequency": 3, "relation": "at least"}, "la La la", True),
        ({"keyword": "la", "frequency": 3, "relation": "less than"}, "la La la", False),
    ],
    "keywords:letter_frequency": [
        ({"letter": "a", "let_frequency": 2, "let_relation": "less than"}, "Ab", True),
        ({"letter": "a", "let_frequency": 2, "let_relation": "less than"}, "Aba", False),
    ],
    "length_constraints:nth_paragraph_first_word": [
        ({"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "First.\n\n'Then it ended.", True),
        ({"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "Then.\n\nFirst.", False),
    ],
    "length_constraints:number_paragraphs": [
        ({"num_paragraphs": 2}, "a\n***\nb", True),
        ({"num_paragraphs": 2}, "a\n\nb", False),
    ],
    "length_constraints:number_sentences": [
        ({"num_sentences": 3, "relation": "at least"}, WORDS, True),
        ({"num_sentences": 3, "relation": "less than"}, WORDS, False),
        ({"num_sentences": 4, "relation": "at least"}, WORDS, False),
    ],
    "length_constraints:number_words": [
        ({"num_words": 7, "relation": "at least"}, WORDS, True),
        ({"num_words": 8, "relation": "at least"}, WORDS, False),
    ],
    "punctuation:no_comma": [({}, "a b", True), ({}, "a, b", False)],
    "startend:end_checker": [
        ({"end_phrase": "The End."}, 'So. "the end."', True),
        ({"end_phrase": "The End."}, "The End. Or not", False),
    ],
    "startend:quotation": [({}, ' "a" ', True), ({}, '"a', False)],
}  # fmt: skip


def instructions(*pairs: tuple[str, dict[str, Any] | None]) -> str:
    return json.dumps(
        {"instructions": [name for name, _ in pairs], "arguments": [given for _, given in pairs]}
    )


def test_every_instruction() -> None:
    assert FOLLOWED.keys() == CHECKS.keys()
    verifier = spec("instruction_following")
    verify = build_verifier(verifier, ())
    for name, cases in FOLLOWED.items():
        assert {followed for _, _, followed in cases} == {True, False}
        for given, response, followed in cases:
            reference = instructions((name, {**given, "language": None}))
            assert reference_problem(verifier, reference) is None
            assert verify(response, reference) == float(followed), (name, response)


def test_all_instructions_of_a_row_must_be_followed(tmp_path: Path) -> None:
    verifier = spec("instruction_following")
    row = {
        "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
        "kwargs": [{"end_phrase": None}, {"end_phrase": "bye"}],
    }
    for parquet in (False, True):
        (reference,) = prompts(tmp_path, verifier, row, parquet=parquet)
        verify = build_verifier(verifier, ())
        assert [verify(text, reference) for text in ("now bye", "a, bye", "now", "")] == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        ([("keywords:exist", {})], "the instruction 'keywords:exist' is unknown or cannot be checked"),
        ([("language:response_language", {"language": "de"})], "the instruction 'language:response_language' is unknown or cannot be checked"),
        ([("keywords:existence", None)], "the instruction keywords:existence lacks the argument 'keywords'"),
        ([("length_constraints:number_words", {"num_words": "ten", "relation": "at least"})], 'num_words: "ten" does not fit the instruction length_constraints:number_words'),
        ([("length_constraints:number_words", {"num_words": 3, "relation": "around"})], 'relation: "around" does not fit the instruction length_constraints:number_words'),
        ([], "there are no instructions"),
    ],
)  # fmt: skip
def test_instructions_that_cannot_be_checked(pairs: list[Any], problem: str) -> None:
    assert reference_problem(spec("instruction_following"), instructions(*pairs)) == problem
    with pytest.raises(VerifierError, match="correct the prompt file"):
        build("instruction_following")("text", instructions(*pairs))


# ------------------------------------------------------------------------------------------- tool calls

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ROME, PARIS = ({"name": "weather", "arguments": {"city": city}} for city in ("Rome", "Paris"))


def hermes(*calls: dict[str, Any]) -> str:
    return "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>\n" for call in calls)


def test_tool_calls_equal_the_references() -> None:
    verify = build("tool_call")
    reference = json.dumps([ROME, PARIS])
    assert verify(hermes(ROME, PARIS), reference) == 1.0
    assert verify("[TOOL_CALLS]" + json.dumps([PARIS, ROME]), reference) == 1.0
    assert verify(json.dumps(ROME), json.dumps(ROME)) == 1.0
    for wrong in (
        hermes(ROME),
        hermes(ROME, ROME),
        hermes(ROME, PARIS, PARIS),
        hermes(ROME) + "<tool_call>{",
    ):
        assert verify(wrong, reference) == 0.0
    assert verify(hermes({**ROME, "name": "wether"}), json.dumps(ROME)) == 0.0
    number = [json.dumps({"name": "f", "arguments": {"x": x}}) for x in (1, 1.0, True)]
    assert [verify(text, number[0]) for text in number] == [1.0, 1.0, 0.0]
    assert (verify("It is sunny.", "[]"), verify(hermes(ROME), "[]")) == (1.0, 0.0)


def test_tool_calls_fit_the_tools(tmp_path: Path) -> None:
    verifier = spec("tool_call", tools_field="tools", compare=False)
    (reference,) = prompts(tmp_path, verifier, {"tools": [WEATHER]})
    verify = build_verifier(verifier, ())
    arguments = [{"city": "Rome"}, {"city": "Rome", "days": 2}]
    assert [verify(hermes({**ROME, "arguments": a}), reference) for a in arguments] == [1.0, 1.0]
    arguments = [{}, {"city": 3}, {"city": "Rome", "days": 0.5}, {"city": "Rome", "unit": "C"}]
    assert [verify(hermes({**ROME, "arguments": a}), reference) for a in arguments] == [0.0] * 4
    assert verify("no call", reference) == verify(hermes({**ROME, "name": "time"}), reference) == 0.0


@pytest.mark.parametrize(
    ("answer", "tools", "problem"),
    [
        ("call weather", [WEATHER], "the reference 'call weather' is not a list of tool calls: write objects with name and arguments"),
        ('{"name": "weather", "arguments": ', [WEATHER], "is not a list of tool calls: tool call 1 is not JSON"),
        ({"name": "time", "arguments": {}}, [WEATHER], "the reference's tool 'time' is not declared; tools are 'weather'"),
        ({"name": "weather", "arguments": {"town": "Rome"}}, [WEATHER], "the reference's call of 'weather': $:"),
        (ROME, {"weather": {}}, "the field 'declared' is not a list of tools with name and parameters"),
        (ROME, [{"name": "weather", "parameters": {"type": "objekt"}}], "declared[0].parameters: not a JSON Schema: $.type"),
    ],
)  # fmt: skip
def test_references_that_are_no_tool_calls(tmp_path: Path, answer: Any, tools: Any, problem: str) -> None:
    verifier = spec("tool_call", tools_field="declared")
    (reference,) = prompts(tmp_path, verifier, {"answer": answer, "declared": tools})
    assert reference is not None
    assert problem in (reference_problem(verifier, reference) or "")
    with pytest.raises(VerifierError):
        build_verifier(verifier, ())(hermes(ROME), reference)


# ----------------------------------------------------------------------------------------- combinations


def test_a_combination_is_the_weighted_mean(tmp_path: Path) -> None:
    verifier = spec(
        "combined",
        of=[
            {"verifier": "number", "weight": 3.0},
            {"verifier": {"kind": "regex", "pattern": "^Answer"}},
            {"verifier": "exact", "weight": 4.0, "reference_field": "text"},
        ],
    )
    (reference,) = prompts(tmp_path, verifier, {"answer": 5, "text": "Answer 5"}, parquet=True)
    verify = build_verifier(verifier, ())
    assert [verify(text, reference) for text in ("Answer 5", "Answer: 5", "5", "Answer")] == [
        1.0,
        0.5,
        0.375,
        0.125,
    ]
    with pytest.raises(DataError, match=r"`verifier.of.2.reference_field`"):
        prompts(tmp_path, verifier, {"answer": 5, "words": "Answer 5"}, parquet=True)
    (bad,) = prompts(tmp_path, verifier, {"answer": "five", "text": "t"})
    assert bad is not None
    assert reference_problem(verifier, bad) == "verifier 'number': the reference 'five' is not one number"
    with pytest.raises(ValidationError):
        spec("combined", of=[{"verifier": "exact"}])
    with pytest.raises(ValidationError):
        spec("combined", of=[{"verifier": {"kind": "combined", "of": []}}] * 2)


def test_a_part_that_fails_costs_its_response_its_reward(tmp_path: Path) -> None:
    """In a worker, where a part that hangs is ended too."""
    hanging = {"kind": "regex", "pattern": r"^(\w+\s?)*$", "timeout_s": 0.2}
    verifier = spec("combined", of=[{"verifier": "number"}, {"verifier": hanging}])
    (reference,) = prompts(tmp_path, verifier, {"answer": 5})
    with Verifiers({"a": verifier}, (), 1) as verifiers:
        submissions = [Submission("a", text, reference) for text in ("5", "a" * 40 + "! 5", "6")]
        grades = verifiers.verify(submissions, lambda _: None)
    assert [grade.reward for grade in grades] == [1.0, None, 0.5]
    assert (grades[1].failure or "").startswith("it took more than")


# ------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("parquet", [False, True])
def test_a_row_without_a_field_that_the_verifier_needs(tmp_path: Path, parquet: bool) -> None:
    verifier = spec("humaneval", test_field="tests")
    row = {"test": "def check(f): pass", "entry_point": "f"}
    with pytest.raises(DataError, match=r"field 'tests' is missing; did you mean 'test'\?"):
        prompts(tmp_path, verifier, row, parquet=parquet)


# ------------------------------------------------------------------------------------------ every kind

SETTINGS: dict[str, dict[str, Any]] = {
    "regex": {"pattern": "(?P<answer>.*)"},
    "choice": {"options_field": "o"},
    "tool_call": {"tools_field": "t"},
    "python_tests": {"setup_field": "s"},
    "user": {"function": "json:dumps"},
    "combined": {"of": [{"verifier": "exact"}, {"verifier": "number"}]},
}
REFERENCES = (None, "", "{", "[]", "[1]", "null", '{"a": 1}', '{"answer": [], "options": {}}', "\ud800")


def test_no_reference_and_no_response_ends_the_run() -> None:
    """They cost at most the reward of their response, for every kind of verifier."""
    kinds = set(BUILDERS) - (set() if sandbox_problem() is None else {"python_tests", "humaneval"})
    specs = {kind: spec(kind, **SETTINGS.get(kind, {})) for kind in sorted(kinds)}
    submissions = [
        Submission(kind, response, reference)
        for kind in specs
        for reference in REFERENCES
        for response in ("", '{"name": "f", "arguments": {}}', "[" * 5000)
    ]
    with Verifiers(specs, ["json:dumps"], 1) as verifiers:
        grades = verifiers.verify(submissions, lambda _: None)
    for submission, grade in zip(submissions, grades, strict=True):
        assert (grade.reward is None) == bool(grade.failure), submission
        assert grade.reward is None or 0.0 <= grade.reward <= 1.0
    failed = {
        submission.source for submission, grade in zip(submissions, grades, strict=True) if grade.failure
    }
    assert failed >= kinds - {"math"}
