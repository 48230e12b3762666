"""Stop texts can be or contain special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import write_published

from mergeopd.engine.rollouts import response_text
from mergeopd.loss.heads import Head
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.rollout.local import Generator, generate
from mergeopd.rollout.protocol import GenerationRequest
from mergeopd.types import Sampling, token_ids


class Echo(torch.nn.Module):
    """A body whose hidden state at a position p is one-hot at `ids[p]`."""

    def __init__(self, ids: list[int], num_ids: int) -> None:
        super().__init__()
        self.config = None
        self._states = torch.eye(num_ids)[torch.tensor(ids)]

    def forward(self, position_ids: torch.Tensor, **rest: object) -> object:
        states = self._states[position_ids[:, -1:]]
        return type("Output", (), {"last_hidden_state": states})()


@pytest.mark.parametrize(
    ("stop", "written", "text"),
    [
        ("<|im_end|>", "ab<|im_end|>", "ab"),
        ("b<|im_end|>", "ab<|im_end|>", "a"),
        ("<|im_end|>\n", "ab<|im_end|>\n", "ab"),
        ("b", "ab", "a"),
    ],
)
def test_stop_texts_may_hold_special_tokens(tmp_path: Path, stop: str, written: str, text: str) -> None:
    tokenizer = Tokenizer.load(write_published(tmp_path, "qwen2.5-base"))
    ids, num_ids = tokenizer.encode("ab<|im_end|>\nabc"), tokenizer.vocab_size
    head, ends = Head(torch.eye(num_ids)), (tokenizer.eos_id,)
    [found] = generate(
        Generator(Echo(ids, num_ids), head, ends, tokenizer, torch.device("cpu")),
        [GenerationRequest("p", 0, (0,))],
        Sampling(0.0, 1.0, len(ids), (stop,)),
        seed=0,
        batch_size=1,
        progress=lambda done: None,
    )
    assert found.finish == "stop"
    assert tokenizer.decode(found.response_ids.tolist(), skip_special_tokens=False) == written
    # Text behind a stop is cut off too, where a response goes on.
    assert response_text(found.response_ids, tokenizer, (stop,)) == text
    assert response_text(token_ids(ids), tokenizer, (stop,)) == text


def test_responses_without_a_stop_text_are_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_published(tmp_path, "qwen3"))
    ids = token_ids(tokenizer.encode("ab<|im_start|>c<think>d<|im_end|>"))
    assert response_text(ids, tokenizer, ()) == response_text(ids, tokenizer, ("x",)) == "abc<think>d"
