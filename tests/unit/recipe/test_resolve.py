"""The plan of a valid recipe, and the problems of settings that contradict each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergeopd.config.folders import project_folder
from mergeopd.errors import Location
from mergeopd.recipe.resolve import read
from mergeopd.recipe.served import Served


def problems(path: Path | str, overrides: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    return [(p.path, p.message, p.remedy) for p in read(path, overrides).problems]


def test_a_good_recipe_becomes_a_plan_with_absolute_paths_and_all_defaults(project: Path) -> None:
    resolution = read("recipes/merge.yaml")
    assert resolution.problems == ()
    plan = resolution.plan
    assert plan is not None
    assert plan.recipe_file == str(project / "recipes" / "merge.yaml")
    assert plan.threads == len(os.sched_getaffinity(0))
    assert plan.student.model == str(project / "models" / "base")
    assert plan.teachers["chat"].model_dump() == {
        "name": "chat",
        "student": None,
        "model": str(project / "models" / "chat"),
        "tokenizer": str(project / "models" / "chat"),
        "template": None,
        "template_arguments": {},
        "dtype": "bfloat16",
        "bridge": None,
        "system": None,
        "prompt": None,
        "fingerprint": None,
        "canary": None,
        "weight": 1.0,
        "licence": "Apache-2.0",
        "api": None,
        "targets": None,
        "served": None,
        "residency": "auto",
        "quantize": None,
    }
    for key in ("licence", "residency"):  # may change when a run is resumed
        assert key not in plan.content["teachers"]["chat"]
    served = Served(url=["http://127.0.0.1:1"], engine="vllm")
    chat = plan.teachers["chat"].model_copy(update={"served": served})
    moved = plan.model_copy(update={"teachers": {**plan.teachers, "chat": chat}})
    assert moved.content["teachers"]["chat"]["served"] == {"engine": "vllm", "hidden_states": False}
    assert [source.name for source in plan.sources] == ["math", "code", "chat"]
    # Prompt weight x card weight; the third source names no teacher, and chat's card lists its domain.
    assert [source.teachers for source in plan.sources] == [
        {"math": 1.0},
        {"code": 0.8, "math": 0.2},
        {"chat": 1.0},
    ]
    assert [source.response_field for source in plan.sources] == ["response"] * 3
    assert plan.sources[1].verifier.schema_file == str(project / "data" / "answer.schema.json")
    assert plan.evaluation is not None
    assert plan.evaluation.experts == {"math": "math", "code": "code"}
    assert plan.evaluation.suites[0].max_new_tokens == 64
    assert [(s.name, s.response_field, s.limit, s.teachers) for s in plan.evaluation.sources] == [
        ("math_eval", None, 256, {}),
        ("code_eval", None, None, {}),
    ]
    assert plan.output == str(project / "runs" / "three-experts")
    assert plan.num_updates == 100
    assert dict(resolution.sources) == dict(enumerate(plan.sources))
    assert dict(resolution.eval_sources) == dict(enumerate(plan.evaluation.sources))
    assert resolution.teachers == plan.teachers
    assert resolution.student == plan.student


def test_the_hash_covers_the_settings_that_identify_a_run(project: Path) -> None:
    base, again = read("recipes/merge.yaml").plan, read("recipes/merge.yaml", ["output=elsewhere"]).plan
    other = read("recipes/merge.yaml", ["seed=18"]).plan
    assert base.hash == again.hash != other.hash


def test_origins_lead_into_cards_and_fall_back_to_parents(project: Path) -> None:
    at = read("recipes/merge.yaml").origins.at
    assert at("teachers", "math", "card") == Location("recipes/merge.yaml", 9, 9)
    assert at("teachers", "code", "card") == Location("recipes/merge.yaml", 10, 16)
    assert at("teachers", "math", "card", "model") == Location("teachers/math.yaml", 3, 8)
    assert at("teachers", "math", "card", "domains", 0) == Location("teachers/math.yaml", 4, 11)
    assert at("teachers", "math", "card", "tokenizer") == Location("teachers/math.yaml", 1, 1)
    assert at("teachers", "math", "weight") == Location("recipes/merge.yaml", 9, 9)
    assert at("teachers", "chat", "weight") == Location("recipes/merge.yaml", 11, 3)
    assert at("prompts", 2, "share") == Location("recipes/merge.yaml", 20, 5)
    assert at("threads") == Location("recipes/merge.yaml", 2, 1)
    problem = read("recipes/merge.yaml").origins.problem(("prompts", 0, "source"), "m", "r")
    assert (problem.path, problem.location.column) == ("prompts[0].source", 14)
    assert (
        read("recipes/merge.yaml").origins.problem(("optimizer", "lr"), "m", key=True).location.column == 13
    )


def test_files_outside_the_current_folder_are_shown_as_given(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("data")
    origins = read("../recipes/merge.yaml").origins
    assert origins.at("seed").file == "../recipes/merge.yaml"
    assert origins.at("teachers", "math", "card", "model").file == str(project / "teachers" / "math.yaml")


@pytest.mark.parametrize(
    ("file", "marker", "folder"),
    [
        ("/p/recipes/a.yaml", "recipes", "/p"),
        ("/p/recipes/deep/er/a.yaml", "recipes", "/p"),
        ("/p/recipes/q/recipes/a.yaml", "recipes", "/p/recipes/q"),
        ("/p/else/a.yaml", "recipes", "/p/else"),
        ("/p/recipes/a.yaml", "teachers", "/p/recipes"),
        ("/p/teachers/a.yaml", "teachers", "/p"),
    ],
)
def test_project_folder(file: str, marker: str, folder: str) -> None:
    assert project_folder(Path(file), marker) == Path(folder)


def test_the_home_folder_is_expanded(variant, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project / "models"))
    plan = read(variant(("models/base", "~/base"), ("runs/three-experts", "~/run"))).plan
    assert plan.student.model == str(project / "models" / "base")
    assert plan.output == str(project / "models" / "run")


def test_equal_stems_get_numbered_names(variant, project: Path) -> None:
    for name in ("a", "b"):
        (project / "data" / name).mkdir()
        (project / "data" / name / "math.jsonl").write_text("{}\n")
    path = variant(("data/chat.jsonl", "data/a/math.jsonl"), ("data/math_eval.jsonl", "data/b/math.jsonl"))
    plan = read(path).plan
    assert [s.name for s in (*plan.sources, *plan.evaluation.sources)] == [
        "math",
        "code",
        "math#2",
        "math#3",
        "code_eval",
    ]


def test_a_card_may_name_a_tokenizer_and_a_template(project: Path) -> None:
    card = project / "teachers" / "math.yaml"
    (project / "models" / "chat.jinja").write_text("{{ messages }}")
    card.write_text(card.read_text() + "tokenizer: models/base\ntemplate: models/chat.jinja\n")
    teacher = read("recipes/merge.yaml").plan.teachers["math"]
    assert teacher.tokenizer == str(project / "models" / "base")
    assert teacher.template == str(project / "models" / "chat.jinja")
    card.write_text(
        card.read_text().replace("chat.jinja", "chta.jinja").replace("models/base", "./models/bas")
    )
    assert problems("recipes/merge.yaml") == [
        (
            "teachers.math.card.tokenizer",
            "unknown tokenizer folder './models/bas'",
            "did you mean 'models/base'?",
        ),
        (
            "teachers.math.card.template",
            "unknown template 'models/chta.jinja'",
            "did you mean 'models/chat.jinja'?",
        ),
    ]


def test_two_teachers_may_share_a_card_and_its_mistakes_are_reported_once(variant, project: Path) -> None:
    path = variant(("teachers/code.yaml", "teachers/math.yaml"))
    assert read(path).plan.teachers["code"].model == read(path).plan.teachers["math"].model
    card = project / "teachers" / "math.yaml"
    card.write_text(card.read_text().replace("models/math", "./models/mth"))
    assert problems(path) == [
        ("teachers.math.card.model", "unknown model folder './models/mth'", "did you mean 'models/math'?")
    ]


# ------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds `some-org/some-model`, branch main."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    repo = cache / "models--some-org--some-model"
    (repo / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (repo / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return repo / "snapshots" / ("a" * 40)


def test_a_hub_id_in_the_local_cache_is_its_snapshot_folder(variant, hub: Path) -> None:
    path = variant(("models/base", "some-org/some-model"))
    assert read(path).plan.student.model == str(hub)
    assert read(path, ["student.revision=main"]).plan.student.model == str(hub)
    assert problems(path, ("student.revision=v2",)) == [
        (
            "student.model",
            "'some-org/some-model' is neither a folder nor at revision 'v2' in the local cache of the Hugging Face hub",
            "download it (`hf download some-org/some-model --revision v2`), or name a folder",
        )
    ]


def test_folders_have_no_revision(project: Path) -> None:
    assert problems("recipes/merge.yaml", ("student.revision=main",)) == [
        ("student.model", "'models/base' is a folder, and folders have no revision", "remove `revision`")
    ]


# -------------------------------------------------------------------------------------------- what clashes

NLL = "nll on the student's own responses only reinforces them"


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("prompts.0.teachers=maht", "prompts[0].teachers.maht", "unknown teacher 'maht'"),
        ("prompts.0.teachers=[math, cdoe]", "prompts[0].teachers.cdoe", "unknown teacher 'cdoe'"),
        (
            "prompts.0.teachers=[math, math]",
            "prompts[0].teachers",
            "teacher 'math' is named twice: name it once, or give weights",
        ),
        ("prompts.0.teachers={math: 0}", "prompts[0].teachers", "every teacher has weight 0 here (math)"),
        ("teachers.chat.weight=0", "prompts[2].domain", "every teacher has weight 0 here (chat)"),
        (
            "prompts.0.source=recipes/merge.yaml",
            "prompts[0].source",
            "'recipes/merge.yaml' is not a .jsonl, .json, .csv or .parquet file",
        ),
        (
            "prompts.0.split=train",
            "prompts[0].split",
            "'data/math.jsonl' is a file, and files have no `split`",
        ),
        (
            "prompts.0.source=data/code.jsonl",
            "prompts[1].source",
            "'data/code.jsonl' is already listed at prompts[0]",
        ),
        (
            "evaluation.prompts.0.source=data/../data/math.jsonl",
            "evaluation.prompts[0].source",
            "'data/../data/math.jsonl' is also trained on (prompts[0])",
        ),
        (
            "evaluation.prompts.0.source=data/code_eval.jsonl",
            "evaluation.prompts[1].source",
            "'data/code_eval.jsonl' is already listed at evaluation.prompts[0]",
        ),
        ("evaluation.prompts.0.expert=mth", "evaluation.prompts[0].expert", "unknown teacher 'mth'"),
        (
            "evaluation.prompts.0.domain=mth",
            "evaluation.prompts[0].domain",
            "no training prompts of domain 'mth', so no teacher to compare with",
        ),
        (
            "evaluation.prompts.0={source: data/math_eval.jsonl, domain: code, expert: math, verifier: exact}",
            "evaluation.prompts[1].expert",
            "domain 'code' is compared with 'math' at evaluation.prompts[0]",
        ),
        (
            "prompts.0.teachers={math: 1, code: 1.25}",
            "evaluation.prompts[0].domain",
            "teachers math and code weigh the same in domain 'math'",
        ),
        ("phases.0.text=student", "phases[0].loss.nll", NLL),
        ("phases.0.text={on_policy_fraction: 1, otherwise: dataset}", "phases[0].loss.nll", NLL),
        ("phases.1.name=cold_start", "phases[1].name", "phase 'cold_start' is already defined at phases[0]"),
        (
            "phases.1.updates_per_round=3",
            "phases[1].updates_per_round",
            "80 updates cannot be made in rounds of 3",
        ),
        (
            "phases.1.prompts_per_round=1",
            "phases[1].updates_per_round",
            "a round has 2 responses (prompts_per_round x samples_per_prompt) for 4 updates",
        ),
        (
            "optimizer.warmup_updates=101",
            "optimizer.warmup_updates",
            "101 warm-up updates, but only 100 updates in all phases",
        ),
        (
            "phases.1.balance.tokens={math: 1, code: 1, caht: 1}",
            "phases[1].balance.tokens.caht",
            "no prompts of domain 'caht'",
        ),
        ("phases.1.balance.tokens={math: 1, code: 1}", "phases[1].balance.tokens", "no share for 'chat'"),
        (
            "phases.1.balance.tokens={math: 0, code: 0, chat: 0}",
            "phases[1].balance.tokens",
            "every share is 0",
        ),
        (
            "prompts.0.verifier={kind: user, function: 'a:b'}",
            "prompts[0].verifier.function",
            "'a:b' is not in `allow_code`",
        ),
        (
            "prompts.1.verifier.schema_file=data/none",
            "prompts[1].verifier.schema_file",
            "unknown JSON Schema file 'data/none'",
        ),
        ("teachers.math=math.yaml", "teachers.math.card", "unknown card 'math.yaml'"),
        (f"prompts.0.source={'x' * 300}", "prompts[0].source", f"unknown prompt file '{'x' * 300}'"),
        ("output=data/math.jsonl", "output", "'data/math.jsonl' is a file"),
        ("student.model=data/math.jsonl", "student.model", "'data/math.jsonl' is a file"),
        ("teachers.spare=teachers/math.yaml", "teachers.spare", "no prompts are routed to teacher 'spare'"),
        (
            "phases.0.loss={nll: 1, temperature: 2}",
            "phases[0].loss",
            "nll is defined at temperature 1: remove the temperature or the nll term",
        ),
        (
            "phases.0.loss={reverse_kl: 0}",
            "phases[0].loss",
            "all weights are zero: give at least one term a positive weight",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_reported(
    project: Path, override: str, path: str, message: str
) -> None:
    assert (path, message) in [entry[:2] for entry in problems("recipes/merge.yaml", (override,))]
    if "spare" not in override:  # `spare` has math's card, and prompts without teachers reach every such card
        assert len(problems("recipes/merge.yaml", (override,))) == 1


def test_a_full_warm_up_and_a_mixture_with_nll_are_accepted(project: Path) -> None:
    overrides = (
        "optimizer.warmup_updates=100",
        "phases.0.text={on_policy_fraction: 0.99, otherwise: dataset}",
    )
    assert problems("recipes/merge.yaml", overrides) == []


def test_an_allowed_function_is_accepted(project: Path) -> None:
    overrides = ("prompts.0.verifier={kind: user, function: 'a:b'}", "allow_code=['a:b']")
    assert problems("recipes/merge.yaml", overrides) == []


def test_the_heaviest_teacher_of_a_domain_is_its_expert(project: Path) -> None:
    """1.0 x 0.8 x 1 for code against 3 x 1.0 x 1 for math, in the one code source."""
    plan = read("recipes/merge.yaml", ["prompts.1.teachers.math=3", "evaluation.prompts.1.expert=null"]).plan
    assert plan.evaluation.experts == {"math": "math", "code": "math"}


def test_a_mistake_in_one_section_hides_nothing_in_the_others(variant) -> None:
    path = variant(
        ("optimizer:", "optimzer:"),
        ("teachers/code.yaml", "teachers/cde.yaml"),
        ("data/chat.jsonl", "data/caht.jsonl"),
        ("models/base", "./models/bsae"),
        ("{source: data/math.jsonl,", "{source: data/math.jsonl, shre: 3,"),
        ("data/math_eval.jsonl", "data/chat_evl.jsonl"),
        ("updates_per_round: 4", "updates_per_round: 7"),
    )
    resolution = read(path)
    assert [p.path for p in resolution.problems] == [
        "student.model",
        "teachers.code.card",
        "prompts[0].shre",
        "prompts[2].source",
        "phases[1].updates_per_round",
        "optimzer",
        "evaluation.prompts[0].source",
    ]
    assert resolution.plan is None
    assert (set(resolution.teachers), set(resolution.sources)) == ({"math", "chat"}, {1})
    assert set(resolution.eval_sources) == {1}


def test_reading_a_recipe_leaves_the_heavy_libraries_out(project: Path) -> None:
    code = (
        "import sys\nfrom mergeopd.recipe.resolve import read\n"
        "assert read('recipes/merge.yaml').plan is not None\n"
        "print(*[m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
