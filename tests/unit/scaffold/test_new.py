"""`mergeopd new`: files that pass the check, and errors for missing options."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from mergeopd.config.load import load_card
from mergeopd.config.parse import parse
from mergeopd.config.tree import SourceLocation, plain
from mergeopd.data.canary import sample_ids
from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.renderer import Renderer
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.engine.build import build
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.models import Machine, load_models
from mergeopd.engine.progress import Progress
from mergeopd.errors import Location, RecipeError, StorageError, TeacherError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.tokenizer import Tokenizer as OwnTokenizer
from mergeopd.preflight.inputs import advice, preflight
from mergeopd.recipe.jsonschema import card_schema, recipe_schema
from mergeopd.recipe.models import Canary, TeacherCard
from mergeopd.reporting.events import Reporters
from mergeopd.scaffold.files import quoted
from mergeopd.scaffold.recipe import NewRecipeOptions, new_recipe
from mergeopd.scaffold.teacher import (
    DEFAULT_PROMPT,
    NewTeacherOptions,
    card_text,
    probe,
    take_canary,
    write_card,
)

NASTY = [
    "",
    "yes",
    "null",
    "123",
    "1e5",
    "2024-01-01",
    "- a",
    "a: b",
    "a #b",
    "'\"\\",
    "{a, b}: [c]",
    "line\nline\r\n\ttab ",
    "${HOME} $${x} $",
    "Grüße, 世界 🦊",
    "\u0085\u2028\ufeff\x7f",
    "%&*!|>@`?",
    "x" * 5000,
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test keeps its models for the others."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def project(
    kept: Path, write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The models of `write_job` in a current folder without recipes and cards, prompts below data/."""
    if not (kept / "two").exists():
        write_job().unlink()
        for file in tmp_path.glob("*.yaml"):
            file.unlink()
        shutil.copytree(tmp_path, kept, dirs_exist_ok=True)
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for domain in ("left", "right"):
        Path(f"{domain}.jsonl").rename(f"data/{domain}.jsonl")
        Path(f"data/{domain}_eval.jsonl").write_text('{"prompt": "c d", "answer": "a"}\n')
    return tmp_path


def make_card(name: str, model: str, domains: Sequence[str] = (), prompt: str = "a b c") -> TeacherCard:
    """What `mergeopd new teacher` does; the card as it is read again."""
    options = NewTeacherOptions(name, model, domains, None, prompt)
    probed = probe(options)
    write_card(options, probed.fingerprint, take_canary(probed, prompt))
    return read_card(options.card_file)


def read_card(path: Path) -> TeacherCard:
    loaded = load_card(path, {}, ())
    assert loaded.root is not None
    assert not loaded.problems
    return TeacherCard.model_validate(plain(loaded.root))


def run(recipe: Path, *overrides: str) -> None:
    inputs = preflight(recipe, overrides)
    parts = load_models(inputs, Machine(torch.device("cpu"), SingleProcess()))
    build(parts, reporter=Reporters(), clock=Clock(), interrupt=Interrupt()).run(Progress(), None)


TWO_UPDATES = (
    "phases.0.updates=2",
    "phases.0.updates_per_round=1",
    "phases.0.prompts_per_round=4",
    "optimizer.warmup_updates=0",
    "rollout.max_new_tokens=4",
)

# --------------------------------------------------------------------------------------------- quoting


# A recipe may have no NUL character.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_is_read_again_as_it_was(text: str) -> None:
    check_quoting(text)


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_are_read_again_as_they_were(text: str) -> None:
    check_quoting(text)


def check_quoting(text: str) -> None:
    scalar = quoted(text)
    assert "\n" not in scalar
    document = f"block: {scalar}   # comment\nflow: {{a: {scalar}, b: [{scalar}]}}\n"
    root, problems = parse(document, SourceLocation(Location("x.yaml"), Path()), {})
    assert problems == ()
    assert root is not None
    assert plain(root) == {"block": text, "flow": {"a": text, "b": [text]}}


TEXTS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
)  # no YAML has NUL


@given(
    TEXTS,
    TEXTS,
    st.lists(st.floats(-99, 0).map(lambda x: round(x, 3) + 0.0), min_size=1),
)
@example('say "a": #b', "${HOME}\n\n- c", [-0.0])
def test_a_card_can_have_any_prompt_and_response(prompt: str, response: str, logprobs: list[float]) -> None:
    canary = Canary(prompt=prompt, response=response, logprobs=tuple(logprobs))
    text = card_text(
        NewTeacherOptions("123", "null", ("yes", "1.0"), Path("a: b.jinja"), prompt), "0" * 64, canary
    )
    root, problems = parse(text, SourceLocation(Location("x.yaml"), Path()), {})
    assert problems == ()
    assert root is not None
    card = TeacherCard.model_validate(plain(root))
    assert card.canary == canary
    assert (card.name, card.model, card.template, card.domains) == (
        "123",
        "null",
        "a: b.jinja",
        ("yes", "1.0"),
    )


# --------------------------------------------------------------------------------------------- teachers


def test_a_card_has_the_models_response(project: Path) -> None:
    """Greedy answer and log-probabilities against transformers itself."""
    card = make_card("two", "two")
    assert card.fingerprint == Checkpoint.open(project / "two").fingerprint
    assert (card.model, card.domains) == ("two", ("two",))
    model = AutoModelForCausalLM.from_pretrained(project / "two")
    prompt = torch.tensor([[0, 1, 2]])  # a b c
    written = model.generate(prompt, do_sample=False, max_new_tokens=64, pad_token_id=4, eos_token_id=4)[
        0, 3:
    ]
    ids = [i for i in written.tolist() if i != 4]
    assert card.canary is not None
    assert card.canary.response == " ".join("abcd"[i] for i in ids)
    with torch.no_grad():
        logits = model(torch.tensor([[0, 1, 2, *ids]])).logits[0, 2:-1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    assert card.canary.logprobs == pytest.approx(wanted, abs=0.0006)


def test_padding_rows_have_no_effect(project: Path) -> None:
    card = make_card("one", "one", prompt="d")
    assert card.canary is not None
    model = AutoModelForCausalLM.from_pretrained(project / "one")
    ids = ["abcd".index(word) for word in card.canary.response.split()]
    prompt = [0, 1, 2, 3, 0, 1, 2, 3]  # its template writes seven tokens before
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1, :5]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    assert card.canary.logprobs == pytest.approx(wanted, abs=0.0006)


def write_byte_tokenizer(folder: Path) -> None:
    """Every byte is a token, so that a random model writes what is no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_responses_that_are_not_valid_text_are_used_as_canaries(
    project: Path, make_model: Callable[..., Path]
) -> None:
    folder = make_model("bytes", seed=1, vocab=257, eos=256, tied=False, spread=1.0)
    write_byte_tokenizer(folder)
    options = NewTeacherOptions("bytes", str(folder), (), None, DEFAULT_PROMPT)
    probed = probe(options)
    canary = take_canary(probed, options.prompt)
    ids = sample_ids(probed.renderer, options.prompt, canary.response)[1]
    assert 1 <= len(ids) == len(canary.logprobs) <= 64
    write_card(options, probed.fingerprint, canary)
    assert read_card(options.card_file).canary == canary
    # As a teacher of itself it passes its canary.
    Path("data/own.jsonl").write_text('{"prompt": "hello"}\n')
    new_recipe(NewRecipeOptions("bytes", str(folder), ["teachers/bytes.yaml"], ["bytes=data/own.jsonl"]))
    run(Path("recipes/bytes.yaml"), *TWO_UPDATES, "phases.0.updates=1")


def test_the_date_does_not_change_a_canary(project: Path) -> None:
    tokenizer = OwnTokenizer.load(project / "one")
    source = "{% if strftime_now('%Y-%m-%d') == '2026-01-01' %}a b{% else %}c d{% endif %}"
    samples = {
        sample_ids(
            Renderer(tokenizer, ChatTemplate(source, {}, now=lambda day=day: day), 5, (4,), 64), "a", "b"
        )
        for day in (datetime(1999, 1, 1), datetime(2026, 6, 1))
    }
    assert samples == {((0, 1), (1,))}


def test_a_card_that_is_there_is_left_alone(project: Path) -> None:
    Path("teachers").mkdir()
    Path("teachers/two.yaml").write_text("mine")
    with pytest.raises(StorageError, match=r"teachers/two.yaml exists already; choose another name"):
        make_card("two", "two")
    assert Path("teachers/two.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("a b", "two"), "NAME\n    'a b' cannot be the name of a teacher; use letters"),
        (("../x", "two"), "NAME\n    '../x' cannot be the name of a teacher; use letters"),
        (("x", "twoo"), "--model\n    unknown model folder 'twoo'; did you mean 'two'?"),
        (("x", "data"), "--model\n    data: the folder has no config.json; name a Hugging Face model folder"),
        (("x", "two", ("a/b",)), "--domain\n    'a/b' cannot be the name of a domain"),
        (("x", "two", (), Path("no.jinja")), "--template\n    unknown template 'no.jinja'"),
        (("x", "two", (), Path("bad.jinja")), "--template\n    bad.jinja:1: not a Jinja template"),
        (("x", "two", (), None, ""), "--prompt\n    is empty or not valid"),
        (("x", "two", (), None, "\udcff"), "--prompt\n    is empty or not valid"),
        (("x", "two", (), None, "a " * 200), "--prompt\n    takes 200 tokens, and the teacher's context holds 128"),
        (("x", "two", (), None, " "), "--prompt\n    takes 0 tokens"),
        (("x", "one", (), None, "a b c"), "--prompt\n    the teacher responds with no token; choose another"),
    ],
)  # fmt: skip
def test_mistakes_are_located_at_options(project: Path, options: tuple[object, ...], told: str) -> None:
    Path("bad.jinja").write_text("{% if %}")
    defaults = ("x", "two", (), None, "a")
    name, model, domains, template, prompt = (*options, *defaults[len(options) :])
    asked = NewTeacherOptions(name, model, domains, template, prompt)  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as error:
        take_canary(probe(asked), asked.prompt)
    assert str(error.value).startswith(told)
    assert not Path("teachers").exists()


def test_a_tokenizer_without_template_is_reported(project: Path) -> None:
    config = json.loads(Path("two/tokenizer_config.json").read_text())
    del config["chat_template"]
    Path("two/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"no chat template.*or name one with --template FILE.jinja"):
        make_card("two", "two")
    Path("own #1.jinja").write_text("a {{ messages[0].content }}")
    options = NewTeacherOptions("two", "two", (), Path("own #1.jinja"), "a")
    probed = probe(options)
    write_card(options, probed.fingerprint, take_canary(probed, "a"))
    assert read_card(options.card_file).template == "own #1.jinja"


def damage(folder: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(f"{folder}/model.safetensors")
    change(weights)
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w["lm_head.weight"].zero_(), "'two' gives all 5 tokens the same probability"),
        (lambda w: w["lm_head.weight"].fill_(math.nan), "NaN"),
        (lambda w: w["model.norm.weight"].fill_(math.nan), "NaN"),
    ],
)
def test_a_bad_model_gets_no_card(project: Path, change: Callable[..., object], told: str) -> None:
    damage("two", change)
    with pytest.raises(TeacherError, match=told):
        make_card("two", "two")
    assert not Path("teachers").exists()


# ---------------------------------------------------------------------------------------------- recipes


def test_the_projects_files_become_a_recipe_that_runs(project: Path) -> None:
    make_card("one", "one", ["left", "right"], prompt="d")
    make_card("two", "two", ["right"])
    inputs, left_out = new_recipe(NewRecipeOptions("both", "base", (), ()))
    plan = inputs.plan
    assert left_out == ()
    assert inputs.notes == ()
    assert plan == preflight("recipes/both.yaml").plan
    assert advice(plan) is None
    assert {s.name: (s.domain, s.teachers) for s in plan.sources} == {
        "left": ("left", {"one": 1.0}),
        "right": ("right", {"one": 1.0, "two": 1.0}),
    }
    assert plan.evaluation is not None
    assert [s.name for s in plan.evaluation.sources] == ["left_eval", "right_eval"]
    assert plan.evaluation.experts == {"left": "one", "right": "one"}
    assert plan.rollout.max_new_tokens == 64  # half of the context
    run(Path("recipes/both.yaml"), *TWO_UPDATES)
    assert Path("runs/both/result.json").is_file()


def test_a_new_card_stops_other_weights(project: Path) -> None:
    make_card("one", "one", ["left"], prompt="d")
    new_recipe(NewRecipeOptions("r", "base", (), ()))
    card = Path("teachers/one.yaml")
    card.write_text("\n".join(line for line in card.read_text().splitlines() if "fingerprint:" not in line))
    torch.manual_seed(5)
    damage("one", lambda w: [t.copy_(torch.randn_like(t)) for n, t in w.items() if "layers.1.mlp" in n])
    with pytest.raises(TeacherError, match="'one' is not the model its card describes"):
        run(Path("recipes/r.yaml"), *TWO_UPDATES)


def write_cards(**domains: Sequence[str]) -> None:
    Path("teachers").mkdir(exist_ok=True)
    for name, listed in domains.items():
        card = {"card": 1, "name": name, "model": "two", "domains": listed}
        Path(f"teachers/{name}.yaml").write_text(json.dumps(card))


def test_only_the_given_files_are_used(project: Path) -> None:
    write_cards(a=["left"], b=["right"], c=[])
    options = NewRecipeOptions(
        "r", "base", ["teachers/a.yaml", "teachers/c.yaml"], ["data/left.jsonl", "c=data/right.jsonl"]
    )
    plan = new_recipe(options)[0].plan
    assert {s.name: s.teachers for s in plan.sources} == {"left": {"a": 1.0}, "right": {"c": 1.0}}
    assert plan.evaluation is None


def test_files_that_do_not_fit_are_left_out_with_a_note(project: Path) -> None:
    write_cards(a=["left"], b=["right"], c=["poems"])
    Path("teachers/w.yaml").write_text("card: 1\nname: w\napi: {url: 'https://host/v1', model: writer}\n")
    Path("data/misc.jsonl").write_text('{"prompt": "a"}\n')
    Path("data/right_eval.jsonl").write_text('{"prompt": "a"}\n')
    inputs, left_out = new_recipe(NewRecipeOptions("r", "base", (), ()))
    assert set(inputs.plan.teachers) == {"a", "b"}
    assert left_out == (
        "teachers/w.yaml: a model behind an API writes text only; add it to the recipe by hand",
        "data/misc.jsonl: its name contains none of the domains left, right, poems",
        "data/right_eval.jsonl: no verifier fits all of its references",
        "teachers/c.yaml: no prompts for teacher 'c' (domain poems)",
    )
    text = Path("recipes/r.yaml").read_text()
    assert all(f"# left out: '{note}'" in text or f"# left out: {note}" in text for note in left_out[:3])


def test_the_names_and_fields_of_data_sets(project: Path) -> None:
    write_cards(**{"math-word": ["math-word"], "math": ["math"], "tool.use": ["tool"]})
    rows = {
        "data/Math_Word/train #1.jsonl": {"question": "a", "answer": "a b #### 1,000"},
        "data/math.test.jsonl": {"problem": "b", "solution": "12"},
        "data/math.jsonl": {"prompt": "a", "answer": "long " * 30},
        "data/tool: x.jsonl": {"messages": [{"role": "user", "content": "a"}], "target": '{"a": 1}'},
    }
    for file, row in rows.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(json.dumps(row) + "\n")
    inputs, _ = new_recipe(NewRecipeOptions("r", "base", (), ()))
    found = [*inputs.plan.sources, *(inputs.plan.evaluation.sources if inputs.plan.evaluation else ())]
    assert {
        s.name: (s.domain, s.verifier.kind if s.verifier else None, s.prompt_field, s.reference_field)
        for s in found
    } == {
        "train #1": ("math-word", "number", "question", "answer"),
        "math.test": ("math", "number", "problem", "solution"),
        "math": ("math", None, "prompt", "answer"),
        "tool: x": ("tool", "json", "messages", "target"),
    }


def test_all_missing_options_are_reported_at_once(project: Path) -> None:
    for file in Path("data").iterdir():
        file.unlink()
    with pytest.raises(RecipeError) as error:
        new_recipe(NewRecipeOptions("r", None, (), ()))
    assert [(p.location.file, p.message) for p in error.value.problems] == [
        ("--teacher", "no card was given, and there is none in teachers/"),
        ("--student", "missing option: the model to train"),
        ("--prompts", "no prompt file was given, and there is none below data/"),
    ]
    write_cards(a=["left"])
    with pytest.raises(RecipeError, match="name its folder: --student DIR, perhaps base or one"):
        new_recipe(NewRecipeOptions("r", None, (), ()))
    assert not Path("recipes").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("r/s",), "NAME\n    'r/s' cannot be the name of a recipe"),
        (("r", "bas"), "--student\n    unknown model folder 'bas'; did you mean 'base'?"),
        (("r", "data"), "--student\n    data: has no weights"),
        (("r", "base", ["teachers/d.yaml"]), "--teacher\n    unknown card 'teachers/d.yaml'"),
        (("r", "base", (), ["data/no.jsonl"]), "--prompts\n    unknown prompt file 'data/no.jsonl'"),
        (("r", "base", (), ["lef=data/left.jsonl"]), "--prompts\n    no teacher has the domain 'lef'; did you mean 'left'?"),
        (("r", "base", (), ["x.jsonl"]), "--prompts\n    the name 'x.jsonl' contains none of the domains left, right; name the domain: --prompts left=x.jsonl"),
        (("r", "base", ["teachers/b.yaml"], ["right=data/bad.jsonl"]), "--prompts  prompts[0].source\n    data/bad.jsonl: 1 of 1 row cannot be used"),
        (("r", "base", ["teachers/a.yaml", "teachers/b.yaml"], ["data/left.jsonl"]), "--prompts\n    no prompts for teacher 'b' (domain right); name a file: --prompts right=FILE"),
        (("r", "base", ["wrong.yaml"]), "wrong.yaml:2:1  nam\n"),
    ],
)  # fmt: skip
def test_an_invalid_recipe_is_reported_and_not_written(
    project: Path, options: tuple[object, ...], told: str
) -> None:
    write_cards(a=["left"], b=["right"])
    Path("x.jsonl").write_text('{"prompt": "a"}\n')
    Path("data/bad.jsonl").write_text("{}\n")
    Path("wrong.yaml").write_text("card: 1\nnam: x\nmodel: two\n")
    asked = (
        NewRecipeOptions(*(*options, None, (), ())[:4])
        if len(options) < 2
        else NewRecipeOptions(*(*options, (), ())[:4])
    )  # type: ignore[arg-type]
    with pytest.raises(RecipeError) as error:
        new_recipe(asked)
    assert str(error.value).startswith(told)
    assert not Path("recipes").exists()


def test_a_recipe_that_is_there_is_left_alone(project: Path) -> None:
    Path("recipes").mkdir()
    Path("recipes/r.yaml").write_text("mine")
    with pytest.raises(
        StorageError, match=r"recipes/r.yaml exists already; choose another name, or remove it"
    ):
        new_recipe(NewRecipeOptions("r", "base", (), ()))
    assert Path("recipes/r.yaml").read_text() == "mine"


def schema_of(file: Path) -> Any:
    """The schema that a file names in its first line, as editors find it."""
    line = file.read_text().splitlines()[0]
    return json.loads((file.parent / line.removeprefix("# yaml-language-server: $schema=")).read_text())


def test_new_files_name_a_schema_that_is_there_and_accepts_them(project: Path) -> None:
    make_card("one", "one", ["left", "right"], prompt="d")
    new_recipe(NewRecipeOptions("r", "base", (), ()))
    for file, schema in (("teachers/one.yaml", card_schema()), ("recipes/r.yaml", recipe_schema())):
        assert schema_of(Path(file)) == schema
        jsonschema.validate(YAML(typ="safe").load(Path(file).read_text()), schema)
    Path("docs/schema").mkdir(parents=True)
    Path("docs/schema/recipe.schema.json").write_text('"of the project"')
    new_recipe(NewRecipeOptions("s", "base", (), ()))
    assert schema_of(Path("recipes/s.yaml")) == "of the project"


def test_every_line_of_a_recipe_fits_a_screen(project: Path) -> None:
    write_cards(a=["left"], b=["right"])
    new_recipe(NewRecipeOptions("r", "base", (), ()))
    text = Path("recipes/r.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 110
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert set(YAML(typ="safe").load(text)["teachers"]) == {"a", "b"}
