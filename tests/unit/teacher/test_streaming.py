"""Streamed teachers give the resident teacher's bits, read every byte once, and hold two layers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mergeopd.errors import ModelError, TeacherError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ARCHITECTURES, EMBEDDING
from mergeopd.models.residency import Held
from mergeopd.teacher.canary import Canary, logprobs
from mergeopd.teacher.local import LocalTeacher, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import LOCAL, TargetSpec, TeacherSequence
from mergeopd.teacher.streaming import layers
from mergeopd.teacher.streaming.session import StreamedSession

CPU = torch.device("cpu")
SEQUENCES = [
    TeacherSequence((1, 2, 3, 4), (10, 11), (True, False)),
    TeacherSequence((5, 6), (12, 13, 14, 15, 16, 30, 31, 32, 33)),
    TeacherSequence((7, 8, 9), (17,)),
    TeacherSequence((7, 8, 9, 20), (17, 18, 19)),
]
VOCAB = 48
HIDDEN = TargetSpec("hidden")
# Of models whose layers differ, both kinds occur; windows are shorter than the longest sequence.
SHORT_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SLIDING = ("cohere2", "exaone4", "gemma2", "gemma3_text", "olmo3", "smollm3")


def save(folder: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=47,
        num_experts=6,
        num_local_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=32,
        **(SHORT_WINDOW if model_type in SLIDING else {}),
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def teacher_of(store: TeacherStore, pass_tokens: int | None) -> LocalTeacher:
    def never(source: object) -> None:
        raise AssertionError("this teacher generates nothing")

    held = Held(pass_tokens, 0, "of the test")
    return LocalTeacher("t", store, LOCAL, None, lambda work: work(), never, held)  # type: ignore[arg-type]


def scored(
    teacher: LocalTeacher, spec: TargetSpec = HIDDEN, max_tokens: int = 16
) -> list[tuple[int, torch.Tensor]]:
    with teacher.open() as session:
        return list(session.score(SEQUENCES, spec, max_tokens))


def assert_equal(found: list[tuple[int, torch.Tensor]], expected: list[tuple[int, torch.Tensor]]) -> None:
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert sorted(index for index, _ in found) == list(range(len(SEQUENCES)))
    for (_, own), (_, other) in zip(found, expected, strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_scores_as_it_does_resident(tmp_path: Path, model_type: str) -> None:
    folder = save(tmp_path / "m", model_type)
    store = TeacherStore({"t": TeacherSource(folder, "float32", VOCAB)}, CPU)
    expected = scored(teacher_of(store, None))
    assert_equal(scored(teacher_of(store, 1000)), expected)
    assert_equal(scored(teacher_of(store, 20)), expected)
    # The skeleton is as before: resident passes work after streamed ones.
    assert_equal(scored(teacher_of(store, None)), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("m"), "gemma2", torch.bfloat16)


def store_of(folder: Path, dtype: str = "float32") -> TeacherStore:
    return TeacherStore({"t": TeacherSource(folder, dtype, VOCAB)}, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [HIDDEN, TargetSpec("top_k", 0.7, 3), TargetSpec("sampled")])
@pytest.mark.parametrize("argument_bytes", [layers.ARGUMENT_BYTES, 0])
def test_every_kind_of_targets_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, spec: TargetSpec, argument_bytes: int
) -> None:
    """With weights that are converted or not, and with arguments that are kept or computed again."""
    monkeypatch.setattr(layers, "ARGUMENT_BYTES", argument_bytes)
    store = store_of(folder, dtype)
    expected = scored(teacher_of(store, None), spec)
    for pass_tokens in (1000, 20, 1):
        assert_equal(scored(teacher_of(store, pass_tokens), spec), expected)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each byte of each tensor was read from a file."""
    counts = Counter[tuple[str, int]]()
    read_parts = Checkpoint.read_parts

    def counting(self: Checkpoint, name: str, parts: Iterable[tuple[int, memoryview]]) -> None:
        own = list(parts)
        for start, buffer in own:
            counts.update((name, byte) for byte in range(start, start + len(buffer)))
        read_parts(self, name, own)

    monkeypatch.setattr(Checkpoint, "read_parts", counting)
    return counts


@pytest.mark.parametrize(("pass_tokens", "num_passes"), [(1000, 1), (20, 2)])
def test_every_byte_is_read_once_in_a_pass(
    folder: Path, read: Counter[tuple[str, int]], pass_tokens: int, num_passes: int
) -> None:
    """Of the embedding, the rows of tokens that occur; padding has id 0."""
    store, checkpoint = store_of(folder), Checkpoint.open(folder)
    scored(teacher_of(store, pass_tokens))
    row = checkpoint.tensors[EMBEDDING].num_bytes // VOCAB
    rows = {byte // row for name, byte in read if name == EMBEDDING}
    assert rows - {0} == {int(i) for one in SEQUENCES for i in (*one.prompt_ids, *one.response_ids)}
    of_layers = {key: count for key, count in read.items() if key[0] != EMBEDDING}
    wanted = {(n, b) for n, i in checkpoint.tensors.items() if n != EMBEDDING for b in range(i.num_bytes)}
    assert of_layers == dict.fromkeys(wanted, num_passes)
    assert store.bytes_read("t") == sum(read.values())
    if num_passes == 1:
        assert sum(read.values()) == len(wanted) + row * len(rows)


def test_a_pass_that_is_left_early_ends_its_thread_and_frees_its_weights(folder: Path) -> None:
    store = store_of(folder)
    expected = scored(teacher_of(store, None))
    with teacher_of(store, 8).open() as session:
        assert isinstance(session, StreamedSession)
        states = session.score(SEQUENCES, HIDDEN, 8)
        next(states)
        assert any(thread.name == "layer reader" for thread in threading.enumerate())
        states.close()  # type: ignore[attr-defined]
        assert not any(thread.name == "layer reader" for thread in threading.enumerate())
        assert all(parameter.is_meta for parameter in session.body.parameters())
        assert_equal(list(session.score(SEQUENCES, HIDDEN, 16)), expected)


def test_a_file_that_is_truncated_while_it_is_streamed_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    teacher = teacher_of(store_of(copy), 1000)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(Checkpoint.open(folder).header_bytes + 40_000)
    with pytest.raises(ModelError, match="was truncated while"):
        scored(teacher)


def test_a_streamed_teacher_with_nan_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="'t' produced NaN"):
        scored(teacher_of(store_of(copy), 1000))


def test_the_canary_is_verified_with_the_first_sequences_and_costs_no_pass(
    folder: Path, read: Counter[tuple[str, int]]
) -> None:
    sample = TeacherSequence((4, 5), (6, 7, 8))
    store = store_of(folder)
    teacher = teacher_of(store, None)
    with teacher.open() as session:
        [(_, rows)] = session.score([sample], HIDDEN, 16)
    known = logprobs(rows, store.head("t"), [6, 7, 8])
    expected = scored(teacher)
    read.clear()
    right = replace(teacher_of(store, 1000), canary=Canary("t", sample, tuple(known), VOCAB))
    assert_equal(scored(right), expected)
    assert right.canary is None
    assert set(read.values()) == {1}
    wrong = replace(teacher_of(store, 1000), canary=Canary("t", sample, tuple(p - 3.0 for p in known), VOCAB))
    with pytest.raises(TeacherError, match="not the model its card describes"):
        scored(wrong)
    elsewhere = replace(wrong, canary=Canary("t", sample, (0.0,) * 3, VOCAB), is_first=False)
    assert_equal(scored(elsewhere), expected)


# Each case is a child of the process that has imported everything: `[pass tokens or null, bytes allowed or 0]`.
LIMITED = """
import json, os, resource, sys
from pathlib import Path
import torch, transformers.models.qwen3.modeling_qwen3
from mergeopd.models.residency import Held
from mergeopd.teacher.local import LocalTeacher, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import LOCAL, TargetSpec, TeacherSequence

def score(pass_tokens, allowed):
    teacher = LocalTeacher("t", store, LOCAL, None, None, None, Held(pass_tokens, 0, "of the test"))
    sequences = [TeacherSequence(tuple(range(1, 9)), tuple(range(9 + i, 40))) for i in range(3)]
    if allowed:
        size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
        limit = int(size.split()[1]) * 1024 + allowed
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with teacher.open() as session:
        found = dict(session.score(sequences, TargetSpec("hidden"), 64))
    return [float(found[i].double().sum()) for i in range(3)] + [store.bytes_read("t")]

torch.set_num_threads(1)
store = TeacherStore({"t": TeacherSource(Path(sys.argv[1]), "float32", 64)}, torch.device("cpu"))
for case in json.loads(sys.argv[2]):
    if not os.fork():
        try:
            print(json.dumps(score(*case)), flush=True)
        except Exception as error:
            print(json.dumps(str(error)), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_teacher_four_times_larger_than_the_memory_allowed_scores(tmp_path: Path) -> None:
    """The limit is the system's, on the address space, which counts mapped files as well."""
    config = AutoConfig.for_model(
        "qwen3", vocab_size=64, hidden_size=256, intermediate_size=2048, num_hidden_layers=24,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    tensors = {n: torch.randn(p.shape) / p.shape[-1] ** 0.5 for n, p in model.model.named_parameters()}
    config.save_pretrained(tmp_path)
    save_file({f"model.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    allowed = size // 4
    assert size > 160e6
    # One arena: the C library would reserve address space for one more in the reading thread.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    cases = json.dumps([(None, allowed), (256, allowed), (None, 0)])
    command = [sys.executable, "-c", LIMITED, str(tmp_path), cases]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    refused, streamed, resident = map(json.loads, out.stdout.splitlines())
    assert "Cannot allocate memory" in refused
    *of_streamed, bytes_read = streamed
    *of_resident, _ = resident
    assert of_streamed == of_resident
    used = 39 * 256 * 4  # rows of the embedding
    assert bytes_read == sum(t.nbytes for n, t in tensors.items() if "embed" not in n) + used
