"""Rollouts by real servers: engines on them, what transformers computes, and a recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_models import NUM_ROWS, NUM_TOKENS, reference_logits
from tiny_experts.tokens import END_ID

from mergeopd.rollout.protocol import Completion, EngineContext, GenerationRequest
from mergeopd.rollout.served import ServedEngine
from mergeopd.rollout.servers import RunningServers
from mergeopd.serving.sglang import SglangApi
from mergeopd.serving.vllm import VllmApi
from mergeopd.types import Sampling

APIS = {"vllm": VllmApi(), "sglang": SglangApi()}
RECIPE = """
recipe: 1
name: served
seed: 0
threads: 1
student: {{model: {student}}}
teachers: {{expert: {card}}}
prompts: [{{source: {prompts}, domain: words}}]
rollout: {{engine: {engine}, url: "{url}", max_new_tokens: 24, ahead: {ahead},
  parity: {{every: 1, num_responses: 4, max_mean_gap: {bound}}}}}
phases:
  - {{name: merge, updates: 6, prompts_per_round: 8, updates_per_round: 2, loss: reverse_kl}}
optimizer: {{lr: {lr}}}
output: {output}
"""


class Decoder:
    """Not asked: the servers find stop texts."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raise AssertionError


@dataclass
class Folders:
    """Publishes folders that exist."""

    folder: Path

    def publish(self, source: object, version: int) -> Path:
        return self.folder

    def discard(self) -> None:
        pass


def make_engine(server: Any, url: str, timeout_s: float = 60.0) -> ServedEngine:
    """An engine on the server, or on a proxy before it, that publishes the server's own model."""
    context = EngineContext(
        (END_ID,), Decoder(), torch.device("cpu"), 0, deal=lambda r, g: g(r), run_on_first=lambda work: work()
    )
    made = ServedEngine(
        APIS[server.engine],
        RunningServers([url]),
        context,
        Folders(server.model),
        padding=range(NUM_TOKENS, NUM_ROWS),
        concurrency=16,
        timeout_s=timeout_s,
    )
    # Random weights give the rows of padding probabilities, unlike trained ones.
    made._opened().banned = made.padding
    return made


def write_recipe(
    folder: Path,
    server: Any,
    teacher: Path,
    *,
    url: str = "",
    ahead: int = 0,
    lr: float = 1e-3,
    bound: float = 0.05,
) -> Path:
    """Write a recipe of 6 updates with the server's model as student."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for model in (server.model, teacher):
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    rows = [{"prompt": f"def word_{i}(self) -> None:"} for i in range(40)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    card = folder / "expert.yaml"
    card.write_text(f"card: 1\nname: expert\nmodel: {teacher}\ndomains: [words]\n", encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            student=server.model, card=card, prompts=prompts, engine=server.engine, url=url or server.url,
            ahead=ahead, lr=lr, bound=bound, output=folder / "run",
        )
    )  # fmt: skip
    return recipe


def generate(
    engine: ServedEngine, requests: Sequence[GenerationRequest], sampling: Sampling
) -> list[Completion]:
    return engine.submit(requests, sampling).wait(lambda _: None)


def assert_logprobs_right(model: Path, prompt: Sequence[int], response: Completion, how: Sampling) -> None:
    """Compare with transformers, to 1e-4: the distribution over tokens after temperature and truncation.

    Where the mass of a nucleus is `top_p` up to rounding, its last token may be in or out.
    """
    ids = response.response_ids.tolist()
    logits = reference_logits(model, [*prompt, *ids])[len(prompt) - 1 : -1, :NUM_TOKENS].double()
    rows = (logits / how.temperature).softmax(-1)
    for row, token, logprob in zip(rows, ids, response.logprobs.tolist(), strict=True):
        probs, order = row.sort(descending=True)
        nuclei = {len(probs)}
        if how.top_p < 1:
            mass = probs.cumsum(0)
            nuclei = {int((mass < how.top_p + shift).sum()) + 1 for shift in (-1e-5, 0.0, 1e-5)}
        own = [float(row[token].log() - probs[:kept].sum().log()) for kept in nuclei if token in order[:kept]]
        assert own, "a token outside the nucleus was sampled"
        assert min(abs(logprob - value) for value in own) < 1e-4
