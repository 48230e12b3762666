"""What fits is held whole, else streamed in the largest passes that fit; the rest is refused with what works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts
from mergeopd.models.residency import ARGUMENT_BYTES, BodySizes, held

MIB = 2**20
# 36 layers of 100 MiB, read without copies; tokens of 10 KiB, with a working set of 30 KiB.
SIZES = BodySizes(
    body=4000 * MIB, layer=100 * MIB, stored_layer=100 * MIB, embedding=400 * MIB,
    per_token=10 * 1024, working=30 * 1024, is_copied=False,
)  # fmt: skip
BATCH = 2048
FIXED = 200 * MIB + ARGUMENT_BYTES + BATCH * 30 * 1024


@given(st.integers(1, 1 << 16), st.integers(0, 1 << 34))
def test_the_largest_pass_fits_and_one_more_token_does_not(batch: int, room: int) -> None:
    tokens = SIZES.pass_tokens(batch, room)
    if tokens:
        assert SIZES.stream_bytes(batch, tokens) <= room < SIZES.stream_bytes(batch, tokens + 1)
    else:
        assert SIZES.stream_bytes(batch, batch) > room


def test_auto_is_whole_where_that_fits() -> None:
    needed = 4000 * MIB + BATCH * 30 * 1024
    assert held("auto", SIZES, BATCH, needed).pass_tokens is None
    assert held("auto", SIZES, BATCH, needed - 1).is_streamed
    assert held("resident", SIZES, BATCH, needed).pass_tokens is None
    assert held("stream", SIZES, BATCH, needed).is_streamed


def test_a_pass_has_the_tokens_whose_states_and_embeddings_fit() -> None:
    """Two tables of 10 KiB a token, the second of which is at most the whole embedding."""
    assert held("auto", SIZES, BATCH, FIXED + 10_000 * 20 * 1024).pass_tokens == 10_000
    decision = held("auto", SIZES, BATCH, FIXED + 400 * MIB + 100_000 * 10 * 1024)
    assert decision.pass_tokens == 100_000
    assert [decision.num_passes(tokens) for tokens in (1, 100_000, 100_001, 350_000)] == [1, 1, 2, 4]


def test_mapped_pages_are_not_refused() -> None:
    small = 10 * MIB
    assert held("resident", SIZES, BATCH, small, is_mapped=True).pass_tokens is None
    assert held("auto", SIZES, BATCH, small, is_mapped=True).pass_tokens is None
    with pytest.raises(ModelError, match="streamed, it takes"):
        held("stream", SIZES, BATCH, small, is_mapped=True)


def test_a_batch_may_exceed_an_estimate_but_not_a_limit() -> None:
    """Batches are often smaller than they may be, so that only two layers have to fit into what is free."""
    room = 200 * MIB + ARGUMENT_BYTES + MIB
    assert held("auto", SIZES, BATCH, room).pass_tokens == BATCH
    with pytest.raises(ModelError) as refused:
        held("auto", SIZES, BATCH, room, is_strict=True)
    suggested = re.search(r"`student.micro_batch_tokens: (\d+)` fits", str(refused.value))
    assert suggested is not None
    tokens = int(suggested[1])
    assert held("stream", SIZES, tokens, room, is_strict=True).is_streamed
    with pytest.raises(ModelError):
        held("stream", SIZES, 2 * tokens, room, is_strict=True)


def test_a_resident_teacher_that_does_not_fit_is_told_what_does() -> None:
    with pytest.raises(
        ModelError, match=r"it takes 3.96 GiB, and there are 1.95 GiB; `residency: stream` takes"
    ):
        held("resident", SIZES, BATCH, 2000 * MIB)


@pytest.mark.parametrize(("dtype", "is_copied"), [("float32", False), ("bfloat16", True)])
def test_sizes_are_those_of_the_files(make_model: Callable[..., Path], dtype: str, is_copied: bool) -> None:
    folder = make_model("sizes", layers=3)
    checkpoint = Checkpoint.open(folder)
    sizes = BodySizes.of(ModelFacts.read(folder), checkpoint, dtype)
    width = 2 if is_copied else 4
    layers = [
        sum(i.num_bytes for n, i in checkpoint.tensors.items() if n.startswith(f"model.layers.{number}."))
        for number in range(3)
    ]
    assert sizes.body == checkpoint.num_weights * width
    assert (sizes.layer, sizes.stored_layer) == (max(layers) * width // 4, max(layers))
    assert (sizes.embedding, sizes.per_token) == (37 * 32 * width, 32 * width)
    assert sizes.is_copied == is_copied
