"""Before a run, teachers' servers are asked whether they can be used; what is wrong is told with its remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scoring_server import ScoringServer, scoring_server

from mergeopd.data.canary import sample_ids
from mergeopd.errors import RecipeError
from mergeopd.preflight.inputs import Inputs, preflight

Write = Callable[..., Path]
ON_STUDENT = {"reverse_kl": 1.0, "support": {"top_k": 2, "of": "student"}}
ON_TEACHER = {"forward_kl": 1.0, "support": {"top_k": 2, "of": "teacher"}}


def recipe_of(write_job: Write, loss: Any, section: dict[str, Any], **card: Any) -> Path:
    phase = {"name": "merge", "updates": 2, "prompts_per_round": 4, "loss": loss}
    recipe = write_job({"phases": [phase]})
    file = recipe.parent / "two.yaml"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"served": section} | card))
    return recipe


def problems(recipe: Path, *, with_servers: bool = True) -> list[tuple[str, str, str]]:
    try:
        preflight(recipe, with_servers=with_servers)
    except RecipeError as error:
        return [(p.path, p.message, p.remedy) for p in error.problems]
    return []


def asked(write_job: Write, spoil: Any = None, loss: Any = ON_STUDENT, **settings: Any) -> Any:
    """Problems of a job whose teacher two has a server; its name in messages is URL."""
    folder = write_job().parent / "two"
    named = settings.pop("named", settings.get("engine", "vllm"))
    settings = {"engine": "vllm", **settings}
    with scoring_server(folder, **settings) as server:
        if spoil is not None:
            server.spoil = spoil
        section = {"url": server.url, "engine": named, "hidden_states": server.hidden_states}
        texts = problems(recipe_of(write_job, loss, section))
    return [(path, message.replace(server.url, "URL"), remedy) for path, message, remedy in texts]


@pytest.mark.parametrize(
    ("engine", "hidden_states", "loss"),
    [("vllm", False, ON_STUDENT), ("vllm", True, "reverse_kl"), ("sglang", False, ON_TEACHER)],
)
def test_good_servers(write_job: Write, engine: str, hidden_states: bool, loss: Any) -> None:
    assert asked(write_job, loss=loss, engine=engine, hidden_states=hidden_states) == []


CARD = "teachers.two.card.served"


def test_a_server_that_is_not_there(write_job: Write) -> None:
    recipe = recipe_of(write_job, ON_STUDENT, {"url": "http://127.0.0.1:9", "engine": "vllm"})
    ((path, message, _),) = problems(recipe)
    assert path == f"{CARD}.url"
    assert message.startswith("http://127.0.0.1:9/version: ")
    assert "connection attempts failed" in message
    assert problems(recipe, with_servers=False) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"engine": "sglang", "named": "vllm"},
            (f"{CARD}.engine", "URL: the server is SGLang, not vLLM", "write `engine: sglang`"),
        ),
        (
            {"engine": "vllm", "version": "0.20.1"},
            (
                f"{CARD}.url",
                "URL: vLLM 0.20.1 is too old; update the server to 0.24 or newer",
                "",
            ),
        ),
        (
            {"engine": "sglang", "version": "0.5.12", "loss": ON_TEACHER},
            (
                f"{CARD}.url",
                "URL: SGLang 0.5.12 is too old; update the server to 0.5.18 or newer",
                "",
            ),
        ),
        (
            {
                "spoil": lambda path, reply: (
                    400 if path.endswith("/generate") and "prompt_token" in str(reply) else reply
                )
            },
            (
                f"{CARD}.url",
                "URL: status 400: refused",
                "log-probabilities at the student's top k need vLLM 0.32 or newer, started with the environment "
                "variable VLLM_USE_V2_MODEL_RUNNER=1 and --max-logprobs 3 or more",
            ),
        ),
        (
            {
                "engine": "sglang",
                "hidden_states": True,
                "loss": "reverse_kl",
                "spoil": lambda path, reply: 400 if "hidden_states" in str(reply) else reply,
            },
            (f"{CARD}.url", "URL: status 400: refused", "start it with --enable-return-hidden-states"),
        ),
    ],
)
def test_servers_that_cannot_be_used(write_job: Write, settings: dict[str, Any], expected: Any) -> None:
    assert asked(write_job, **settings) == [expected]


def test_a_vocabulary_is_compared_by_its_texts(write_job: Write) -> None:
    """Every id has a text; echoed ids would be equal."""

    def other(path: str, reply: Any) -> Any:
        return {"prompt": reply["prompt"].replace("c", "z")} if path == "/detokenize" else reply

    assert asked(write_job, other) == [
        (
            f"{CARD}.url",
            "URL: the server has another vocabulary: token 2 is not 'c' there",
            "serve the model of the card",
        )
    ]


def test_replicas_that_disagree_are_refused(write_job: Write) -> None:
    folder = write_job().parent
    with ExitStack() as servers:
        good = [servers.enter_context(scoring_server(folder / "two", "vllm")) for _ in range(2)]
        urls = [server.url for server in good]
        assert problems(recipe_of(write_job, ON_STUDENT, {"url": urls, "engine": "vllm"})) == []
        # The student's model: the same tokenizer, other weights.
        urls.append(servers.enter_context(scoring_server(folder / "base", "vllm")).url)
        ((path, message, remedy),) = problems(
            recipe_of(write_job, ON_STUDENT, {"url": urls, "engine": "vllm"})
        )
    assert path == f"{CARD}.url"
    assert message.startswith("the same sequence gets log-probabilities that differ by ")
    assert "(at most 0.1): the servers do not have equal weights" in message
    assert remedy == "serve the same weights at every url"


def canary_of(inputs: Inputs, server: ScoringServer, shift: float) -> dict[str, Any]:
    prompt, response = sample_ids(inputs.teachers["two"], "a b", "c d")
    rows = server._logprobs([*prompt, *response])[len(prompt) - 1 : -1]
    logprobs = rows[np.arange(len(response)), list(response)] + shift
    return {"prompt": "a b", "response": "c d", "logprobs": logprobs.tolist()}


def test_the_cards_sample_is_compared(write_job: Write) -> None:
    with scoring_server(write_job().parent / "two", "vllm") as server:
        section = {"url": server.url, "engine": "vllm"}
        inputs = preflight(recipe_of(write_job, ON_STUDENT, section))
        good = recipe_of(write_job, ON_STUDENT, section, canary=canary_of(inputs, server, 0.05))
        assert problems(good) == []
        bad = recipe_of(write_job, ON_STUDENT, section, canary=canary_of(inputs, server, -0.3))
        ((path, message, _),) = problems(bad)
    assert path == f"{CARD}.url"
    assert "are off by 0.30 nats per token" in message


def test_a_short_context_of_the_servers_is_the_teachers(write_job: Write) -> None:
    ((path, message, _),) = asked(write_job, max_tokens=7)
    assert path == "rollout.max_new_tokens"
    assert "teacher 'two''s context of 6 tokens" in message


def test_log_probabilities_need_no_weights_here(write_job: Write) -> None:
    recipe = recipe_of(write_job, ON_STUDENT, {"url": "http://127.0.0.1:9", "engine": "vllm"})
    for file in (recipe.parent / "two").glob("*.safetensors*"):
        file.unlink()
    assert problems(recipe, with_servers=False) == []
    section = {"url": "http://127.0.0.1:9", "engine": "vllm", "hidden_states": True}
    file = recipe.parent / "two.yaml"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"served": section}))
    ((path, message, _),) = problems(recipe, with_servers=False)
    assert path == "teachers.two.card.model"
    assert "no weights" in message


@pytest.mark.parametrize(
    ("engine", "loss", "expected"),
    [
        (
            "vllm",
            "reverse_kl",
            (
                "phases[0].loss",
                "the loss needs hidden states of teacher 'two', which provides its most probable tokens, "
                "log-probabilities of the student's most probable tokens and log-probabilities of sampled tokens",
                "give the loss `support: {top_k: K, of: student}` (or `of: teacher`), or start the servers with "
                "hidden states and write `hidden_states: true` into the card",
            ),
        ),
        (
            "sglang",
            ON_STUDENT,
            (
                "phases[0].loss",
                "the loss needs hidden states of teacher 'two', which provides its most probable tokens and "
                "log-probabilities of sampled tokens",
                "give the loss `support: {top_k: K, of: teacher}`, or start the servers with hidden states and "
                "write `hidden_states: true` into the card",
            ),
        ),
        (
            "vllm",
            ON_STUDENT | {"temperature": 2.0},
            (
                "phases[0].loss.temperature",
                "servers return log-probabilities of given text at temperature 1 only, also those of teacher 'two'",
                "remove `temperature` from the loss, or start the servers with hidden states and write "
                "`hidden_states: true` into the card",
            ),
        ),
    ],
)
def test_losses_that_need_more(write_job: Write, engine: str, loss: Any, expected: Any) -> None:
    recipe = recipe_of(write_job, loss, {"url": "http://127.0.0.1:9", "engine": engine})
    assert problems(recipe, with_servers=False) == [expected]


def test_checking_other_recipes_imports_no_http_client(write_job: Write) -> None:
    code = "import sys; from mergeopd import api; api.check(sys.argv[1]); sys.exit('httpx2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(write_job())], check=True)


def test_rows_behind_the_vocabulary_are_noted(write_job: Write) -> None:
    """Teacher one has 8 rows, 5 of them ids of the student."""
    folder = write_job().parent
    with scoring_server(folder / "one", "vllm") as server:
        recipe = recipe_of(write_job, ON_STUDENT, {"url": server.url, "engine": "vllm"})
        card = {"card": 1, "name": "one", "model": "one", "served": {"url": server.url, "engine": "vllm"}}
        (folder / "two.yaml").write_text(json.dumps({"card": 1, "name": "two", "model": "two"}))
        (folder / "one.yaml").write_text(json.dumps(card))
        notes = preflight(recipe, with_servers=True).notes
    assert any("log-probabilities over 3 rows more than the ids" in note for note in notes)
