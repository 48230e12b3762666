"""The local engine against transformers' own generate and forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergeopd.loss.heads import Head
from mergeopd.rollout.local import Generator, generate
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.types import Sampling

VALID = 33  # of 37 rows
EOS = 2


class Letters:
    """A tokenizer without special tokens."""

    @staticmethod
    def decode(ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + i % 26) for i in ids)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]):
    return AutoModelForCausalLM.from_pretrained(make_model("generator", seed=3)).eval()


@pytest.fixture(scope="module")
def generator(model) -> Generator:
    head = Head(model.lm_head.weight.detach(), num_valid=VALID)
    return Generator(model.base_model, head, {EOS}, Letters, torch.device("cpu"))


REQUESTS = [
    GenerationRequest(f"p:{i}", s, tuple((7 * i + 3 * j + s) % VALID for j in range(2 + 3 * (i % 4))))
    for i in range(6)
    for s in range(2)
]


def run(
    generator: Generator, requests: Sequence[GenerationRequest], sampling: Sampling, batch_size: int = 64
) -> list[Completion]:
    return generate(generator, requests, sampling, seed=5, batch_size=batch_size, progress=lambda done: None)


def test_greedy_equals_transformers(generator: Generator, model) -> None:
    ours = run(generator, REQUESTS, Sampling(temperature=0.0, max_new_tokens=12))
    for request, completion in zip(REQUESTS, ours, strict=True):
        ids = list(request.prompt_ids)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1, :VALID].argmax()))
            if ids[-1] == EOS:
                break
        assert list(completion.response_ids) == ids[len(request.prompt_ids) :]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_logprobs_are_those_of_the_distribution_drawn_from(
    generator: Generator, model, temperature: float, top_p: float
) -> None:
    completions = run(generator, REQUESTS, Sampling(temperature, top_p, max_new_tokens=10))
    for request, completion in zip(REQUESTS, completions, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.response_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1, :VALID]
        p = torch.softmax(logits / temperature, -1)
        if top_p < 1.0:
            for row in p:
                order = row.argsort(descending=True)
                keep = int((row[order].cumsum(0) < top_p).sum()) + 1
                row[order[keep:]] = 0.0
            p /= p.sum(-1, keepdim=True)
        expected = p.log().gather(1, torch.tensor(completion.response_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=2e-5)


def test_batching_and_order_have_no_effect(generator: Generator) -> None:
    sampling = Sampling(max_new_tokens=14)
    together = run(generator, REQUESTS, sampling)
    small = run(generator, REQUESTS, sampling, batch_size=5)
    backwards = run(generator, REQUESTS[::-1], sampling)[::-1]
    ids = [c.response_ids.tolist() for c in together]
    assert ids == [c.response_ids.tolist() for c in small]
    assert ids == [c.response_ids.tolist() for c in backwards]


def test_samples_of_one_prompt_differ_and_the_stop_token_is_kept(generator: Generator) -> None:
    requests = [GenerationRequest("p", s, (5, 6, 7)) for s in range(64)]
    completions = run(generator, requests, Sampling(max_new_tokens=30))
    assert len({tuple(c.response_ids.tolist()) for c in completions}) > 32
    ended = [c for c in completions if c.finish == "eos"]
    assert ended
    assert len(ended) < 64
    for c in completions:
        assert (c.finish == "eos") == (c.response_ids[-1] == EOS)
        assert EOS not in c.response_ids[:-1]
        assert len(c.response_ids) == len(c.logprobs)
        assert c.finish == "eos" or len(c.response_ids) == 30


def test_pad_rows_are_never_written(make_model: Callable[..., Path]) -> None:
    folder = make_model("padded", seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():  # a head that would nearly always choose a pad row
        model.lm_head.weight[VALID:] *= 100
    head = Head(model.lm_head.weight.detach(), num_valid=VALID)
    generator = Generator(model.base_model, head, {EOS}, Letters, torch.device("cpu"))
    completions = run(generator, REQUESTS, Sampling(max_new_tokens=8))
    assert max(i for c in completions for i in c.response_ids) < VALID


def test_a_stop_text_ends_a_response(generator: Generator) -> None:
    sampling = Sampling(max_new_tokens=40, stop=("k", "xy"))
    for c in run(generator, [GenerationRequest("p", s, (5, 6)) for s in range(20)], sampling):
        text = Letters.decode(c.response_ids)
        found = [text.find(s) + len(s) for s in sampling.stop if s in text]
        assert (c.finish == "stop") == bool(found) or c.finish == "eos"
        if c.finish == "stop":
            assert min(found) == len(text)
