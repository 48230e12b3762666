"""Teachers score as the Hugging Face model does, are gone after their turn, and are counted honestly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergeopd.errors import ModelError, TeacherError
from mergeopd.teacher.local import LocalTeacher, ResidentHeads, TeacherSource, TeacherStore
from mergeopd.teacher.protocol import LOCAL, TeacherSequence

CPU = torch.device("cpu")
PROMPTS = [(1, 2, 3, 4), (5, 6), (7, 8, 9)]
RESPONSES = [(10, 11), (12, 13, 14, 15, 16), (17,)]


def scored(store: TeacherStore, name: str, max_tokens: int = 1000, prompts=PROMPTS) -> list[torch.Tensor]:
    with store.open(name) as teacher:
        sequences = [TeacherSequence(p, r) for p, r in zip(prompts, RESPONSES, strict=True)]
        found = dict(teacher.hidden(sequences, max_tokens))
    return [found[i] for i in range(len(prompts))]


def never(source: object) -> NoReturn:
    raise AssertionError("this teacher generates nothing")


def teacher_of(store: TeacherStore, name: str) -> LocalTeacher:
    return LocalTeacher(name, store, LOCAL, canary=None, run_on_first=lambda work: work(), make_engine=never)


def heads_of(store: TeacherStore, names: Iterable[str], vocab: range | None = None) -> ResidentHeads:
    return ResidentHeads({name: teacher_of(store, name) for name in names}, lambda name: vocab)


def reference_logits(folder: Path, prompts=PROMPTS) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return [
            model(torch.tensor([[*p, *r]])).logits[0, len(p) - 1 : len(p) + len(r) - 1]
            for p, r in zip(prompts, RESPONSES, strict=True)
        ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 8, 1000])
def test_hidden_states_times_head_are_the_models_logits(
    make_model: Callable[..., Path], tied: bool, max_tokens: int
) -> None:
    folder = make_model("t", tied=tied)
    store = TeacherStore({"t": TeacherSource(folder, "float32", 37)}, CPU)
    hidden = scored(store, "t", max_tokens)
    weight = store.head("t").weight
    for states, expected in zip(hidden, reference_logits(folder), strict=True):
        assert torch.allclose(states @ weight.T, expected, atol=2e-5)


def test_a_longer_template_scores_as_the_model_does_and_a_shift_explodes(
    make_model: Callable[..., Path],
) -> None:
    """The teacher's prompt may be 7 tokens longer than the student's; rows still belong to the response."""
    folder = make_model("t", seed=4, spread=0.6)
    longer = [(20, 21, 22, 23, 24, 25, 26, *p) for p in PROMPTS]
    store = TeacherStore({"t": TeacherSource(folder, "float32", 37)}, CPU)
    weight = store.head("t").weight
    logits = torch.cat(scored(store, "t", prompts=longer)) @ weight.T
    expected = torch.cat(reference_logits(folder, longer))

    def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(expected, logits) < 1e-9
    shifted = torch.cat([x.roll(1, 0) for x in logits.split([len(r) for r in RESPONSES]) if len(x) > 1])
    unshifted = torch.cat([x for x in expected.split([len(r) for r in RESPONSES]) if len(x) > 1])
    assert divergence(unshifted, shifted) > 0.5


def test_bytes_read_are_the_files_bytes_for_a_round_of_scoring_and_update(
    make_model: Callable[..., Path],
) -> None:
    folders = {name: make_model(name, tied=False, seed=i) for i, name in enumerate("abc")}
    store = TeacherStore({n: TeacherSource(f, "float32", 37) for n, f in folders.items()}, CPU)
    size = sum((f / "model.safetensors").stat().st_size for f in folders.values())
    for rounds in (1, 2):
        for name in folders:
            scored(store, name)
        heads = heads_of(store, folders)
        for name in folders:
            heads.of([name])
        assert sum(store.bytes_read(name) for name in folders) == rounds * size


def test_nothing_stays_after_the_turn(make_model: Callable[..., Path]) -> None:
    store = TeacherStore({"t": TeacherSource(make_model("t"), "float32", 37)}, CPU)
    with store.open("t") as teacher:
        body = teacher.body
        assert not any(p.is_meta for p in body.parameters())
    assert all(p.is_meta for p in body.parameters())


def test_teachers_that_share_a_checkpoint_share_its_head_and_no_alias_reaches_another(
    make_model: Callable[..., Path],
) -> None:
    one, other = make_model("one", seed=1), make_model("other", seed=2)
    store = TeacherStore(
        {
            "a": TeacherSource(one, "float32", 37),
            "b": TeacherSource(one, "float32", 37),
            "c": TeacherSource(other, "float32", 37),
        },
        CPU,
    )
    heads = heads_of(store, "abc").of(["a", "b", "c"])
    assert heads["a"] is heads["b"]
    assert not torch.equal(heads["a"].weight, heads["c"].weight)


def test_a_teacher_with_nan_is_named(make_model: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model("bad")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    store = TeacherStore({"broken": TeacherSource(folder, "float32", 37)}, CPU)
    with pytest.raises(TeacherError, match="'broken' produced NaN"):
        scored(store, "broken")


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(make_model: Callable[..., Path]) -> None:
    import json

    folder = make_model("odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="must be equal to the number of `layer_types`"):
        TeacherStore({"t": TeacherSource(folder, "float32", 37)}, CPU)
    more = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    with pytest.raises(ModelError, match=r"it has no model.layers.2\S+; .*and 8 more"):
        TeacherStore({"t": TeacherSource(folder, "float32", 37)}, CPU)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(
        ModelError, match=r"gate_proj.weight with shape \[64, 32\], the config says \[48, 32\]"
    ):
        TeacherStore({"t": TeacherSource(folder, "float32", 37)}, CPU)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [range(12), range(12, 31), range(31, 35), range(35, 35)])
def test_a_rank_of_the_vocabulary_reads_its_rows_alone(
    make_model: Callable[..., Path], tied: bool, vocab: range
) -> None:
    folder = make_model("t", tied=tied)
    store = TeacherStore({"t": TeacherSource(folder, "float32", 35)}, CPU)
    whole = store.head("t")
    assert store.bytes_read("t") == 37 * 32 * 4
    heads = heads_of(store, ["t"], vocab)
    part = heads.of(["t"])["t"]
    assert torch.equal(part.weight, whole.weight[vocab.start : vocab.stop])
    assert part.vocab == vocab
    assert part.vocab_start == vocab.start
    assert store.bytes_read("t") == (37 + len(vocab)) * 32 * 4
    assert heads.of(["t"])["t"] is part
    assert store.bytes_read("t") == (37 + len(vocab)) * 32 * 4


def test_rows_of_a_bias_are_those_of_the_weight_and_scale_and_cap_stay(
    make_model: Callable[..., Path],
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model("t", model_type="phi", tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.bias"] = torch.arange(37.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    store = TeacherStore({"t": TeacherSource(folder, "bfloat16", 37)}, CPU)
    part = store.head("t", range(5, 9))
    assert part.bias is not None
    assert part.bias.tolist() == [5.0, 6.0, 7.0, 8.0]
    assert torch.equal(part.weight, weights["lm_head.weight"][5:9].bfloat16())
    assert store.bytes_read("t") == 4 * (32 + 1) * 4


def test_rows_outside_the_true_vocabulary_are_refused(make_model: Callable[..., Path]) -> None:
    store = TeacherStore({"t": TeacherSource(make_model("t"), "float32", 35)}, CPU)
    for vocab in (range(30, 36), range(0, 10, 2), range(-1, 3)):
        with pytest.raises(ValueError, match="'t' has 35 true tokens"):
            store.head("t", vocab)


def test_empty_shards_of_other_places_are_other_heads(make_model: Callable[..., Path]) -> None:
    store = TeacherStore({"t": TeacherSource(make_model("t"), "float32", 37)}, CPU)
    assert store.head("t", range(3, 3)).vocab_start == 3
    assert store.head("t", range(37, 37)).vocab_start == 37


def test_rows_of_a_follower_are_views_of_its_weights(make_model: Callable[..., Path]) -> None:
    from states import HeldTensors

    from mergeopd.recipe.models import SnapshotRule
    from mergeopd.teacher.snapshots import Snapshot

    folder = make_model("t", tied=False)
    weight = torch.randn(37, 32)
    snapshot = Snapshot(SnapshotRule(every=2), lambda: iter([("lm_head.weight", weight)]), lambda: iter(()))
    store = TeacherStore({"t": TeacherSource(folder, "float32", 37, snapshot)}, CPU)
    heads = heads_of(store, ["t"], range(7, 20))
    part = heads.of(["t"])["t"]
    assert torch.equal(part.weight, weight[7:20])
    assert part.weight.data_ptr() == snapshot.tensors["lm_head.weight"][7:].data_ptr()
    assert store.bytes_read("t") == 0
    snapshot.load(HeldTensors({f"{snapshot.label}/lm_head.weight": weight + 1}))
    assert heads.of(["t"])["t"] is not part
