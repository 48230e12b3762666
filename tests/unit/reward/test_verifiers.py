"""Every verifier on correct, incorrect and hostile responses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from pydantic import TypeAdapter

from mergeopd.errors import VerifierError
from mergeopd.recipe.verifiers import Verifier
from mergeopd.reward.numbers import final_number
from mergeopd.reward.protocol import Verify
from mergeopd.reward.verifiers import BUILDERS, build_verifier, reference_problem

GSM8K = Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k" / "train.jsonl"


def spec(kind: str, **fields: object) -> Verifier:
    return TypeAdapter(Verifier).validate_python({"kind": kind, **fields})


def build(kind: str, **fields: object) -> Verify:
    return build_verifier(spec(kind, **fields), allow_code=())


def test_table_has_the_schemas_tags() -> None:
    union = get_args(get_args(Verifier)[0])
    tags = {get_args(variant.model_fields["kind"].annotation)[0] for variant in union}
    assert BUILDERS.keys() == tags - {"reward_model"}, "which is loaded for whole rounds"


# ---------------------------------------------------------------------------------- exact, regex, number


def test_exact() -> None:
    verify = build("exact")
    assert verify(" cba\n", "cba ") == 1.0
    assert verify("Cba", "cba") == 0.0
    assert build("exact", ignore_case=True)("STRASSE", "straße") == 1.0


@pytest.mark.parametrize("kind", ["exact", "number", "json"])
def test_missing_reference(kind: str) -> None:
    with pytest.raises(VerifierError, match=f"verifier '{kind}' needs a reference"):
        build(kind)("1", None)


def test_regex() -> None:
    found = build("regex", pattern=r"\bdone\b")
    assert (found("all done.", None), found("undone", None)) == (1.0, 0.0)
    group = build("regex", pattern=r"Answer:\s*(?P<answer>[^\n]*)")
    assert (group("Answer: 7 \nbye", "7"), group("Answer: 8", "7"), group("7", "7")) == (1.0, 0.0, 0.0)
    assert build("regex", pattern=r"a|(?P<answer>b)")("a", "b") == 0.0
    with pytest.raises(VerifierError, match="needs a reference"):
        group("Answer: 7", None)


def test_number_is_exact_or_within_tolerance() -> None:
    verify = build("number")
    assert verify("it is 0.30", "0.3") == 1.0
    assert verify("it is 3/10", "0.3") == 1.0
    assert verify("it is 0.3000000000000000001", "0.3") == 0.0
    assert verify("nothing", "0.3") == 0.0
    near = build("number", tolerance=0.1)
    assert (near("0.4", "0.3"), near("0.41", "0.3")) == (1.0, 0.0)


def test_number_refuses_a_reference_without_one() -> None:
    with pytest.raises(VerifierError, match="the reference 'none' is not one number"):
        build("number")("5", "none")


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not at {GSM8K}")
def test_every_gsm8k_answer_verifies_and_no_perturbed_one_does() -> None:
    verify = build("number")
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 7473
    for row in rows:
        reference = row["answer"]
        gold = reference.rsplit("####", 1)[1].strip()
        assert final_number(gold) == int(gold.replace(",", "").replace("$", ""))
        value = int(gold.replace(",", ""))
        assert verify(reference, reference) == 1.0
        assert verify(f"So the answer is ${value:,}.", reference) == 1.0
        assert verify(f"I get \\boxed{{{value}}} in step 3.", reference) == 1.0
        assert verify(reference.replace(f"#### {gold}", f"#### {value + 1}"), reference) == 0.0


# ------------------------------------------------------------------------------------------------- json


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ('{"b": [1, 2], "a": null}', '{"a": null, "b": [1.0, 2]}', 1.0),
        ("1", "1.0", 1.0),
        ("1e2", "100", 1.0),
        ("0.1", "0.10", 1.0),
        ("0.30000000000000004", "0.3", 0.0),
        ("true", "1", 0.0),
        ("[0]", "[false]", 0.0),
        ("true", "true", 1.0),
        ("[1, 2]", "[2, 1]", 0.0),
        ('"1"', "1", 0.0),
        ("NaN", "1", 0.0),
        ("Infinity", "1", 0.0),
        ('{"a": 1, "a": 1}', '{"a": 1}', 0.0),
        ("[" * 100_000 + "]" * 100_000, "[]", 0.0),
        ("[" * 900 + "]" * 900, "[" * 900 + "]" * 900, None),
        ("9" * 10_000, "9", 0.0),
        ("", "[]", 0.0),
        ('Sure:\n```json\n{"a": 1}\n```\nDone.', '{"a": 1}', 1.0),
        ('```\n{"a": 1}\n```', '{"a": 1}', 1.0),
        ('```json\n{"a": 2}\n```\nor rather\n```json\n{"a": 1}\n```', '{"a": 1}', 1.0),
        ('```json\n{"a": 1}\n```\nthen\n```python\nprint()\n```', '{"a": 1}', 1.0),
        ('```json\n{"a": 1}', '{"a": 1}', 0.0),
        ('{"a": 1} is it', '{"a": 1}', 0.0),
    ],
)
def test_json_equality(answer: str, reference: str, reward: float | None) -> None:
    found = build("json")(answer, reference)
    assert found in (0.0, 1.0)
    assert reward is None or found == reward


def test_json_refuses_a_reference_that_is_none() -> None:
    with pytest.raises(VerifierError, match=r"the reference '\{a' is not JSON"):
        build("json")("{}", "{a")


def test_json_schema(tmp_path: Path) -> None:
    path = tmp_path / "tool.json"
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    path.write_text(json.dumps(schema))
    verify = build("json", schema_file=str(path))
    assert verify('```json\n{"n": 3}\n```', None) == 1.0
    for wrong in (
        '{"n": true}',
        '{"n": 1.5}',
        '{"n": 1, "m": 2}',
        "{}",
        "text",
        '{"n": 1e999}',
        "[" * 100_000,
    ):
        assert verify(wrong, None) == 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("5", "not a JSON Schema: it must be"),
        ('{"items": [{"pattern": "a{99999999999}"}]}', "not a regular expression"),
        ('{"pattern": "' + "a" * 20_000 + '"}', "more than 10,000 characters"),
        (" " * 1_000_001, "too many"),
        ("{", "not JSON"),
        ('{"type": "objekt"}', "not a JSON Schema"),
        (None, "cannot be read"),
    ],
)
def test_bad_schema_files_fail_when_built(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(VerifierError, match=message) as caught:
        build("json", schema_file=str(path))
    assert str(path) in str(caught.value)


MATH = [
    (r"so $\boxed{\sqrt{12}}$", r"2\sqrt{3}", 1.0),
    (r"\boxed{7\sqrt{3}}", r"2\sqrt{3}", 0.0),
    (r"\boxed{1 + x^2}", r"so it is \boxed{x^2+1}.", 1.0),
    (r"\boxed{\{3,2,1\}}", r"\{1,2,3\}", 1.0),
    ("5 apples", "2 + 3\n#### 5", 1.0),
]


@pytest.mark.parametrize(("response", "reference", "reward"), MATH)
def test_math(response: str, reference: str, reward: float) -> None:
    pytest.importorskip("math_verify")
    assert build("math")(response, reference) == reward


def test_only_boxed_math_of_a_truncated_response_counts() -> None:
    pytest.importorskip("math_verify")
    verify = build("math")
    assert verify("so $5$", "5") == 1.0
    assert verify("so $5$", "5", truncated=True) == 0.0
    assert verify(r"\boxed{5}, as", "5", truncated=True) == 1.0
    with pytest.raises(VerifierError, match="needs a reference"):
        verify("5", None)


def test_a_schema_never_reaches_the_network(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"$ref": "https://example.invalid/schema.json"}')
    with pytest.raises(VerifierError, match="is not in the file"):
        build("json", schema_file=str(path))("{}", None)


# ------------------------------------------------------------------------------------------------- user


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("rewards_of_a_user")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def build_user(module: ModuleType, function: object) -> Verify:
    module.reward = function  # type: ignore[attr-defined]
    name = f"{module.__name__}:reward"
    return build_verifier(spec("user", function=name), allow_code=(name,))


def test_user_function_is_called(user_module: ModuleType) -> None:
    verify = build_user(
        user_module, lambda answer, reference: 0.25 if (answer, reference) == ("a", None) else 1
    )
    assert (verify("a", None), verify("a", "r")) == (0.25, 1.0)


def test_user_function_must_be_allowed(user_module: ModuleType) -> None:
    with pytest.raises(
        VerifierError, match="'rewards_of_a_user:reward' is not allowed; add it to allow_code"
    ):
        build_verifier(
            spec("user", function="rewards_of_a_user:reward"), allow_code=("rewards_of_a_user:other",)
        )


@pytest.mark.parametrize("value", [None, "1", 1.5, -0.1, math.nan, math.inf, [1.0]])
def test_user_function_returns_nonsense(user_module: ModuleType, value: object) -> None:
    with pytest.raises(VerifierError, match="'rewards_of_a_user:reward' returned"):
        build_user(user_module, lambda answer, reference: value)("a", None)


def test_user_function_raises(user_module: ModuleType) -> None:
    def broken(answer: str, reference: str | None) -> float:
        raise KeyError("x")

    with pytest.raises(VerifierError, match="'rewards_of_a_user:reward' raised KeyError: 'x'"):
        build_user(user_module, broken)("a", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:reward", "importing 'no_such_module_here' raised ModuleNotFoundError"),
        ("math:nothing", "has no function 'nothing'"),
        ("math:pi", "has no function 'pi'"),
    ],
)
def test_user_function_cannot_be_found(name: str, message: str) -> None:
    with pytest.raises(VerifierError, match=message):
        build_verifier(spec("user", function=name), allow_code=(name,))


def test_reference_problem() -> None:
    assert reference_problem(spec("number"), "#### 5") is None
    assert reference_problem(spec("number"), "five") == "the reference 'five' is not one number"
    assert reference_problem(spec("json"), "[1]") is None
    assert "is not JSON" in str(reference_problem(spec("json"), "[1"))
    assert reference_problem(spec("exact"), "anything") is None
