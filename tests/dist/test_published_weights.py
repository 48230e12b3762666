"""Publishing a sharded student needs memory for tensors, not for the student."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import needs_megatron, run_ranks

from mergeopd.models.checkpoint import Checkpoint

pytestmark = [
    needs_megatron,
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="peaks of resident memory are Linux's"),
]

WORKER = Path(__file__).with_name("published_worker.py")
MIB = 2**20
FILE_BYTES = 64 * MIB
# Buffers of gloo and of the allocator.
NOISE_BYTES = 8 * MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A student of 130 million parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_no_rank_has_the_whole_student(model, tmp_path, monkeypatch):
    # Without it, glibc keeps freed tensors: it learns from the first ones.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(MIB))
    versions = tmp_path / "versions"
    outputs = run_ranks(WORKER, 2, tmp_path, str(model), str(versions), str(FILE_BYTES), deadline_s=240)
    ranks = [json.loads(out.read_text()) for out in outputs]
    print("\n".join(", ".join(f"{k} {v / MIB:.1f} MiB" for k, v in rank.items()) for rank in ranks))
    source, published = (Checkpoint.open(folder) for folder in (model, versions / "version-2"))
    whole = sum(info.num_bytes for info in source.tensors.values())
    two = 2 * max(info.num_bytes for info in source.tensors.values())
    assert whole > 480 * MIB
    for key in ("published", "published again"):
        assert ranks[0][key] < FILE_BYTES + two + NOISE_BYTES
        assert ranks[1][key] < two + NOISE_BYTES
    assert all(rank["unsharded"] > whole for rank in ranks)
    assert published.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        assert torch.equal(published.read(name), 1.5 * source.read(name)), name
