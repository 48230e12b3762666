"""YAML, `extends`, variables and overrides: values, places and refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergeopd.errors import Location
from mergeopd.recipe.resolve import Resolution, read


def lines(resolution: Resolution) -> list[str]:
    return [str(problem).replace("\n    ", " | ") for problem in resolution.problems]


def plan(resolution: Resolution):
    assert resolution.problems == ()
    assert resolution.plan is not None
    return resolution.plan


# ------------------------------------------------------------------------------------------------ extends


def test_extends_merges_mappings_and_replaces_lists_and_values(project: Path) -> None:
    Path("recipes/child.yaml").write_text(
        "extends: merge.yaml\nname: child\noptimizer: {lr: 2e-5}\nrollout: {stop: [x]}\n"
        "teachers: {math: {weight: 3}}\n"
    )
    child, base = plan(read("recipes/child.yaml")), plan(read("recipes/merge.yaml"))
    assert (child.name, child.seed) == ("child", 17)
    assert child.optimizer == base.optimizer.model_copy(update={"lr": 2e-5})
    assert (child.rollout.stop, child.rollout.samples_per_prompt) == (("x",), 2)
    # The base wrote the short form `math: teachers/math.yaml`; the child adds a weight to it.
    assert child.sources[0].teachers == {"math": 3.0}
    assert child.sources[1].teachers == {"code": 0.8, "math": pytest.approx(0.6)}


def test_null_removes_a_teacher_of_the_base(project: Path) -> None:
    prompts = "prompts:\n  - {source: data/math.jsonl, domain: math, teachers: math}\n"
    rest = "evaluation: null\nphases: [{name: merge, updates: 9, loss: reverse_kl}]\n"
    Path("recipes/child.yaml").write_text(
        f"extends: merge.yaml\n{prompts}{rest}teachers: {{code: null, chat: null}}\n"
    )
    assert list(plan(read("recipes/child.yaml")).teachers) == ["math"]
    Path("recipes/child.yaml").write_text(f"extends: merge.yaml\n{prompts}{rest}")
    removed = ("teachers.code=null", "teachers.chat=null")
    assert list(plan(read("recipes/child.yaml", removed)).teachers) == ["math"]
    unknown = lines(read("recipes/merge.yaml", ["teachers.cod=null"]))
    assert len(unknown) == 1
    assert "teachers.cod | expected" in unknown[0]


def test_of_several_bases_the_later_wins_and_each_value_keeps_its_file(project: Path) -> None:
    Path("recipes/fast.yaml").write_text("optimizer:\n  lr: 3e-5\nseed: 5\n")
    Path("recipes/child.yaml").write_text("extends: [merge.yaml, fast.yaml]\nseed: 6\n")
    resolution = read("recipes/child.yaml")
    assert plan(resolution).optimizer.lr == 3e-5
    assert plan(resolution).seed == 6
    assert resolution.origins.at("optimizer", "lr") == Location("recipes/fast.yaml", 2, 7)
    assert resolution.origins.at("optimizer", "schedule") == Location("recipes/merge.yaml", 33, 52)
    assert resolution.origins.at("seed") == Location("recipes/child.yaml", 2, 7)


def test_a_base_elsewhere_keeps_its_own_project_folder(project: Path) -> None:
    other = project / "other" / "recipes"
    other.mkdir(parents=True)
    (other / "child.yaml").write_text("extends: ../../recipes/merge.yaml\noutput: runs/child\n")
    resolved = plan(read(other / "child.yaml"))
    assert resolved.sources[0].source == str(project / "data" / "math.jsonl")
    assert resolved.output == str(project / "other" / "runs" / "child")


def test_the_same_base_twice_is_no_circle(project: Path) -> None:
    Path("recipes/a.yaml").write_text("extends: merge.yaml\nseed: 1\n")
    Path("recipes/b.yaml").write_text("extends: merge.yaml\n")
    Path("recipes/c.yaml").write_text("extends: [a.yaml, b.yaml]\n")
    assert plan(read("recipes/c.yaml")).seed == 17  # b comes later and brings merge.yaml's own seed


def test_a_circle_is_named(project: Path) -> None:
    Path("recipes/a.yaml").write_text("extends: b.yaml\n")
    Path("recipes/b.yaml").write_text("extends: a.yaml\n")
    assert lines(read("recipes/a.yaml")) == [
        "recipes/b.yaml:1:10  extends | extends itself: recipes/a.yaml -> recipes/b.yaml -> recipes/a.yaml;"
        " remove one of them"
    ]


@pytest.mark.parametrize("value", ["3", "[3]", "{a: b}"])
def test_extends_takes_paths_only(project: Path, value: str) -> None:
    Path("recipes/a.yaml").write_text(f"extends: {value}\n")
    (problem,) = read("recipes/a.yaml").problems
    assert problem.message == "expected the path of a recipe, or a list of them"


def test_an_unreadable_base_does_not_make_its_keys_missing(project: Path) -> None:
    Path("recipes/base.yaml").write_text("seed: [\n")
    Path("recipes/child.yaml").write_text("extends: base.yaml\noptimzer: {}\n")
    assert lines(read("recipes/child.yaml")) == [
        "recipes/child.yaml:2:1  optimzer | unknown key 'optimzer'; did you mean 'optimizer'?",
        "recipes/base.yaml:2:1 | not valid YAML: expected a value, but found the end",
    ]


# ---------------------------------------------------------------------------------------------- variables


def test_variables_are_typed_when_they_are_the_whole_value(variant) -> None:
    path = variant(
        ("seed: 17", "seed: ${SEED}"),
        ("{lr: 1e-5,", '{lr: "${LR:-3e-4}",'),
        ("name: three-experts", "name: ${USER_NAME:-nobody}-${SEED}"),
        ("number, share", 'number, prompt_field: !!str "${SEED}", share'),
        ('"^ok"', '"^$${ok}"'),
    )
    resolved = plan(read(path, env={"SEED": "23"}))
    assert (resolved.seed, resolved.optimizer.lr, resolved.name) == (23, 3e-4, "nobody-23")
    assert resolved.sources[0].prompt_field == "23"
    assert resolved.sources[2].verifier.pattern == "^${ok}"


def test_a_default_serves_for_an_empty_variable_as_in_the_shell(variant) -> None:
    assert plan(read(variant(("seed: 17", "seed: ${SEED:-4}")), env={"SEED": ""})).seed == 4


def test_an_unset_variable_is_reported_once_and_nothing_follows_from_it(variant) -> None:
    path = variant(("data/math.jsonl", '"${DATA}/math.jsonl"'), ("seed: 17", "seed: ${SEED}"))
    assert lines(read(path, env={})) == [
        "recipes/variant.yaml:4:7  seed | environment variable 'SEED' is not set;"
        " set it, or give a default: ${SEED:-default}",
        "recipes/variant.yaml:15:14  prompts[0].source | environment variable 'DATA' is not set;"
        " set it, or give a default: ${DATA:-default}",
    ]


@pytest.mark.parametrize("text", ["${", "${}", "${A-b}", "${1A}", "${A:-${B}}"])
def test_malformed_variables(variant, text: str) -> None:
    (problem,) = read(variant(("seed: 17", f"seed: '{text}'")), env={}).problems
    assert problem.message == f"malformed variable in {text!r}"
    assert problem.location.line == 4


# ---------------------------------------------------------------------------------------------- overrides


def test_overrides_win_and_stand_on_the_command_line(project: Path) -> None:
    resolution = read(
        "recipes/merge.yaml",
        [
            "optimizer.lr=1e-4",
            "prompts.0.share=5",
            "prompts[1].teachers.math=0.5",
            "phases.0.loss={forward_kl: 2}",
            "checkpoint.every = 7",
            "rollout.stop=[a, b]",
            "optimizer.lr=2e-4",
        ],
    )
    resolved = plan(resolution)
    assert resolved.optimizer.lr == 2e-4
    assert resolved.optimizer.warmup_updates == 5
    assert resolved.sources[0].share == 5
    assert resolved.sources[1].teachers == {"code": 0.8, "math": 0.5}
    assert (resolved.phases[0].loss.weight("forward_kl", 0), resolved.phases[0].loss.nll) == (2.0, 0.0)
    assert resolved.checkpoint.every == 7
    assert resolved.rollout.stop == ("a", "b")
    assert resolution.origins.at("optimizer", "lr") == Location("--set #7")
    assert resolution.origins.at("optimizer", "warmup_updates") == Location("recipes/merge.yaml", 33, 39)


def test_overrides_reach_into_short_forms(project: Path) -> None:
    resolved = plan(
        read(
            "recipes/merge.yaml",
            ["teachers.math.weight=2", "prompts.0.verifier.tolerance=0.5", "prompts.0.teachers.code=0.25"],
        )
    )
    assert resolved.sources[0].teachers == {"math": 2.0, "code": 0.2}
    assert resolved.sources[0].verifier.tolerance == 0.5


def test_a_name_with_a_dot_can_be_reached(variant) -> None:
    path = variant(("  chat:\n", "  qwen2.5:\n"))
    assert plan(read(path, ["teachers.qwen2.5.weight=4"])).sources[2].teachers == {"qwen2.5": 4.0}


def test_paths_in_overrides_start_from_the_recipes_project(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("data")
    assert plan(read("../recipes/merge.yaml", ["output=elsewhere"])).output == str(project / "elsewhere")


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("foo", "", "cannot read 'foo'"),
        ("a..b=1", "", "cannot read 'a..b=1'"),
        ("=1", "", "cannot read '=1'"),
        ("seed.x=1", "seed", "the value 17 has no keys"),
        ("prompts.3.share=1", "prompts", "this list has no entry '3'"),
        ("optimizer.lrr=1", "optimizer.lrr", "unknown key 'lrr'"),
        ("optimzer.lr=1", "optimzer", "unknown key 'optimzer'"),
        ("seed=[1", "", "not valid YAML: '[' is not closed"),
        ("seed=", "seed", "expected a whole number >= 0 and < 9223372036854775808, found nothing"),
    ],
)
def test_bad_overrides(project: Path, override: str, path: str, message: str) -> None:
    (problem,) = read("recipes/merge.yaml", ["checkpoint.keep=9", override]).problems
    assert (problem.location, problem.path, problem.message) == (Location("--set #2"), path, message)


# ------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"",
            "recipes/x.yaml | the file is empty; start from the recipe that `mergeopd new recipe NAME` writes",
        ),
        (
            b"# nothing\n",
            "recipes/x.yaml | the file is empty; start from the recipe that `mergeopd new recipe NAME` writes",
        ),
        (b"- a\n", "recipes/x.yaml:1:1 | expected keys with values at the top, found a list"),
        (b"\n  abc\n", "recipes/x.yaml:2:3 | expected keys with values at the top, found the value 'abc'"),
        (b"a: 1\nbc: \xff\n", "recipes/x.yaml:2:5 | not UTF-8 text: byte 0xFF; save the file as UTF-8"),
        (b"a: 1\nb: c\x01\n", "recipes/x.yaml:2:5 | not valid YAML: control character U+0001; remove it"),
        (
            b"a: b: c\n",
            "recipes/x.yaml:1:5 | not valid YAML: a second ': ' in one line; put it on a line of its own, or quote "
            'the value: "..."',
        ),
        (b"a: 1\nb: {c: 2\nd: 3\n", "recipes/x.yaml:2:4 | not valid YAML: '{' is not closed; add '}'"),
        (b"a: 1\nb:2\nc: 3\n", "recipes/x.yaml:2:1 | not valid YAML: no space after 'b:'; write 'b: ...'"),
        (b"a:2\nc: 3\n", "recipes/x.yaml:1:1 | not valid YAML: no space after 'a:'; write 'a: ...'"),
        (
            b"a:\n  b: 1\n c: 2\n",
            "recipes/x.yaml:3:2 | not valid YAML: the indentation matches no line above; indent the entries of a section "
            "equally",
        ),
        (
            b'a: "\\d+"\n',
            "recipes/x.yaml:1:6 | not valid YAML: in double quotes, 'd' cannot follow a backslash; use single "
            "quotes: '...'",
        ),
        (
            b'a: "b\nc: d\n',
            "recipes/x.yaml:1:4 | not valid YAML: a quote is opened here and not closed; close it, or quote the whole "
            "value",
        ),
        (
            b"a:\n\tb: c\n",
            "recipes/x.yaml:2:1 | not valid YAML: found character '\\t' that cannot start any token; indent with spaces",
        ),
        (
            b"a: {b: ${C}}\n",
            "recipes/x.yaml:1:9 | not valid YAML: expected ',' or '}', but got '{';"
            ' inside {...} and [...] put variables in quotes: "${NAME}"',
        ),
        (b"a: " + b"[" * 5000, "recipes/x.yaml | not a recipe: nested too deeply"),
        (b"a: 1\n---\nb: 2\n", "recipes/x.yaml:2:1 | not valid YAML: found another document"),
    ],
)
def test_files_that_are_no_recipe(project: Path, content: bytes, expected: str) -> None:
    Path("recipes/x.yaml").write_bytes(content)
    assert lines(read("recipes/x.yaml")) == [expected]


def test_missing_files_and_folders(project: Path) -> None:
    assert lines(read("recipes/mrge.yaml")) == [
        "recipes/mrge.yaml | no such file; did you mean 'recipes/merge.yaml'?"
    ]
    assert lines(read("recipes")) == ["recipes | this is a folder; name a YAML file"]
    assert lines(read("nowhere/at/all.yaml")) == ["nowhere/at/all.yaml | no such file"]


def test_a_byte_order_mark_and_windows_line_ends_are_harmless(project: Path) -> None:
    text = Path("recipes/merge.yaml").read_bytes().replace(b"\n", b"\r\n")
    Path("recipes/dos.yaml").write_bytes(b"\xef\xbb\xbf" + text)
    resolution = read("recipes/dos.yaml")
    assert plan(resolution).hash == plan(read("recipes/merge.yaml")).hash
    assert resolution.origins.at("seed") == Location("recipes/dos.yaml", 4, 7)


def test_all_duplicate_keys_are_found(variant) -> None:
    path = variant(("seed: 17", "seed: 17\nseed: 18"), ("share: 2", "share: 2, share: 3"))
    assert lines(read(path)) == [
        "recipes/variant.yaml:5:1  seed | duplicate key 'seed', first given in line 4",
        "recipes/variant.yaml:16:89  prompts[0].share | duplicate key 'share', first given in line 16",
    ]


def test_anchors_and_merge_keys(variant) -> None:
    path = variant(
        (
            "  code: {card: teachers/code.yaml, weight: 0.8}",
            "  code: &code {card: teachers/code.yaml, weight: 0.8}",
        ),
        ("    card: teachers/chat.yaml\n", "    <<: *code\n    card: teachers/chat.yaml\n"),
    )
    assert plan(read(path)).sources[2].teachers == {"chat": 0.8}


def test_an_alias_in_itself_and_unknown_tags(variant) -> None:
    path = variant(
        ("every: 10", "every: &a [*a]"), ("seed: 17", "seed: !foo 17"), ("models/base", "!!int models/base")
    )
    assert [(p.location.line, p.message) for p in read(path).problems] == [
        (4, "unknown YAML tag '!foo'"),
        (6, "'models/base' does not match its tag '!!int'"),
        (38, "this alias contains itself"),
    ]


def test_yaml_12_has_no_surprising_booleans_or_dates(variant) -> None:
    path = variant(('stop: ["\\n\\n"]', "stop: [on, no, 2024-01-01, 12:30:45, =]"))
    assert plan(read(path)).rollout.stop == ("on", "no", "2024-01-01", "12:30:45", "=")


@pytest.mark.parametrize("written", [r'"\ud83d\ude42"', '"\U0001f642"', r'"\U0001f642"'])
def test_json_escapes_of_a_character_are_that_character(variant, written: str) -> None:
    resolution = read(variant((r'stop: ["\n\n"]', f"stop: [{written}]")))
    assert plan(resolution).rollout.stop == ("\N{SLIGHTLY SMILING FACE}",)


@pytest.mark.parametrize("written", [r'"\ud83d"', r'"a\ude42b"', r'"\ude42\ud83d"'])
def test_half_a_character_is_refused_where_it_stands(variant, written: str) -> None:
    resolution = read(variant((r'stop: ["\n\n"]', f"stop: [{written}]")))
    [line] = lines(resolution)
    assert re.search(r"rollout\.stop\[0\] \| unpaired surrogate U\+D[89A-F]..; write the character", line)
    [line] = lines(read("recipes/merge.yaml", [f"name={written}"]))
    assert re.match(r"--set #1 \| unpaired surrogate", line)
