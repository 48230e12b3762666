"""The experts of five kinds: correct responses, and conversations with tools as the package renders and runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from small_experts import TOOLS, small_agents  # puts tools/ on the path
from tiny_experts.agent import tasks
from tiny_experts.agent.build import CORPUS, NUM_RESULTS, material
from tiny_experts.agent.settings import AGENT, AGENT_FOLDER, agent_key
from tiny_experts.build import Material
from tiny_experts.cache import cache_key, written_aside
from tiny_experts.tokens import END_ID, Encoded

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.prompts import read_prompts
from mergeopd.data.renderer import Renderer
from mergeopd.distributed.communicator import SingleProcess
from mergeopd.environment.episodes import Environments
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.environments import Environment
from mergeopd.recipe.plan import SourcePlan
from mergeopd.recipe.verifiers import Verifier
from mergeopd.reward.verifiers import build_verifier
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.types import Prompt, token_ids

VERIFIERS = {
    "math": "math",
    "code": "python_tests",
    "search": "exact",
    "tools": "number",
    "chat": "instruction_following",
}
SETTINGS = replace(small_agents(1), rows={"eval": 20, "train": 300})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Material]:
    folder = tmp_path_factory.mktemp("agent")
    return folder, material(folder, SETTINGS, 0)


def prompts(folder: Path, domain: str) -> tuple[Prompt, ...]:
    fields = {"name": domain, "domain": domain, "teachers": {}, "share": 1.0, "limit": None}
    fields |= {"prompt_field": "prompt", "reference_field": "answer", "response_field": "response"}
    source = str(folder / f"data/eval_{domain}.jsonl")
    return read_prompts(
        SourcePlan.model_validate({**fields, "source": source, "verifier": {"kind": VERIFIERS[domain]}})
    )


def test_responses_are_right(made: tuple[Path, Material]) -> None:
    """By the verifiers of the recipe; with a word or a digit changed they are wrong."""
    for domain, kind in VERIFIERS.items():
        verify = build_verifier(TypeAdapter(Verifier).validate_python({"kind": kind}), ())
        for prompt in prompts(made[0], domain):
            response = prompt.response if isinstance(prompt.response, str) else prompt.response[-1].content  # type: ignore[index]
            assert verify(response, prompt.reference) == 1.0
            spoilt = {"code": response.replace("return x", "return x + 1"), "chat": response.swapcase()[2:]}
            spoilt |= {"math": re.sub(r"{\d+", "{99", response)}
            assert verify(spoilt.get(domain, f"not {response} 0"), prompt.reference) == 0.0


def test_answers_follow_from_the_prompts_alone(made: tuple[Path, Material]) -> None:
    folder = made[0]
    facts = [json.loads(line)["text"] for line in (folder / "data" / CORPUS).read_text().splitlines()]
    for prompt in prompts(folder, "math"):
        terms = re.findall(r"[-+]?\d+", prompt.messages[0].content.replace(" ", ""))
        assert sum(map(int, terms)) == int(prompt.reference or "")
    for prompt in prompts(folder, "tools"):
        story = prompt.messages[0].content
        value, *others = map(int, re.findall(r"\d+", story))
        for number, how in zip(others, re.findall("boxes|finds|loses", story), strict=True):
            value = {"boxes": value * number, "finds": value + number, "loses": value - number}[how]
        assert value == int(prompt.reference or "")
    for prompt in prompts(folder, "search"):
        *_, thing, number = prompt.messages[0].content.rstrip("?").split()
        assert [f for f in facts if f.startswith(f"The {thing} {number} ")] == [
            f"The {thing} {number} is {prompt.reference}."
        ]
    steps = {
        "add": lambda x, k: x + k, "subtract": lambda x, k: x - k, "multiply": lambda x, k: x * k,
        "divide": lambda x, k: x // k, "keep at most": min, "keep at least": max,
        "square": lambda x, k: x**2, "negate": lambda x, k: -x,
    }  # fmt: skip
    for prompt in prompts(folder, "code"):
        for test in json.loads(prompt.reference or ""):
            name, value, expected = re.fullmatch(r"assert (\w+)\((-?\d+)\) == (-?\d+)", test).groups()  # type: ignore[union-attr]
            told, _, words = prompt.messages[0].content.partition(": ")
            result = int(value)
            for step in words.split(", "):
                ((how, constant),) = re.findall(r"(.*?)(?: by)?(?: (\d+))?$", step)[:1]
                result = steps[how](result, int(constant or 0))
            assert (told, result) == (name, int(expected))


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_splits_are_disjoint_and_whole(domain: str) -> None:
    splits = tasks.splits(domain, AGENT.rows, 0)
    assert {name: len(rows) for name, rows in splits.items()} == dict(AGENT.rows)
    asked = [row.prompt for rows in splits.values() for row in rows]
    assert len(set(asked)) == len(asked)


def test_conversations_are_encoded_as_environments_play_them(made: tuple[Path, Material]) -> None:
    """Correct turns, generated one by one, give the ids that models are trained on; replies are not trained."""
    folder, built = made
    built.pretrained("").save_pretrained(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    template = ChatTemplate(tokenizer.chat_template or "", tokenizer.special_tokens)
    renderer = Renderer(tokenizer, template, tokenizer.vocab_size, (END_ID,), 256)
    search = {"kind": "search", "corpus": str(folder / "data" / CORPUS), "num_results": NUM_RESULTS}
    specs = {"search": search, "tools": {"kind": "calculator"}}
    settings = {name: TypeAdapter(Environment).validate_python(spec) for name, spec in specs.items()}
    environments = Environments.of(settings, (), 1, SingleProcess())
    for domain, rows in built.rows("eval", "").items():
        expected = {prompt.key: row for prompt, row in zip(prompts(folder, domain), rows, strict=True)}

        def turn(requests: Sequence[GenerationRequest], which: str) -> list[Completion]:
            return [
                next_turn(expected[r.key.partition("#")[0]], len(r.prompt_ids))  # noqa: B023
                for r in requests
            ]

        asked = [(prompt, 0) for prompt in prompts(folder, domain)]
        for response, row in zip(environments.play(asked, renderer, turn), rows, strict=True):
            assert response.prompt_ids.tolist() == row.prompt_ids
            assert response.completion.response_ids.tolist() == row.answer_ids
            assert (response.episode is None) == (domain not in specs)
            if response.episode is not None:
                assert response.trained.tolist() == row.trained
                assert response.episode.num_turns == 2
                assert not response.episode.num_failed_calls
    environments.close()


def next_turn(row: Encoded, start: int) -> Completion:
    """Return the tokens of a row from `start` to the next end of a turn."""
    ids = [*row.prompt_ids, *row.answer_ids][start:]
    return Completion(token_ids(ids[: ids.index(END_ID) + 1]), np.zeros(0, np.float32), "eos")


def test_their_cache_notices_a_change() -> None:
    key = agent_key(AGENT, 0)
    assert key not in (agent_key(AGENT, 1), agent_key(replace(AGENT, num_rows=999), 0), cache_key(AGENT, 0))


def test_a_second_run_finds_them_without_torch(tmp_path: Path) -> None:
    """The real script, in a fresh process and an empty folder: its default folder and its own settings."""
    with written_aside(tmp_path / AGENT_FOLDER, agent_key(AGENT, 0), {"accuracy": {"base": {"chat": 0.25}}}):
        pass
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(TOOLS)!r}); sys.argv = ['make_tiny_experts.py', '--agent']; "
        f"runpy.run_path({str(TOOLS / 'make_tiny_experts.py')!r}, run_name='__main__'); "
        "print('heavy:', sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"in {AGENT_FOLDER} already" in done.stdout
    assert "25.0%" in done.stdout
    assert "heavy: []" in done.stdout
